"""DreamBooth: a rare word becomes the subject's name, and pictures of its class keep the model from forgetting (Ruiz et al. 2023).

    subject's pictures  "a photo of a sks dog"  -.
                                                 >- one batch -> U-Net -> loss + weight * loss of the class pictures
    model's own         "a photo of a dog"  -----'

The authors train the whole U-Net, and the text encoder if wanted; with low_rank a LoRA learns instead.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minidiff.trainers.engine.settings import Settings
from minidiff.trainers.methods.lora import FORMATS
from minidiff.trainers.methods.method import Method
from minidiff.trainers.methods.options import Concept, Family, LowRankOptions, PhaseOptions, Prior, YesNo

if TYPE_CHECKING:
    from minidiff.pipeline import StableDiffusion
    from minidiff.trainers.data.cache import Cache
    from minidiff.trainers.methods.finetune_task import TrainingRun


@dataclass(frozen=True, kw_only=True)
class DreamBoothOptions(PhaseOptions):
    """DreamBooth of the whole U-Net, or with low_rank of a LoRA; what of the text encoder learns is then said in low_rank.

    Args:
        text_encoder: train all of the text encoder too
        text_scale: the text encoder's share of the learning rate
    """

    low_rank: LowRankOptions | None = None
    text_encoder: YesNo = False
    text_scale: float = 1.0
    prior: Prior = Prior(kind="generated")

    def __post_init__(self):
        if self.low_rank is not None and self.text_encoder:
            raise ValueError("text_encoder with low_rank: say it in low_rank, whose LoRA then changes the text encoder too")


# diffusers: 5e-6 and 200 to 400 steps for a dog; with the text encoder 2e-6
STABLE_DIFFUSION = DreamBoothOptions(settings=Settings(steps=400, batch=1, learning_rate=5e-6))
# Tried on five held-out subjects in five pictures each, with 200 steps (minidiff evaluate study).
BUNDLED_PRIOR = Prior(kind="generated", count=48, steps=20)
PRESETS: dict[Family, DreamBoothOptions] = {
    "sd1": STABLE_DIFFUSION,
    "sd2": STABLE_DIFFUSION,
    "sdxl": STABLE_DIFFUSION,  # diffusers trains a LoRA only: take --low-rank unless memory is plenty
    "bundled": DreamBoothOptions(settings=Settings(steps=300, batch=4, learning_rate=5e-4), prior=BUNDLED_PRIOR),
}

# diffusers: rank 4, 500 steps
STABLE_DIFFUSION_LORA = DreamBoothOptions(settings=Settings(steps=500, batch=1, learning_rate=5e-4), low_rank=LowRankOptions())
LOW_RANK_PRESETS: dict[Family, DreamBoothOptions] = {
    "sd1": STABLE_DIFFUSION_LORA,
    "sd2": STABLE_DIFFUSION_LORA,
    # diffusers' examples/dreambooth/README_sdxl.md: batches of 1, gathered four times
    "sdxl": DreamBoothOptions(settings=Settings(steps=500, batch=4, learning_rate=1e-4), low_rank=LowRankOptions()),
    "bundled": DreamBoothOptions(
        settings=Settings(steps=300, batch=4, learning_rate=2e-3),
        low_rank=LowRankOptions(rank=8, layers=("conv",)),
        prior=BUNDLED_PRIOR,
    ),
}


def build(sd: "StableDiffusion", concepts: Sequence[Concept], options: DreamBoothOptions, cache: "Cache | None" = None) -> "TrainingRun":
    """Put together DreamBooth; the result is sd's own weights, or .lora with options.low_rank.

    Warns of a name that splits into several tokens, which the model knows too well to forget.

    Args:
        sd: the model; its own weights are trained, or a LoRA on them
        concepts: what is learned
        options: numbers of the method
        cache: of latents and contexts; None keeps them in memory
    """
    from minidiff.trainers.methods.common import base_weights, make_lora, make_subjects
    from minidiff.trainers.methods.finetune_task import FinetuneTask, TrainingRun

    for concept in concepts:
        check_token(sd, concept)
    if options.low_rank is None:
        patterns = (r"^unet\.", r"^text_encoder(_2)?\.") if options.text_encoder else (r"^unet\.",)
        modules, groups = base_weights(sd, patterns, options.text_scale)
        lora = None
    else:
        lora, groups = make_lora(sd, options.low_rank, options.settings.seed)
        modules = {"lora": lora}
    subjects = make_subjects(sd, concepts, options, cache)
    phase = FinetuneTask(sd, "dreambooth", subjects, options, modules=modules, adapters=[lora] if lora else [], groups=groups, cache=cache)
    return TrainingRun((phase,), lora=lora)


def check_token(sd: "StableDiffusion", concept: Concept) -> None:
    """Raise ValueError for a concept without a name; warn of one of several tokens."""
    if not concept.token:
        raise ValueError("DreamBooth needs a token, the subject's name: a rare word of the vocabulary, such as sks")
    pieces = sd.tokenizer.encode(concept.token)
    if len(pieces) != 1:
        shown = ", ".join(repr(sd.tokenizer.decode([i])) for i in pieces)
        warnings.warn(
            f"token {concept.token!r} splits into {len(pieces)} ({shown}): a rare word of one token, such as sks, learns better",
            stacklevel=3,
        )


METHOD = Method(
    summary="Train DreamBooth: a rare word becomes the subject's name; the whole U-Net learns it, or a LoRA with --low-rank.",
    presets=PRESETS,
    build=build,
    formats=FORMATS,
    low_rank_presets=LOW_RANK_PRESETS,
)
