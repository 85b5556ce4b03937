"""How a command ends that cannot go on: one line on standard error, and an exit code.

    what the user can mend       ValueError, OSError, ImportError         the message, 2
    no memory                    of the GPU, of the CPU, of NumPy         what would help, 2
    a fault of this program      anything else                            a file with the traceback, 1

With --traceback the traceback is shown as well.
"""

import re
import sys
import tempfile
import traceback
from pathlib import Path

MEND = (ValueError, OSError, ImportError)
# What PyTorch says where it raises a plain RuntimeError: the allocator of the CPU, a GPU's, a size beyond 64 bits.
NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|Storage size calculation overflowed|ALLOC_FAILED")
LESS = {
    "generate": "a smaller --size, a smaller --batch or fewer prompts, or --dtype bfloat16",
    "edit": "a smaller --size, a smaller --batch, or --dtype bfloat16",
    "train": "a smaller --batch (with --gradient-accumulation), --checkpointing, a smaller --size, or --dtype bfloat16",
    "evaluate": "smaller or fewer pictures",
    "bench": "a smaller model or batch",
}
OTHER = "closing other programs, a smaller model, or --dtype bfloat16 where the command has it"


def explain(error: Exception, command: str) -> tuple[str, int]:
    """Return the line to print for an exception of a command, and the exit code."""
    if is_out_of_memory(error):
        return f"out of memory{amount(error)}; what would help: {LESS.get(command.split(' ')[0], OTHER)}", 2
    if isinstance(error, MEND):
        return str(error), 2
    try:
        where = f"the traceback is in {write_traceback(error)}"
    except OSError as failure:
        where = f"--traceback shows where: it could not be written ({failure})"
    return f"a fault of minidiff itself ({type(error).__name__}: {first_line(error)}); {where}", 1


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether memory was all that was missing: by the type, or by the message of PyTorch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and bool(NO_MEMORY.search(str(error)))


def amount(error: BaseException) -> str:
    """Return how much was asked for, as far as the message says."""
    found = re.search(r"allocate ([\d.]+ [KMGTP]iB)|allocate (\d+) bytes|allocate (\d+)", str(error))
    if not found:
        return ""
    size = found[1] or f"{int(found[2] or found[3]) / 2**30:,.1f} GiB"
    return f" ({size} at once)"


def first_line(error: BaseException) -> str:
    """Return the first line of a message, cut where it is long."""
    lines = str(error).splitlines() or ["no message"]
    return lines[0][:200]


def write_traceback(error: BaseException) -> Path:
    """Write the traceback, the command and the versions into a new file of the folder for temporary files."""
    with tempfile.NamedTemporaryFile("w", prefix="minidiff-", suffix=".txt", delete=False, encoding="utf-8") as file:
        file.write(f"minidiff {' '.join(sys.argv[1:])}\nPython {sys.version}\n")
        torch = sys.modules.get("torch")
        file.write(f"PyTorch {torch.__version__}\n" if torch else "")
        file.writelines(traceback.format_exception(error))
    return Path(file.name)
