"""Commands for GPUs of 8, 12 and 24 GB, with the memory that each is computed to take (gpu_memory.py).

    python -m minidiff.bench.recipes                              prints the section of README.md that has them
    python -m minidiff.bench.recipes minidiff/bench/README.md     renews it in that file

No GPU has run any of them. Each runs in miniature in tests/bench/test_recipes.py.
"""

import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from minidiff.bench.common import model_config, random_model
from minidiff.bench.gpu_memory import count_drawing, count_from_scratch, count_training
from minidiff.bundled.edits import renew_tables
from minidiff.bundled.recipe import RECIPES as SCRATCH
from minidiff.files import write_text
from minidiff.markdown import format_bytes, markdown_table
from minidiff.pipeline import StableDiffusion
from minidiff.trainers.methods.options import family_of
from minidiff.trainers.methods.override import override
from minidiff.trainers.methods.table import METHODS, preset

USABLE = 0.85  # of a card's memory; the rest is for what is not computed, and for a desktop
FILES = {"sd1": "v1-5-pruned-emaonly.safetensors", "sdxl": "sd_xl_base_1.0.safetensors"}
NAMES = {"sd1": "SD 1", "sdxl": "SDXL", "bundled": "from scratch"}
PROMPT = "a photograph of an astronaut riding a horse"
CAT = ("--images", "cat-pictures", "--class-word", "cat", "--token")
CAPTIONED = ("--images", "pictures", "--captions")


@dataclass(frozen=True)
class CardRecipe:
    """A command for a card.

    Args:
        card: its memory in GB, of 2^30 bytes; a larger one will do as well
        aim: draw, teach (something new, by a small file) or train (the model's own weights)
        model: sd1, sdxl or bundled
        command: as "generate" or "train lora"
        out: file or folder that it writes
        expect: what the user gets, and what to know about it
        given: flags that the memory does not depend on
        flags: of generate, or of the method's options, by their flat names; True is a flag without a value
        dtype: of the frozen weights
    """

    card: int
    aim: str
    model: str
    command: str
    out: str
    expect: str
    given: tuple[str, ...] = ()
    flags: Mapping[str, object] = field(default_factory=dict)
    dtype: str = "bfloat16"

    @property
    def title(self) -> str:
        """Return the aim and the model, as "draw, SDXL"."""
        return f"{self.aim}, {NAMES[self.model]}"

    def words(self) -> list[str]:
        """Return the words of the command line."""
        if self.model == "bundled":
            return ["minidiff", *self.command.split(), self.out]
        flags = [word for name, value in self.flags.items() for word in _as_flag(name, value)]
        dtype = () if self.dtype == "float32" and self.aim != "draw" else ("--dtype", self.dtype)
        return ["minidiff", *self.command.split(), *self.given, "--model", FILES[self.model], *dtype, *flags, "--out", self.out]

    def memory(self) -> int:
        """Compute the bytes that it takes at most."""
        if self.model == "bundled":
            return count_from_scratch(SCRATCH["bundled"])
        sd = model_of(self.model, self.dtype)
        if self.aim == "draw":
            batch = self.flags.get("batch", 1)
            assert isinstance(batch, int)
            return count_drawing(sd, batch).total(offload="offload" in self.flags)
        return count_training(sd, METHODS[self.command.split()[1]], self.options())

    def options(self) -> Any:
        """Return the options of the training method, a preset with the flags over it; their class depends on the method."""
        return override(preset(self.command.split()[1], family_of(model_config(self.model))), self.flags)


def _as_flag(name: str, value: object) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    return [flag] if value is True else [flag, *map(str, value)] if isinstance(value, tuple) else [flag, str(value)]


@cache
def model_of(model: str, dtype: str) -> StableDiffusion:
    """Return a model of random weights in a dtype, kept for the next recipe."""
    return random_model(model_config(model), getattr(torch, dtype))


RECIPES = (
    CardRecipe(8, "draw", "sd1", "generate", "astronauts.png", "four pictures of 512 x 512 on a sheet", (PROMPT,), {"batch": 4}),
    CardRecipe(
        8,
        "draw",
        "sdxl",
        "generate",
        "astronaut.png",
        "one picture of 1024 x 1024; text encoders, U-Net and VAE take turns on the card, and 7 GB of main memory hold them",
        (PROMPT,),
        {"offload": True},
    ),
    CardRecipe(
        8,
        "teach",
        "sd1",
        "train lora",
        "runs/cat-lora",
        "1,500 steps of 4 samples; a LoRA of 3 MB; every 100 steps a sheet of pictures",
        (*CAT, "sks"),
        {"batch": 4},
    ),
    CardRecipe(
        8,
        "train",
        "bundled",
        "train from-scratch",
        "runs/small",
        "the VAE, then text encoder and U-Net; a whole small Stable Diffusion, of the bundled model's kind",
        dtype="float32",
    ),
    CardRecipe(12, "draw", "sdxl", "generate", "astronaut.png", "one picture of 1024 x 1024; all parts stay on the card", (PROMPT,)),
    CardRecipe(
        12,
        "teach",
        "sd1",
        "train custom-diffusion",
        "runs/cat-custom",
        "250 steps of 8 samples, each beside a picture of class-pictures, so that other cats stay as they are",
        (*CAT, "<cat>", "--class-images", "class-pictures"),
        {"prior": "folder", "batch": 2, "gradient_accumulation": 4},
    ),
    CardRecipe(
        12,
        "teach",
        "sdxl",
        "train lora",
        "runs/cat-lora-xl",
        "1,500 steps of 1 sample; blocks are computed twice, which costs about a third more time",
        (*CAT, "sks"),
        {"checkpointing": True},
    ),
    CardRecipe(
        12,
        "train",
        "sd1",
        "train fine-tune",
        "runs/tuned",
        "2,000 steps of 4 samples on the weights of cross-attention alone; a whole checkpoint of 4.3 GB",
        CAPTIONED,
        {"weights": ("cross_attention",), "batch": 1, "gradient_accumulation": 4, "checkpointing": True},
        dtype="float32",
    ),
    CardRecipe(24, "draw", "sdxl", "generate", "astronauts.png", "four pictures of 1024 x 1024 on a sheet", (PROMPT,), {"batch": 4}),
    CardRecipe(
        24,
        "teach",
        "sdxl",
        "train lora",
        "runs/cat-lora-xl",
        "1,500 steps of 4 samples at rank 16",
        (*CAT, "sks"),
        {"batch": 4, "rank": 16, "checkpointing": True},
    ),
    CardRecipe(
        24,
        "train",
        "sd1",
        "train fine-tune",
        "runs/tuned",
        "2,000 steps of 4 samples on the whole U-Net; a whole checkpoint of 4.3 GB",
        CAPTIONED,
        {"batch": 2, "gradient_accumulation": 2, "checkpointing": True},
        dtype="float32",
    ),
    CardRecipe(
        24,
        "train",
        "sdxl",
        "train custom-diffusion",
        "runs/cat-custom-xl",
        "250 steps of 8 samples on keys and values of cross-attention: 341 million numbers",
        (*CAT, "<cat>", "--class-images", "class-pictures"),
        {"prior": "folder", "batch": 1, "gradient_accumulation": 8, "checkpointing": True},
    ),
)


def format_recipes(memory: Sequence[int]) -> str:
    """Format the section of README.md: for each card its commands, then a table of what they take. memory: bytes of each recipe."""
    cards = dict.fromkeys(recipe.card for recipe in RECIPES)
    return "\n\n".join(_format_card(card, [pair for pair in zip(RECIPES, memory, strict=True) if pair[0].card == card]) for card in cards)


def _format_card(card: int, pairs: Sequence[tuple[CardRecipe, int]]) -> str:
    commands = [f"# {recipe.title}\n{shlex.join(recipe.words())}" for recipe, _ in pairs]
    rows = [(recipe.title, format_bytes(count), recipe.expect) for recipe, count in pairs]
    table = markdown_table(("", "memory, computed", "what to expect"), rows)
    return "\n".join([f"### {card} GB\n\n```bash", *commands, f"```\n\n{table}"])


def compute_memory() -> Iterator[int]:
    """Yield the bytes of each recipe, and print each as it is known: all of them take minutes."""
    for recipe in RECIPES:
        count = recipe.memory()
        print(f"{recipe.card} GB, {recipe.title}: {format_bytes(count)}", file=sys.stderr, flush=True)
        yield count


if __name__ == "__main__":
    section = format_recipes(list(compute_memory()))
    if sys.argv[1:]:
        readme = Path(sys.argv[1])
        write_text(readme, renew_tables(readme.read_text(encoding="utf-8"), {"recipes": section}))
    else:
        print(section)
