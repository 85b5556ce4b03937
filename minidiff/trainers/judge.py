"""Trains the judge (minidiff/evaluation/clip.py) on composed scenes, held-out subjects included: it may know them, the generator may not.

    scene, lightly spoilt -> read -> cross-entropies of subject and tint by cell, background, style
                        caption  -> contrastive loss within the batch

Every scene is new: on a CPU composing them takes a fifth of a step, for a GPU other processes do it ahead. Pictures are blurred or
sharpened, made noisy and their colours moved a little, so that the judge looks at what stands there and not at how crisply it was drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minidiff.config import TokenizerConfig
from minidiff.evaluation.clip import Judge, JudgeConfig, Reading, contrastive_loss
from minidiff.scenes.scenes import COLOURS, STYLES, Item, Scene, choose, compose, sample_scene, subjects, visible_backgrounds
from minidiff.tokenizer import Tokenizer
from minidiff.trainers.ahead import ahead
from minidiff.trainers.from_scratch import bundled_config, pixels_of
from minidiff.trainers.loop import normals, on, rng_for, seeded
from minidiff.trainers.optimizer import optimizers
from minidiff.trainers.recipe import Settings

# 40 minutes on one core that does nothing else.
JUDGE_SETTINGS = Settings(
    steps=3000, batch=64, learning_rate=4e-3, warm_up=60, schedule="flat_then_linear", clip=None, average=0.998, precision="bfloat16"
)


def judge_config() -> JudgeConfig:
    """The numbers of the judge that ships."""
    bundled = bundled_config()  # the words are the bundled model's, the network is smaller
    text_encoder = replace(bundled.text_encoder, width=64, layers=2, heads=4)
    return JudgeConfig(bundled.tokenizer, text_encoder, tuple(subjects()), tuple(COLOURS), STYLES, image_size=bundled.image_size)


@dataclass(frozen=True, eq=False)
class Labels:
    """What is in a batch of scenes. cover: the share of a cell under the first and the second object, 0..1 (the second may not be there);
    subject, tint: of these two, as numbers of the judge's labels."""

    cover: Float[Tensor, "B 2 h w"]
    subject: Int[Tensor, "B 2"]
    tint: Int[Tensor, "B 2"]
    background: Int[Tensor, " B"]
    style: Int[Tensor, " B"]

    def to(self, device: torch.device) -> "Labels":
        return Labels(*(on(device, getattr(self, field.name)) for field in fields(self)))


def labels_of(scenes: Sequence[Scene], config: JudgeConfig) -> Labels:
    """The labels that the composer knows."""
    masks = np.zeros((len(scenes), 2, config.image_size, config.image_size), np.float32)
    subject, tint = np.zeros((2, len(scenes), 2), np.int64)
    for i, scene in enumerate(scenes):
        for k, thing in enumerate(scene.objects):
            masks[i, k] = thing.mask
            subject[i, k] = config.subjects.index(thing.subject)
            tint[i, k] = len(config.colours) if thing.colour is None else config.colours.index(thing.colour)
    return Labels(
        F.adaptive_avg_pool2d(torch.from_numpy(masks), config.cells),
        torch.from_numpy(subject),
        torch.from_numpy(tint),
        torch.tensor([config.colours.index(scene.background) for scene in scenes]),
        torch.tensor([config.styles.index(scene.style) for scene in scenes]),
    )


def reading_loss(reading: Reading, labels: Labels) -> Float[Tensor, ""]:
    """Cross-entropies, each a mean over pictures: subject by cell, tint by cell that is covered, background, style."""
    first = torch.arange(len(labels.subject), device=labels.subject.device)[:, None]
    of_subject = reading.subjects[first, labels.subject]  # [B, 2, h, w]
    empty = 1 - labels.cover.sum(dim=1)
    subject = -((labels.cover * of_subject).sum(dim=1) + empty * reading.subjects[:, -1]).mean()
    tint = -(labels.cover * reading.tints[first, labels.tint]).sum() / labels.cover.sum()
    background = F.nll_loss(reading.backgrounds, labels.background)
    return subject + tint + background + F.nll_loss(reading.styles, labels.style)


def augmented(pixels: Float[Tensor, "B 3 H W"], rngs: Sequence[np.random.Generator]) -> Float[Tensor, "B 3 H W"]:
    """Each picture blurred or sharpened, its colours moved a little, and noise on it; in [-1, 1]."""
    drawn = [(rng.uniform(-0.5, 1), rng.normal(1, 0.06, 3), rng.normal(0, 0.04, 3), rng.uniform(0, 0.1)) for rng in rngs]
    blur, gain, offset, level = (torch.from_numpy(np.array(part)).to(pixels) for part in zip(*drawn))
    noise = level[:, None, None, None] * normals(rngs, pixels.shape[1:]).to(pixels)
    blurred = pixels
    for _ in range(2):  # two boxes of 3 pixels: nearly a Gaussian of 1.2
        blurred = F.avg_pool2d(blurred, 3, stride=1, padding=1, count_include_pad=False)
    pixels = pixels + blur[:, None, None, None] * (blurred - pixels)
    return (pixels * gain[..., None, None] + offset[..., None, None] + noise).clamp(-1, 1)


def judge_scene(rng: np.random.Generator) -> Scene:
    """A scene of any subjects; in every second one all of them are tinted, or the judge would know most things by their colours alone."""
    scene = sample_scene(rng, split="all_subjects")
    return retinted(scene, rng) if rng.random() < 0.5 else scene


def retinted(scene: Scene, rng: np.random.Generator) -> Scene:
    """The same things in the same places, each in a colour that stands out from the background."""
    items = []
    for thing in scene.objects:
        x0, y0, x1, y1 = thing.box
        colours = [colour for colour in COLOURS if scene.background in visible_backgrounds(thing.subject, scene.style, colour)]
        items.append(Item(thing.subject, max(x1 - x0, y1 - y0), ((x0 + x1) / 2, (y0 + y1) / 2), choose(rng, colours), thing.size))
    return compose(
        items,
        background=scene.background,
        style=scene.style,
        relation=scene.relation,
        name_style=rng.random() < 0.6,
        shade=rng.normal(0, 5, 3).tolist(),
        gradient=float(rng.uniform(-0.12, 0.12)),
    )


class JudgeTask:
    """A judge from nothing, as the loop trains it.

    The contrastive loss compares the samples of one call with each other: accumulation and several processes make it an easier one.
    """

    def __init__(self, config: JudgeConfig, seed: int, device: torch.device):
        self.seed, self.device = seed, device
        with seeded(seed):
            self.judge = Judge(config).to(device)
        self.modules: dict[str, nn.Module] = {"judge": self.judge}
        self.networks = (self.judge.pictures, self.judge.texts)
        self.draws = ahead(partial(judge_draws, config, seed), device)

    def optimizers(self, settings: Settings) -> tuple[torch.optim.Optimizer, ...]:
        return optimizers([self.judge], settings.learning_rate)

    def loss(self, step: int, samples: range) -> Float[Tensor, ""]:
        pixels, tokens, labels = self.draws(step, samples)
        reading = self.judge.read(on(self.device, pixels))
        texts = self.judge.encode_tokens(on(self.device, tokens))
        labels = labels.to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            return reading_loss(reading, labels) + contrastive_loss(reading.features, texts, self.judge.log_scale)


def judge_draws(config: JudgeConfig, seed: int, step: int, samples: range) -> tuple[Float[Tensor, "B 3 H W"], Int[Tensor, "B L"], Labels]:
    """By chance: scenes, lightly spoilt, the tokens of their captions, and what is in them."""
    rngs = [rng_for(seed, step, sample) for sample in samples]
    scenes = [judge_scene(rng) for rng in rngs]
    pixels = augmented(pixels_of(np.stack([scene.image for scene in scenes])), rngs)
    return pixels, tokenizer_of(config.tokenizer)([scene.caption for scene in scenes]), labels_of(scenes, config)


@cache
def tokenizer_of(config: TokenizerConfig) -> Tokenizer:
    return Tokenizer(config)
