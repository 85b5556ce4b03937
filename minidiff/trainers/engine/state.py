"""The state of a run in a file: written whole or not at all, read only by the run it belongs to."""

from pathlib import Path

import torch

from minidiff.files import atomic_write, remove_leftovers


def write_state(path: Path, state: dict) -> None:
    """Write the state whole or not at all: a run that is killed meanwhile, or finds the disk full, still has the last one.

    Raises OSError with one clear line if the file cannot be written.
    """
    try:
        remove_leftovers(path)
        with atomic_write(path) as file:
            torch.save(state, file)
    except (OSError, RuntimeError) as error:  # torch wraps what the file says
        cause = error if isinstance(error, OSError) else error.__context__ or error
        kept = "the state before it is kept" if path.exists() else "there was no state before it"
        raise OSError(f"{path} could not be written ({cause}); {kept}: make room, and start again to go on from there") from error


def read_state(path: Path) -> dict:
    """Read a state, with its tensors on the CPU. Raises ValueError for a file that is no state."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # whatever the unpickler meets
        raise ValueError(f"{path} is not the state of a run ({error}); delete it to begin again") from error
