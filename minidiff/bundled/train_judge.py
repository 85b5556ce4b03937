"""Train the judge (judge.py) on composed scenes, including the held-out subjects: it may know them, the generator may not.

    scene, augmented -> read -> cross-entropies of subject and tint by cell, background, style
             caption -> contrastive loss within the batch

Every scene is new: composing them takes a fifth of a step on a CPU; for a GPU other processes prefetch them. Pictures are blurred or
sharpened, made noisy and shifted slightly in colour, so that the judge looks at the contents and not at how crisply they are drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cache, partial

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from minidiff.bundled.judge import Judge, JudgeConfig, JudgeOutput, contrastive_loss
from minidiff.bundled.tasks import bundled_config
from minidiff.config import TokenizerConfig
from minidiff.pictures import to_pixels
from minidiff.scenes.art import visible_backgrounds
from minidiff.scenes.scenes import COLOURS, STYLES, Item, Scene, choose, compose, sample_scene, subjects
from minidiff.tokenizer import Tokenizer
from minidiff.trainers.engine.loop import randn_per_sample, rng_for, with_seed
from minidiff.trainers.engine.optimizer import optimizers
from minidiff.trainers.engine.prefetch import prefetch
from minidiff.trainers.engine.settings import Settings
from minidiff.transfer import to_device

# 40 minutes on one core that does nothing else.
JUDGE_SETTINGS = Settings(
    steps=3000,
    batch=64,
    learning_rate=4e-3,
    warmup_steps=60,
    schedule="linear_after_hold",
    max_grad_norm=None,
    ema_decay=0.998,
    precision="bfloat16",
)


def judge_config() -> JudgeConfig:
    """Return the config of the judge that ships."""
    bundled = bundled_config()  # the words are the bundled model's, the network is smaller
    text_encoder = replace(bundled.text_encoder, width=64, layers=2, heads=4)
    return JudgeConfig(bundled.tokenizer, text_encoder, tuple(subjects()), tuple(COLOURS), STYLES, image_size=bundled.image_size)


@dataclass(frozen=True, eq=False)
class Labels:
    """What is in a batch of scenes.

    cover: the share of a cell under the first and the second object, 0..1 (there may be no second one).
    subject, tint: of these two, as indices into the judge's labels.
    """

    cover: Float[Tensor, "B 2 h w"]
    subject: Int[Tensor, "B 2"]
    tint: Int[Tensor, "B 2"]
    background: Int[Tensor, " B"]
    style: Int[Tensor, " B"]

    def to(self, device: torch.device) -> "Labels":
        """Move all labels to a device."""
        return Labels(*(to_device(device, getattr(self, field.name)) for field in fields(self)))


def make_labels(scenes: Sequence[Scene], config: JudgeConfig) -> Labels:
    """Return the labels, which the scenes' composer knows."""
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


def judge_loss(reading: JudgeOutput, labels: Labels) -> Float[Tensor, ""]:
    """Return the sum of cross-entropies, each a mean over pictures: subject by cell, tint by covered cell, background, style."""
    first = torch.arange(len(labels.subject), device=labels.subject.device)[:, None]
    of_subject = reading.subjects[first, labels.subject]  # [B, 2, h, w]
    empty = 1 - labels.cover.sum(dim=1)
    subject = -((labels.cover * of_subject).sum(dim=1) + empty * reading.subjects[:, -1]).mean()
    tint = -(labels.cover * reading.tints[first, labels.tint]).sum() / labels.cover.sum()
    background = F.nll_loss(reading.backgrounds, labels.background)
    return subject + tint + background + F.nll_loss(reading.styles, labels.style)


def augment(pixels: Float[Tensor, "B 3 H W"], rngs: Sequence[np.random.Generator]) -> Float[Tensor, "B 3 H W"]:
    """Blur or sharpen each picture, shift its colours slightly, and add noise; in [-1, 1]."""
    drawn = [(rng.uniform(-0.5, 1), rng.normal(1, 0.06, 3), rng.normal(0, 0.04, 3), rng.uniform(0, 0.1)) for rng in rngs]
    blur, gain, offset, level = (torch.from_numpy(np.array(part)).to(pixels) for part in zip(*drawn))
    noise = level[:, None, None, None] * randn_per_sample(rngs, pixels.shape[1:]).to(pixels)
    blurred = pixels
    for _ in range(2):  # two boxes of 3 pixels: nearly a Gaussian of 1.2
        blurred = F.avg_pool2d(blurred, 3, stride=1, padding=1, count_include_pad=False)
    pixels = pixels + blur[:, None, None, None] * (blurred - pixels)
    return (pixels * gain[..., None, None] + offset[..., None, None] + noise).clamp(-1, 1)


def judge_scene(rng: np.random.Generator) -> Scene:
    """Compose a scene of any subjects. In every second one all are tinted, or the judge would know most things by their colours alone."""
    scene = sample_scene(rng, split="all_subjects")
    return retint(scene, rng) if rng.random() < 0.5 else scene


def retint(scene: Scene, rng: np.random.Generator) -> Scene:
    """Compose the same things in the same places, each in a colour that stands out from the background."""
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
    """The judge's training from scratch.

    The contrastive loss compares the samples of one call, so gradient accumulation and several processes make it easier.
    """

    def __init__(self, config: JudgeConfig, seed: int, device: torch.device):
        self.seed, self.device = seed, device
        with with_seed(seed):
            self.judge = Judge(config).to(device)
        self.modules: dict[str, nn.Module] = {"judge": self.judge}
        self.networks = (self.judge.pictures, self.judge.texts)
        self.draws = prefetch(partial(judge_draws, config, seed), device)

    def optimizers(self, settings: Settings) -> tuple[torch.optim.Optimizer, ...]:
        """Create the optimizers of the judge's weights."""
        return optimizers([self.judge], settings.learning_rate)

    def loss(self, step: int, sample_ids: range) -> Float[Tensor, ""]:
        """Return the classification losses plus the contrastive loss of pictures and captions."""
        pixels, tokens, labels = self.draws(step, sample_ids)
        reading = self.judge.read(to_device(self.device, pixels))
        texts = self.judge.encode_tokens(to_device(self.device, tokens))
        labels = labels.to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            return judge_loss(reading, labels) + contrastive_loss(reading.features, texts, self.judge.log_scale)


def judge_draws(
    config: JudgeConfig, seed: int, step: int, sample_ids: range
) -> tuple[Float[Tensor, "B 3 H W"], Int[Tensor, "B L"], Labels]:
    """Compose augmented scenes, with the tokens of their captions and their labels.

    Args:
        config: Of the judge.
        seed: Of the run.
        step: Number of the step.
        sample_ids: Numbers of its samples.
    """
    rngs = [rng_for(seed, step, sample) for sample in sample_ids]
    scenes = [judge_scene(rng) for rng in rngs]
    pixels = augment(to_pixels(np.stack([scene.image for scene in scenes])), rngs)
    return pixels, get_tokenizer(config.tokenizer)([scene.caption for scene in scenes]), make_labels(scenes, config)


@cache
def get_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """Return the tokenizer, made once in each process."""
    return Tokenizer(config)
