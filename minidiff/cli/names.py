"""Names of the files that commands write: made from prompts, free, short enough in bytes, and in a folder that can be written to.

Everything here happens before the work whose result the file holds. Importing this takes no time.
"""

import os
import secrets
from itertools import chain, count
from pathlib import Path

LONGEST = 255  # bytes of a name on the usual file systems
TEMPORARY = len("..12345678.tmp")  # what files.temporary_path adds to a name
WORDS = 60  # bytes of a prompt in a name: there is room for a stem, numbers and an ending


def slug(prompt: str, most: int = WORDS) -> str:
    """Turn a prompt into the stem of a file name, of at most this many bytes."""
    words = "".join(c if c.isalnum() else " " for c in prompt.lower()).split()
    return "-".join(words).encode()[:most].decode(errors="ignore").strip("-") or "picture"


def free_path(path: Path) -> Path:
    """Return the path itself, or numbered if something of that name is there: a name that the user did not give replaces nothing."""
    numbered = (path.with_name(f"{path.stem}-{i}{path.suffix}") for i in count(2))
    return next(one for one in chain([path], numbered) if not os.path.lexists(one))  # a dangling link is a name too


def check_writable(path: Path) -> None:
    """Raise ValueError for a name that is too long, OSError for a folder that is not there or cannot be written to."""
    if len(os.fsencode(path.name)) + TEMPORARY > LONGEST:
        raise ValueError(f"{path}: its name has {len(os.fsencode(path.name))} bytes; choose one of at most {LONGEST - TEMPORARY}")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder; make it, or choose another place")
    trial = path.with_name(f".{secrets.token_hex(4)}.tmp")
    try:
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror}); choose another place") from error


def check_folder(path: Path) -> None:
    """Raise OSError for a folder that cannot be made or written to; leave nothing behind."""
    there = next((folder for folder in (path, *path.absolute().parents) if folder.exists()), path)
    if not there.is_dir():
        raise NotADirectoryError(f"--out {path}: no folder to write to ({there} is a file); choose another place")
    trial = there / f".{secrets.token_hex(4)}.tmp"
    try:
        trial.touch(exist_ok=False)
        trial.unlink()
    except OSError as error:
        raise OSError(f"--out {path}: no folder to write to ({error.strerror}); choose another place") from error


def is_model(name: str) -> bool:
    """Say whether something of this name can be loaded: a file, a folder, or a model that ships with minidiff."""
    from weights_loader.contents import BUNDLED

    return name in BUNDLED or Path(name).exists()
