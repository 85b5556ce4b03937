"""What nvidia-smi says of a GPU: its driver once, its clocks, temperature and power while something runs."""

import shutil
import subprocess
import tempfile
from contextlib import AbstractContextManager

import torch

FIELDS = {"clocks.sm": "MHz", "clocks.mem": "MHz", "temperature.gpu": "degrees C", "power.draw": "W"}
EVERY = 500  # milliseconds between two looks


def query(device: torch.device, field: str) -> str | None:
    """Return one field of nvidia-smi, such as "driver_version"; None without nvidia-smi, a GPU or an answer."""
    command = _command(device, field)
    if command is None:
        return None
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip() or None if done.returncode == 0 else None


def highest_clock(device: torch.device) -> float | None:
    """Return the highest clock of the GPU's multiprocessors in MHz, None where it is not known."""
    return _number(query(device, "clocks.max.sm") or "")


class ClockWatch(AbstractContextManager):
    """Look at a GPU while the block runs: `with ClockWatch(device) as watch: ...`, then watch.read(). Does nothing without nvidia-smi."""

    def __init__(self, device: torch.device):
        self.device, self.process = device, None

    def __enter__(self) -> "ClockWatch":
        self.lines = tempfile.TemporaryFile("w+")  # open as long as the watch
        command = _command(self.device, ",".join(FIELDS))
        if command is not None:
            self.process = subprocess.Popen([*command, f"--loop-ms={EVERY}"], stdout=self.lines, stderr=subprocess.DEVNULL)
        return self

    def __exit__(self, *error) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.lines.seek(0)
        self.rows = [[_number(cell) for cell in line.split(",")] for line in self.lines.read().splitlines()]
        self.lines.close()

    def read(self) -> dict[str, dict[str, float]] | None:
        """Return lowest and highest value of each field, after the block; None if nothing was seen."""
        seen = {name: [row[i] for row in self.rows if len(row) == len(FIELDS)] for i, name in enumerate(FIELDS)}
        known = {name: [value for value in values if value is not None] for name, values in seen.items()}
        return {name: {"lowest": min(values), "highest": max(values)} for name, values in known.items() if values} or None


def _command(device: torch.device, fields: str) -> list[str] | None:
    """Return the command for this GPU; nvidia-smi counts GPUs in another order than CUDA, but knows their UUIDs."""
    program = shutil.which("nvidia-smi")
    if program is None or device.type != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
    chosen = [f"--id=GPU-{uuid}"] if uuid else []
    return [program, *chosen, f"--query-gpu={fields}", "--format=csv,noheader,nounits"]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # such as [N/A]
        return None
