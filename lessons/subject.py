"""A subject that the bundled model was never shown, and the judge that tells how well a model draws it.

tiger = Subject.load("tiger", class_word="lion", lesson=lesson, size=sd.config.image_size)
tiger.concept                  # five pictures with a name, as training methods take them
tiger.draw(sd, prompts, 10)    # pictures, and what the judge says of them
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lessons.common import Lesson
from minidiff.bundled.judge import Judge
from minidiff.evaluation.alignment import image_alignment
from minidiff.pictures import to_pixels
from minidiff.pipeline import StableDiffusion, to_images
from minidiff.scenes.pictures import subject_scenes
from minidiff.trainers.methods.options import Concept
from weights_loader import load_judge


@dataclass(frozen=True)
class Verdict:
    """What the judge says of pictures: their mean likeness to the subject's own, and in how many of them it sees the subject."""

    likeness: float
    seen: int
    pictures: int
    name: str

    def __str__(self) -> str:
        return f"likeness {self.likeness:.2f}, {self.seen} of {self.pictures} {self.name}s"


@dataclass(frozen=True)
class Subject:
    """Five pictures of a subject, a concept for training, and a judge. pixels: [5, 3, H, W] in [-1, 1]."""

    name: str
    pixels: Tensor
    concept: Concept
    judge: Judge
    folder: TemporaryDirectory

    @classmethod
    def load(cls, name: str, *, class_word: str, lesson: Lesson, size: int) -> "Subject":
        """Compose five pictures of the subject, size x size pixels, and load the judge onto the lesson's device."""
        scenes = subject_scenes(name, "fluent", 5, np.random.default_rng(0))
        pixels = F.interpolate(to_pixels(np.stack([scene.image for scene in scenes])), (size, size))
        folder = TemporaryDirectory()
        for i, image in enumerate(to_images(pixels)):
            image.save(Path(folder.name) / f"{i}.png")
        concept = Concept(images=Path(folder.name), token="sks", class_word=class_word)
        return cls(name, pixels, concept, load_judge(device=lesson.device), folder)

    @torch.no_grad()
    def verdict(self, pixels: Tensor) -> Verdict:
        """Judge pictures [B, 3, H, W] in [-1, 1]."""
        reading = self._read(pixels)
        seen = reading.shares().argmax(dim=1) == self.judge.config.subjects.index(self.name)
        likeness = image_alignment(reading.features, self._read(self.pixels).features).mean()
        return Verdict(float(likeness), int(seen.sum()), len(seen), self.name)

    def draw(self, model: StableDiffusion, prompts: Sequence[str], steps: int) -> tuple[list[Image.Image], Verdict]:
        """Return one picture for each prompt, seeds 0, 1, ..., and the judge's verdict on them."""
        *_, last = model.denoise(list(prompts), seeds=range(len(prompts)), steps=steps)
        pixels = model.decode(last.x_t)
        return to_images(pixels), self.verdict(pixels)

    def _read(self, pixels: Tensor):
        side = self.judge.config.image_size  # the judge reads pictures of one size only
        device = next(self.judge.parameters()).device
        return self.judge.read(F.interpolate(pixels.to(device), (side, side), mode="area"))
