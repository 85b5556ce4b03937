"""Folders of small pictures to learn from, and options that take no time, for the tests of personalising."""

from pathlib import Path

import numpy as np
from PIL import Image

from minidiff.trainers.engine.settings import Settings
from minidiff.trainers.methods import custom_diffusion, dreambooth, fine_tune, lora, pivotal, textual_inversion
from minidiff.trainers.methods.custom_diffusion import CustomDiffusionOptions
from minidiff.trainers.methods.dreambooth import DreamBoothOptions
from minidiff.trainers.methods.fine_tune import FineTuneOptions
from minidiff.trainers.methods.lora import LoRAOptions
from minidiff.trainers.methods.options import Concept, LowRankOptions, Prior
from minidiff.trainers.methods.pivotal import PivotalOptions
from minidiff.trainers.methods.textual_inversion import TextualInversionOptions

FOLDER = Prior(kind="folder")


def picture_folder(folder: Path, count=3, seed=0, size=32, captions=()) -> Path:
    """`count` coloured pictures with a brighter square in each; NAME.txt beside the first ones, as far as there are captions."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        picture = np.broadcast_to(rng.integers(0, 200, 3, dtype=np.uint8), (size, size, 3)).copy()
        picture[size // 4 : size // 2, size // 4 : size // 2] += 50
        Image.fromarray(picture).save(folder / f"{i}.png")
        if captions:
            (folder / f"{i}.txt").write_text(captions[i % len(captions)])
    return folder


def small_concept(folder: Path, name="a", token="<cat>", class_word="cat", **words) -> Concept:
    """Three pictures, and two of the class."""
    seed = sum(name.encode())
    images, class_images = picture_folder(folder / name, seed=seed), picture_folder(folder / f"{name}-class", count=2, seed=seed + 1)
    return Concept(**{"images": images, "token": token, "class_word": class_word, "class_images": class_images} | words)


def quick(**changes) -> Settings:
    return Settings(**{"steps": 3, "batch": 2, "learning_rate": 1e-2, "save_every": 1} | changes)


def small_methods() -> dict:
    """Each method with a prior where it may have one: {name: (build, options, the concept's token)}."""
    low = LowRankOptions(rank=2)
    words = TextualInversionOptions(settings=quick(), vectors=2)
    return {
        "lora": (
            lora.build,
            LoRAOptions(settings=quick(), low_rank=LowRankOptions(rank=2, text_encoder=True, text_scale=0.5, dropout=0.1)),
            "sks",
        ),
        "dreambooth": (dreambooth.build, DreamBoothOptions(settings=quick(), prior=FOLDER), "sks"),
        "dreambooth, text encoder": (dreambooth.build, DreamBoothOptions(settings=quick(), prior=FOLDER, text_encoder=True), "sks"),
        "dreambooth with LoRA": (dreambooth.build, DreamBoothOptions(settings=quick(), prior=FOLDER, low_rank=low), "sks"),
        "textual inversion": (textual_inversion.build, words, "<cat>"),
        "pivotal": (pivotal.build, PivotalOptions(tokens=words, lora=LoRAOptions(settings=quick(), low_rank=low, prior=FOLDER)), "<cat>"),
        "custom diffusion": (custom_diffusion.build, CustomDiffusionOptions(settings=quick(), prior=FOLDER, start=("ktn", "pll")), "<cat>"),
        "fine-tune": (fine_tune.build, FineTuneOptions(settings=quick(), weights=(r"^unet\.up.*conv_1", r"token_embedding")), "sks"),
    }
