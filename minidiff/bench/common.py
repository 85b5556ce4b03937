"""What the benchmarks share: the machine's name, models of made-up weights, the record that grows as numbers come in."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from minidiff.bundled.tasks import bundled_config
from minidiff.config import SD1, SD2, ModelConfig
from minidiff.files import write_text
from minidiff.pipeline import StableDiffusion
from minidiff.text_encoder import TextEncoder
from minidiff.tokenizer import Tokenizer
from minidiff.unet import UNet
from minidiff.vae import VAE

PACKAGES = ("torch", "triton", "numpy", "safetensors", "diffusers", "transformers", "accelerate", "peft")  # whose versions matter


def model_config(name: str) -> ModelConfig:
    """sd1 and sd2 are the published ones (sd2 made for 768 pixels), bundled the small one that ships. Raises ValueError for another."""
    configs = {"sd1": SD1, "sd2": SD2}
    if name not in (*configs, "bundled"):
        raise ValueError(f"model {name!r} unknown; choose {', '.join(configs)}, bundled")
    return configs[name] if name in configs else bundled_config()


def check(rounds: int, out: Path | None, against: bool = False, needed: Sequence[str] = ("diffusers",)) -> None:
    """Raises for what would fail only after minutes: no rounds, no folder for `out`, rivals that are not installed."""
    if missing := [name for name in needed if not importlib.util.find_spec(name)] if against else []:
        packages = " ".join(dict.fromkeys((*missing, "transformers", "accelerate")))
        raise ValueError(f"{missing[0]} is not installed: run pip install {packages}, or measure without: --no-against")
    if rounds < 1:
        raise ValueError(f"rounds {rounds}: give 1 or more")
    if out and not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.parent}; make it first")


def machine() -> dict[str, object]:
    """What the numbers depend on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return {
        "processor": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()),
        "cores": os.cpu_count(),
        "usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if importlib.util.find_spec(name)),
    }


def in_a_line(machine: dict[str, object]) -> str:
    """The machine above a table."""
    gpu = f"{machine['gpu']}, " if machine["gpu"] else ""
    return gpu + "{processor}, {usable} of {cores} cores; {versions}\n".format_map(machine)


def command() -> str:
    """What was typed, without the place where minidiff is installed."""
    return " ".join(["minidiff", *sys.argv[1:]])


class Record:
    """What was measured, as JSON: whole on the disk after each number that is kept, so that a run that ends early leaves what it has.

    out: the file, or None. settings: all that the numbers depend on beside the machine. results: those of an earlier run of the same
    settings on the same machine that did not end; a file of anything else is written over.
    """

    def __init__(self, out: Path | None, settings: dict[str, object]):
        self.out = out
        self.values = {"command": command(), "machine": machine(), "settings": settings, "finished": False, "results": {}}
        earlier = _read(out)
        if not earlier.get("finished", True) and all(earlier.get(name) == self.values[name] for name in ("machine", "settings")):
            self.values["results"] = earlier["results"]

    @property
    def results(self) -> dict[str, dict]:
        return self.values["results"]

    def keep(self, name: str, result: dict) -> None:
        self.results[name] = result
        self.write()

    def finish(self, **more: object) -> None:
        self.values |= {"finished": True, **more}
        self.write()

    def write(self) -> None:
        if self.out:
            write_text(self.out, json.dumps(self.values, indent=2) + "\n")


def _read(out: Path | None) -> dict:
    try:
        values = json.loads(out.read_text()) if out else {}
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def made_up(config: ModelConfig, dtype: torch.dtype) -> StableDiffusion:
    """A model whose weights are windows onto one pool of random numbers: it takes the memory of its largest matrix."""
    with torch.device("meta"):
        parts = TextEncoder(config.text_encoder), UNet(config.unet), VAE(config.vae)
    generator = torch.Generator().manual_seed(0)
    largest = max(weight.numel() for part in parts for weight in part.parameters())
    # All positive, so that a weight that is lost is lost in the sum.
    pool = (torch.rand(largest + 1000, generator=generator) * 0.02).to(dtype)
    for part in parts:
        windows = {}
        for name, weight in part.state_dict().items():
            start = int(torch.randint(1000, (), generator=generator))
            windows[name] = pool[start : start + weight.numel()].view(weight.shape)
        part.load_state_dict(windows, assign=True)
    return StableDiffusion(config, *parts, Tokenizer(config.tokenizer))


def made_up_to_run(config: ModelConfig) -> StableDiffusion:
    """The same in float32 with each weight in its own memory, at the size that keeps activations at unit variance."""
    sd = made_up(config, torch.float32)
    for part in sd.parts.values():
        weights = {}
        for name, weight in part.state_dict().items():
            if weight.ndim > 1:
                uniform = (weight - 0.01) * 100  # of -1..1, whose variance is 1/3
                weights[name] = uniform * (3 / weight[0].numel()) ** 0.5
            else:
                weights[name] = torch.full_like(weight, float("norm" in name and name.endswith("weight")))
        part.load_state_dict(weights, assign=True)
    return sd
