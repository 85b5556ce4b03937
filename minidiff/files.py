"""Files that appear whole or not at all, digests that recognise weights, and the check that a run continues the one before it.

    with atomic_write(path) as file:        .NAME.3f9a1c20.tmp --- fsync, rename ---> NAME
        torch.save(state, file)

A file system renames in one step: whoever reads meanwhile, or starts again after a crash or a full disk, finds the old file or the new one.
"""

import glob
import hashlib
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

# --- whole or not at all ----------------------------------------------------------------------------------------------


def temporary_path(path: Path) -> Path:
    """Return a new name beside `path`, hidden and unlike that of any other process: .NAME.3f9a1c20.tmp."""
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


@contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
    """Open a file that becomes `path` when the block ends, replacing what was there. If the block raises, `path` stays as it was.

    Temporary files of writers of `path` that were killed are deleted. Raises OSError if the folder is missing or the disk is full.
    """
    remove_leftovers(path)
    temporary = temporary_path(path)
    try:
        file = temporary.open("xb")
        with held(temporary):
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # or a crash of the machine might leave the new name on an empty file
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def held(temporary: Path) -> Iterator[None]:
    """Lock a temporary file or folder, so that nobody takes it for a leftover until the block ends. Does nothing without Unix' locks."""
    with ExitStack() as stack:
        with suppress(ImportError, OSError):
            import fcntl

            descriptor = os.open(temporary, os.O_RDONLY)
            stack.callback(os.close, descriptor)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield


def remove_leftovers(path: Path) -> None:
    """Delete the temporary files and folders of writers of `path` that were killed. Those of writers at work are locked, and stay."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        if _is_held(leftover):
            continue
        with suppress(OSError):  # deleted by another process meanwhile, or open, which Windows does not delete
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()


def _is_held(temporary: Path) -> bool:
    try:
        import fcntl

        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        finally:
            os.close(descriptor)
    except ImportError:
        return False
    except OSError:  # locked, gone, or on a file system without locks
        return True
    return False


def write_text(path: Path, text: str) -> None:
    """Write text in UTF-8, whole or not at all."""
    with atomic_write(path) as file:
        file.write(text.encode())


def read_text(path: Path) -> str:
    """Read a file in UTF-8. Raises ValueError for another encoding."""
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors put a mark in front
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error


def parse_json(text: str, where: str, advice: str = "") -> Any:
    """Parse JSON. Raises ValueError that names the place, and ends with the advice."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON ({error}){advice}") from error


# --- digests ----------------------------------------------------------------------------------------------------------


def tensor_bytes(tensor: Tensor) -> memoryview:
    """Return the numbers of a tensor of any device and strides as bytes, in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def digest(parts: Iterable[bytes | memoryview]) -> str:
    """Return the SHA-256 of the parts, joined, in hexadecimal."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()


def fingerprint(module: nn.Module) -> str:
    """Return the SHA-256 of a module's weights with their names, dtypes and shapes, in hexadecimal."""

    def parts() -> Iterator[bytes | memoryview]:
        for name, tensor in module.state_dict().items():
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode()
            yield tensor_bytes(tensor)

    return digest(parts())


def checksum(*modules: nn.Module) -> int:
    """Return the CRC-32 of the modules' parameters: faster than `fingerprint`, and what the states of runs hold."""
    crc = 0
    for module in modules:
        for p in module.parameters():
            crc = zlib.crc32(tensor_bytes(p), crc)
    return crc


# --- the same run? ----------------------------------------------------------------------------------------------------


def differences(found: Mapping[str, object], asked: Mapping[str, object]) -> list[str]:
    """Return one phrase per entry that differs, such as "seed 0, now 1"."""
    names = [*asked, *(name for name in found if name not in asked)]
    return [f"{name} {found.get(name)!r}, now {asked.get(name)!r}" for name in names if found.get(name) != asked.get(name)]


def check_same(place: Path, found: Mapping[str, object], asked: Mapping[str, object], holds: str = "another run") -> None:
    """Raise ValueError unless `found` and `asked` are the same settings. The message names each that differs.

    Args:
        place: The file or folder, for the message.
        found: The settings of what is there.
        asked: The settings of the present run.
        holds: What the place holds if they differ, for the message.
    """
    if different := differences(found, asked):
        raise ValueError(f"{place} holds {holds} ({'; '.join(different)}); choose another place, or ask for the same")


def ensure_same_run(
    path: Path,
    asked: Mapping[str, object],
    *,
    holds: str = "another run",
    defaults: Mapping[str, object] | None = None,
    ignore: Sequence[str] = (),
) -> None:
    """Claim a folder for a run: write `asked` to the JSON file `path`, or raise ValueError if another run's settings are there already.

    Args:
        path: The file. Its folder is made if it is missing.
        asked: The settings that make this run what it is, of any type that JSON holds.
        holds: What the folder holds if they differ, for the message.
        defaults: Settings of older runs, whose file does not name them.
        ignore: Settings that may change from run to run.
    """
    asked = json.loads(json.dumps(asked))
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asked, indent=1))
    found = parse_json(read_text(path), str(path), "; choose an empty folder")
    if not isinstance(found, dict):
        raise ValueError(f"{path}: no settings of a run; choose an empty folder")
    same = {name: asked.get(name) for name in ignore}
    older = json.loads(json.dumps(defaults or {}))
    check_same(path.parent, {**older, **found, **same}, {**asked, **same}, holds)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keep a folder to this process within the block. Raises ValueError if another has it. Does nothing without Unix' locks."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{folder}: another run is at work there; wait for its end, or choose another folder") from error
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)
