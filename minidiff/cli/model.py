"""What the commands of the command line share: the model and the device that were asked for, small files, notes to the user."""

import re
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from os import devnull
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from minidiff.tokenizer import Tokenizer


def load(model: str, dtype: str, device: "str | torch.device", *, offload: bool = False, **options):
    """Load a model onto the device asked for, and print what the loader decided.

    Args:
        model: a file, a folder, or the name of a bundled model
        dtype: of the weights, as float16; "auto" leaves it to the loader
        device: a device, or its name as `choose_device` takes it
        offload: keep the model in main memory, and move each part to the device while it runs; with "auto" in the file's own dtype
        options: more arguments of weights_loader.load
    """
    import torch

    import weights_loader

    device = choose_device(device) if isinstance(device, str) else device
    if offload and device.type == "cpu":
        raise ValueError("--offload moves parts of the model to a GPU, and --device is the CPU; leave it out")
    chosen = getattr(torch, dtype) if dtype != "auto" else "file" if offload else None
    sd = weights_loader.load(model, dtype=chosen, device="cpu" if offload else device, **options)
    print_notes(sd.notes)
    if offload:
        from minidiff.offload import Offload

        Offload(sd, device)
    return sd


def weighted(files: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """Read FILE or FILE:0.7, as the loader takes them."""
    from weights_loader.adapters.lora import parse_weighted

    return tuple(parse_weighted(file) for file in files)


def named(files: Sequence[str]) -> tuple[str | tuple[str, str], ...]:
    """Read FILE or FILE:WORD, as the loader takes them."""
    from weights_loader.adapters.embedding import parse_named

    return tuple((file, word) if word else file for file, word in map(parse_named, files))


def unused_words(tokenizer: "Tokenizer", prompts: Iterable[str]) -> list[str]:
    """Return a note for each learned word that no prompt uses."""
    used = {i for prompt in prompts for i in tokenizer.encode(prompt)}
    missed = [name for name, ids in tokenizer.added.items() if ids[0] not in used]
    return [f"no prompt uses the learned word {name}, so its file changes nothing by it" for name in missed]


def print_notes(notes: Iterable[str]) -> None:
    """Print what a user should know to standard error."""
    for note in notes:
        print(f"minidiff: {note}", file=sys.stderr)


def choose_device(name: str) -> "torch.device":
    """Return a device by name; `auto` takes CUDA, else MPS, else the CPU."""
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?|mps", name):
        raise ValueError(f"device {name!r} unknown; choose auto, cpu, cuda, cuda:1, mps")
    device = torch.device(name)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device {name!r}: this machine has {torch.cuda.device_count()} CUDA devices; take --device auto")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError("device 'mps' is not available on this machine; take --device auto")
    return device


@contextmanager
def training_on(device: str, threads: int | None, attention: str = "auto"):
    """Set threads and attention, and give the device to train on; of several processes that torchrun started, only the first one prints."""
    import torch

    from minidiff.cli.flags import check_least
    from minidiff.kernels.dispatch import attention_backend
    from minidiff.trainers.engine import distributed

    check_least(1, threads=threads)
    if threads is not None:
        torch.set_num_threads(threads)
    joined = distributed.init_distributed(choose_device(device))
    try:
        with attention_backend(attention), ExitStack() as stack:
            if distributed.rank() > 0:
                nowhere = stack.enter_context(open(devnull, "w"))
                stack.enter_context(redirect_stdout(nowhere))
                stack.enter_context(redirect_stderr(nowhere))
            yield joined
    finally:
        distributed.destroy_distributed()
