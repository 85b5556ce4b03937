"""`minidiff doctor`: ten lines for a bug report: versions, devices, memory, Triton, and what would run where."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from minidiff import __version__

if TYPE_CHECKING:
    import torch

WEIGHTS = {"SD 1.x": 1.066e9, "SD 2.x": 1.290e9, "SDXL": 3.469e9}  # numbers of each
SHARE = 1.3  # of the weights: what drawing a picture takes in all, roughly


def doctor() -> None:
    """Print versions, devices, memory, Triton and what would run where, for a bug report.

        minidiff doctor

    Nothing is loaded, changed or downloaded.
    """
    for line in report():
        print(line)


def report() -> Iterator[str]:
    """Yield the lines of the report."""
    import torch

    from minidiff.cli.model import choose_device
    from minidiff.machine import read_machine
    from minidiff.markdown import format_bytes

    machine, device = read_machine(), choose_device("auto")
    total, free = main_memory()
    yield f"minidiff     {__version__}, {Path(__file__).parents[1]}"
    yield f"system       Python {machine['python']}, {machine['system']}"
    yield f"packages     {machine['versions']}"
    yield f"processor    {machine['processor']}, {machine['usable']} of {machine['cores']} cores, {machine['threads']} threads"
    yield f"memory       {size(total)}, {size(free)} free"
    yield f"GPU          {gpu(torch)}"
    yield f"Triton       {triton(device)}"
    yield f"would run    {device} (--device auto), attention {attention(device)}, {dtypes(device)}"
    room = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free
    yield f"would fit    {', '.join(fits(room, device.type))}"
    yield f"disk         {format_bytes(shutil.disk_usage(tempfile.gettempdir()).free)} free in {tempfile.gettempdir()}"


def main_memory() -> tuple[int | None, int | None]:
    """Return the bytes of main memory, and how many are free, as far as the system tells."""
    path = Path("/proc/meminfo")
    if path.is_file():
        rows = dict(line.split(":", 1) for line in path.read_text().splitlines())
        return tuple(1024 * int(rows[name].split()[0]) if name in rows else None for name in ("MemTotal", "MemAvailable"))  # type: ignore[return-value]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    except (AttributeError, ValueError, OSError):
        return None, None


def size(count: int | None) -> str:
    """Format bytes, or "unknown"."""
    from minidiff.markdown import format_bytes

    return "unknown" if count is None else format_bytes(count)


def gpu(torch) -> str:
    """Return each GPU with its memory."""
    if torch.cuda.is_available():
        found = []
        for i in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(i)
            capability = ".".join(map(str, torch.cuda.get_device_capability(i)))
            found.append(f"{torch.cuda.get_device_name(i)}, {size(total)}, {size(free)} free, compute capability {capability}")
        return f"{'; '.join(found)}; CUDA {torch.version.cuda}"
    return "Apple's (mps)" if torch.backends.mps.is_available() else f"none that PyTorch sees (built for CUDA {torch.version.cuda})"


def triton(device: "torch.device") -> str:
    """Return whether our kernels run on the device, and if not, why."""
    from minidiff.kernels import tiles
    from minidiff.kernels.dispatch import triton_works

    if tiles.triton is None:
        return "not installed; PyTorch's own attention is used"
    if device.type != "cuda":
        return f"installed, and not used on {device.type}; its kernels are for GPUs"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if triton_works(device):
            return "works; our kernels are used"
    return str(said[-1].message) if said else "does not work here; PyTorch's own attention is used"


def attention(device: "torch.device") -> str:
    """Return the backend that self-attention of a usual shape takes there."""
    import torch

    from minidiff.kernels.dispatch import select_backend

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        q = torch.zeros(2, 4096, 320, dtype=torch.float16 if device.type == "cuda" else torch.float32, device=device)
        backend = select_backend(q, q, q, 8)
    return {"self": "by our Triton kernel", "pytorch": "by PyTorch", "naive": "in plain steps"}.get(backend, backend)


def dtypes(device: "torch.device") -> str:
    """Return the dtype of the weights there."""
    return "weights in float32, or --dtype bfloat16 at half the size" if device.type == "cpu" else "weights in the file's own dtype"


def fits(room: int | None, device: str) -> Iterator[str]:
    """Yield for each family whether its weights, and what drawing takes, fit into that many bytes."""
    for name, count in WEIGHTS.items():
        kinds = {"float32": 4, "bfloat16": 2} if device == "cpu" else {"float16": 2}
        held = [kind for kind, width in kinds.items() if room is not None and SHARE * width * count < room]
        yield (
            f"{name} in {' or '.join(held)}"
            if held
            else f"{name} {'not known' if room is None else 'not' if device == 'cpu' else 'by --offload'}"
        )
