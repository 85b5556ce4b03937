"""Load one checkpoint once in this process, and print seconds and memory as JSON. bench/load.py starts it.

Only the standard library is imported at the top, so that each contender's imports are timed on their own.
"""

import json
import os
import sys
import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter, process_time

POLL_SECONDS = 0.005  # between two looks at the anonymous memory, for which the system keeps no peak


@dataclass(frozen=True)
class Measurement:
    """Seconds of the imports, then seconds and bytes (above the level before the call) until every weight was read once.

    cpu_seconds: without waiting, which says more on a busy machine. total and count: sum and number of all weights.
    """

    import_seconds: float
    seconds: float
    cpu_seconds: float
    resident_peak: int
    resident: int
    anonymous_peak: int
    anonymous: int
    total: float
    count: int


def measure(contender: str, path: str, settings: str, asked: str, config: str | None) -> Measurement:
    """Load the file with one library, and measure that.

    Args:
        contender: "minidiff" or "diffusers".
        path: The file or folder.
        settings: A diffusers folder with at least the JSON files.
        asked: The dtype of the loaded weights.
        config: Ours as JSON, None if the file's shapes determine it.
    """
    start = perf_counter()
    load = {"minidiff": prepare_minidiff, "diffusers": prepare_diffusers}[contender](path, settings, asked, config)
    import_seconds = perf_counter() - start

    from torch import float32  # of weights in half precision the sum is more than they can hold

    with ProcessMemory() as memory:
        start, cpu_start = perf_counter(), process_time()
        weights = [weight for part in load() for weight in part.parameters()]
        total = sum(weight.detach().sum(dtype=float32).item() for weight in weights)
        seconds, cpu_seconds = perf_counter() - start, process_time() - cpu_start
    assert all(str(weight.dtype) == f"torch.{asked}" for weight in weights)
    return Measurement(import_seconds, seconds, cpu_seconds, *memory.above(), total, sum(weight.numel() for weight in weights))


def prepare_minidiff(path: str, settings: str, asked: str, config: str | None):
    """Import our library, and return the function that loads.

    Args:
        path, settings, asked, config: As in `measure`.
    """
    import torch

    import weights_loader
    from minidiff.config import TokenizerConfig
    from minidiff.tokenizer import Tokenizer
    from weights_loader.metadata import config_from_json

    Tokenizer(TokenizerConfig(merges=()))  # imports open_clip's tokenizer
    known = config_from_json(config) if config else None
    return lambda: tuple(weights_loader.load(path, dtype=getattr(torch, asked), config=known).parts.values())


def prepare_diffusers(path: str, settings: str, asked: str, config: str | None):
    """Import diffusers, and return the function that loads.

    Args:
        path, settings, asked, config: As in `measure`.
    """
    import diffusers
    import torch

    # Each class by name: both packages import what they are asked for.
    pipelines = ("DiffusionPipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline")
    named = {name: getattr(diffusers, name) for name in (*pipelines, "AutoencoderKL", "DDIMScheduler", "UNet2DConditionModel")}
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer  # noqa: F401

    options = {"torch_dtype": getattr(torch, asked), "local_files_only": True}

    def load():
        if path == settings:
            pipe = named["DiffusionPipeline"].from_pretrained(path, **options)
        else:
            kind = "StableDiffusionXLPipeline" if (Path(settings) / "tokenizer_2").exists() else "StableDiffusionPipeline"
            pipe = named[kind].from_single_file(path, config=settings, **options)
        return tuple(part for name, part in pipe.components.items() if name in ("text_encoder", "text_encoder_2", "unet", "vae"))

    return load


class ProcessMemory:
    """How far this process rises above its level at the start: `with ProcessMemory() as memory: ...`, then memory.above()."""

    def __enter__(self) -> "ProcessMemory":
        Path("/proc/self/clear_refs").write_text("5")  # the highest resident size, VmHWM, starts again from the present one
        self.start = self.end = resident_and_anonymous()
        self.anonymous_peak = self.start[1]
        self.done = threading.Event()
        self.watcher = threading.Thread(target=self._watch, daemon=True)  # one that nobody stops keeps no process alive
        self.watcher.start()
        return self

    def _watch(self):
        while not self.done.wait(POLL_SECONDS):
            self.anonymous_peak = max(self.anonymous_peak, resident_and_anonymous()[1])

    def __exit__(self, *error):
        self.done.set()
        self.watcher.join()
        self.end = resident_and_anonymous()
        self.anonymous_peak = max(self.anonymous_peak, self.end[1])

    def above(self) -> tuple[int, int, int, int]:
        """Return bytes: resident at the peak and at the end, anonymous at the peak and at the end."""
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        resident_peak = int(status["VmHWM"].split()[0]) * 1024
        resident, anonymous = self.start
        return resident_peak - resident, self.end[0] - resident, self.anonymous_peak - anonymous, self.end[1] - anonymous


def resident_and_anonymous() -> tuple[int, int]:
    """Return the resident and the anonymous bytes of this process."""
    _, resident, of_files, *_ = map(int, Path("/proc/self/statm").read_text().split())
    page = os.sysconf("SC_PAGE_SIZE")
    return resident * page, (resident - of_files) * page


if __name__ == "__main__":
    print(json.dumps(asdict(measure(**json.loads(sys.argv[1])))))
