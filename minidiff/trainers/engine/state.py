"""The state of a run in a file: written whole or not at all, read only by the run it belongs to."""

import os
import zlib
from pathlib import Path

import torch
from torch import nn


def write_state(path: Path, state: dict) -> None:
    """Write the state whole or not at all: a run that is killed meanwhile, or finds the disk full, still has the last one.

    Raises OSError with one clear line if the file cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch wraps what the file says
        cause = error if isinstance(error, OSError) else error.__context__ or error
        kept = "the state before it is kept" if path.exists() else "there was no state before it"
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path} could not be written ({cause}); {kept}: make room, and start again to go on from there") from error


def read_state(path: Path) -> dict:
    """Read a state, with its tensors on the CPU. Raises ValueError for a file that is no state."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever the unpickler meets
        raise ValueError(f"{path} is not the state of a run ({error}); delete it to begin again") from error


def check_same(path: Path, found: dict, asked: dict) -> None:
    """Raise ValueError naming each entry of the two flat descriptions that differs."""
    names = [*asked, *(name for name in found if name not in asked)]
    different = [f"{name} {found.get(name)!r}, now {asked.get(name)!r}" for name in names if found.get(name) != asked.get(name)]
    if different:
        raise ValueError(f"{path} holds another run ({'; '.join(different)}); choose another place, or ask for the same")


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def checksum(*modules: nn.Module) -> int:
    """Return the CRC-32 of the weights as bytes, to recognise them."""
    crc = 0
    for module in modules:
        for p in module.parameters():
            crc = zlib.crc32(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    return crc
