"""Fine-tuning: the model's own weights, all of the U-Net or those of chosen names, on a folder with captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minidiff.trainers.engine.settings import Settings
from minidiff.trainers.methods.method import Method
from minidiff.trainers.methods.options import Concept, DataOptions, Family, PhaseOptions

if TYPE_CHECKING:
    from minidiff.pipeline import StableDiffusion
    from minidiff.trainers.data.cache import Cache
    from minidiff.trainers.methods.finetune_task import TrainingRun


@dataclass(frozen=True, kw_only=True)
class FineTuneOptions(PhaseOptions):
    r"""Which weights learn.

    Args:
        weights: regular expressions searched in names of weights, as "^unet\.up" or cross_attention
        text_scale: the text encoder's share of the learning rate, where its weights are among them
    """

    weights: tuple[str, ...] = (r"^unet\.",)
    text_scale: float = 1.0


# diffusers' text-to-image
STABLE_DIFFUSION = FineTuneOptions(settings=Settings(steps=2000, batch=4, learning_rate=1e-5))
PRESETS: dict[Family, FineTuneOptions] = {
    "sd1": STABLE_DIFFUSION,
    "sd2": STABLE_DIFFUSION,
    # diffusers' examples/text_to_image/README_sdxl.md: batches of 1, gathered four times, a fifth of the captions empty
    "sdxl": FineTuneOptions(settings=Settings(steps=10_000, batch=4, learning_rate=1e-6), data=DataOptions(caption_dropout=0.2)),
    "bundled": FineTuneOptions(settings=Settings(steps=200, batch=4, learning_rate=5e-4)),  # not among the methods of the study
}


def build(sd: "StableDiffusion", concepts: Sequence[Concept], options: FineTuneOptions, cache: "Cache | None" = None) -> "TrainingRun":
    """Put together fine-tuning; the result is sd's own weights.

    Args:
        sd: the model; its own weights are trained
        concepts: what is learned
        options: numbers of the method
        cache: of latents and contexts; None keeps them in memory
    """
    from minidiff.trainers.methods.common import base_weights, make_subjects
    from minidiff.trainers.methods.finetune_task import FinetuneTask, TrainingRun

    modules, groups = base_weights(sd, options.weights, options.text_scale)
    subjects = make_subjects(sd, concepts, options, cache)
    phase = FinetuneTask(sd, "fine-tune", subjects, options, modules=modules, adapters=[], groups=groups, cache=cache)
    return TrainingRun((phase,))


METHOD = Method(
    summary="Fine-tune the model's own weights, all of the U-Net or those of chosen names.",
    presets=PRESETS,
    example='--images cat-pictures --prompt "a cat" --weights cross_attention',
    build=build,
)
