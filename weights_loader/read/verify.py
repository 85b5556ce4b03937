"""Compare a file's numbers with the checksums that it holds.

    zip (.ckpt, .pt, .bin)    a CRC-32 for each entry: a difference is damage
    safetensors               none in the format; kohya's scripts and others keep a SHA-256 in the metadata, which goes out of date when
                              another program changes the numbers: a difference is worth a note

Reading a file for use does not do this, which would bring all of it into memory.
"""

import hashlib
import json
import zipfile
from pathlib import Path

from weights_loader.read.checkpoint import LONGEST_HEADER

HASHES = ("sshs_model_hash", "modelspec.hash_sha256")  # of everything behind the header; the second begins with 0x
CHUNK = 2**22
SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


def verify(path: str | Path) -> tuple[str, ...]:
    """Return a sentence for each weights file of a file or folder that says what its checksums show. Raises ValueError for damage."""
    path = Path(path)
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.suffix in SUFFIXES) if path.is_dir() else [path]
    return tuple(f"{file}: {_verify_file(file)}" for file in files)


def _verify_file(path: Path) -> str:
    with path.open("rb") as file:
        start = file.read(16)
        if start.startswith(b"PK\x03\x04"):
            return _verify_zip(path)
        length = int.from_bytes(start[:8], "little")
        if start[8:9] != b"{" or length > LONGEST_HEADER:
            return "no checksum in this format"
        file.seek(8)
        try:
            metadata = json.loads(file.read(length)).get("__metadata__", {})
        except (ValueError, AttributeError, RecursionError):
            raise ValueError(f"{path}: damaged: it begins as a safetensors file, but its header is wrong") from None
        stated = {key: text.removeprefix("0x") for key in HASHES if isinstance(text := metadata.get(key), str)}
        if not stated:
            return "no checksum in it"
        sha = hashlib.sha256()
        while chunk := file.read(CHUNK):
            sha.update(chunk)
    wrong = [key for key, text in stated.items() if text != sha.hexdigest()]
    if wrong:
        return f"not the numbers of its {wrong[0]}: damaged, or changed by a program that left the checksum as it was"
    return f"the numbers are those of its {next(iter(stated))}"


def _verify_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.compress_type != zipfile.ZIP_STORED:
                    raise ValueError(f"{path}: '{entry.filename}' in it is compressed, which torch never does")
                with archive.open(entry) as content:
                    while content.read(CHUNK):
                        pass
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, RuntimeError) as error:
        raise ValueError(f"{path}: damaged: {error}; download it again") from error
    return "every entry has its checksum"
