"""What the benchmarks share: models of random weights, checks of arguments, the record that grows as numbers come in."""

import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from minidiff.bundled.tasks import bundled_config
from minidiff.config import SD1, SD2, SDXL, ModelConfig
from minidiff.files import write_text
from minidiff.machine import read_machine
from minidiff.pipeline import StableDiffusion
from minidiff.scenes.art import known
from minidiff.text_encoder import TextEncoder
from minidiff.two_encoders import text_configs, text_side
from minidiff.unet import UNet
from minidiff.vae import VAE


def model_config(model: str | ModelConfig) -> ModelConfig:
    """Return the config of "sd1", "sd2" (made for 768 pixels), "sdxl" or "bundled", or a config as it is.

    Raises ValueError for another name.
    """
    configs = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL, "bundled": bundled_config()}
    return configs[known("model", model, configs)] if isinstance(model, str) else model


def check_arguments(rounds: int, out: Path | None, against: bool = False, needed: Sequence[str] = ("diffusers",)) -> None:
    """Raise for what would fail only after minutes: no rounds, no folder for `out`, rivals that are not installed.

    Args:
        rounds: At least 1.
        out: A file, or None.
        against: Rivals take part.
        needed: Their packages.
    """
    if missing := [name for name in needed if not importlib.util.find_spec(name)] if against else []:
        packages = " ".join(dict.fromkeys((*missing, "transformers", "accelerate")))
        raise ValueError(f"{missing[0]} is not installed: run pip install {packages}, or measure without: --no-against")
    if rounds < 1:
        raise ValueError(f"rounds {rounds}: give 1 or more")
    if out and not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.parent}; make it first")


def read_command() -> str:
    """Return the command line, without the path of minidiff."""
    return " ".join(["minidiff", *sys.argv[1:]])


class BenchRecord:
    """Measurements as JSON, whole on the disk after each one that is kept, so that a run that ends early leaves what it has.

    out: the file, or None. settings: all that the numbers depend on besides the machine. results: resumed from an unfinished run with the
    same settings on the same machine; any other file is overwritten.
    """

    def __init__(self, out: Path | None, settings: dict[str, object]):
        self.out = out
        self.values = {"command": read_command(), "machine": read_machine(), "settings": settings, "finished": False, "results": {}}
        earlier = _read(out)
        if not earlier.get("finished", True) and all(earlier.get(name) == self.values[name] for name in ("machine", "settings")):
            self.values["results"] = earlier["results"]
        self.results: dict[str, dict] = self.values["results"]  # by name

    def keep(self, name: str, result: dict) -> None:
        """Keep a result, and write the file."""
        self.results[name] = result
        self.write()

    def finish(self, **more: object) -> None:
        """Mark the record as complete, with more values beside the results."""
        self.values |= {"finished": True, **more}
        self.write()

    def write(self) -> None:
        """Write the file, whole or not at all."""
        if self.out:
            write_text(self.out, json.dumps(self.values, indent=2) + "\n")


def _read(out: Path | None) -> dict:
    try:
        values = json.loads(out.read_text()) if out else {}
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def random_model(config: ModelConfig, dtype: torch.dtype) -> StableDiffusion:
    """Make a model whose weights are windows onto one pool of random numbers: it takes the memory of its largest matrix."""
    with torch.device("meta"):
        encoders = {name: TextEncoder(numbers) for name, (_, numbers) in text_configs(config).items()}
        unet, vae = UNet(config.unet), VAE(config.vae)
    parts = *encoders.values(), unet, vae
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
    return StableDiffusion(config, text_side(config, encoders), unet, vae)


def random_model_to_run(config: ModelConfig) -> StableDiffusion:
    """Make a random float32 model with each weight in its own memory, scaled to keep activations at unit variance."""
    sd = random_model(config, torch.float32)
    for part in sd.parts.values():
        weights = {}
        for name, weight in part.state_dict().items():
            uniform = (weight - 0.01) * 100  # of -1..1, whose variance is 1/3
            vector = torch.full_like(weight, float("norm" in name and name.endswith("weight")))
            weights[name] = uniform * (3 / weight[0].numel()) ** 0.5 if weight.ndim > 1 else vector
        part.load_state_dict(weights, assign=True)
    return sd
