"""LoRA: low-rank changes beside chosen layers, from pictures with one caption for all or one for each (Hu et al. 2021).

training = build(sd, [Concept(images=Path("tiger"), token="sks", class_word="lion")], PRESETS["bundled"])
for phase, step in training.run(device, folder): ...
training.lora.attach(sd)
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from minidiff.trainers.engine.settings import Settings
from minidiff.trainers.methods.method import Method
from minidiff.trainers.methods.options import Concept, Family, LowRankOptions, PhaseOptions

if TYPE_CHECKING:
    from minidiff.pipeline import StableDiffusion
    from minidiff.trainers.data.cache import Cache
    from minidiff.trainers.methods.finetune_task import TrainingRun


@dataclass(frozen=True, kw_only=True)
class LoRAOptions(PhaseOptions):
    """A LoRA on a folder with captions."""

    low_rank: LowRankOptions = LowRankOptions()


# diffusers' text-to-image LoRA
STABLE_DIFFUSION = LoRAOptions(settings=Settings(steps=1500, batch=4, learning_rate=1e-4, schedule="cosine"))
PRESETS: dict[Family, LoRAOptions] = {
    "sd1": STABLE_DIFFUSION,
    "sd2": STABLE_DIFFUSION,
    # diffusers' examples/text_to_image/README_sdxl.md: constant, batches of 1, two epochs of its pictures; kohya's
    # docs/sdxl_train_network.md has the same rate, at rank 32 and alpha 16
    "sdxl": LoRAOptions(settings=Settings(steps=1500, batch=1, learning_rate=1e-4)),
    # tried on five held-out subjects in five pictures each, with 200 steps (minidiff evaluate study)
    "bundled": LoRAOptions(
        settings=Settings(steps=300, batch=4, learning_rate=2e-3), low_rank=LowRankOptions(rank=8, layers=("transformer",))
    ),
}


def build(sd: "StableDiffusion", concepts: Sequence[Concept], options: LoRAOptions, cache: "Cache | None" = None) -> "TrainingRun":
    """Put together the training of a LoRA; the result is .lora.

    Args:
        sd: the model; its own weights stay as they are
        concepts: what is learned
        options: numbers of the method
        cache: of latents and contexts; None keeps them in memory
    """
    from minidiff.trainers.methods.common import make_lora, make_subjects
    from minidiff.trainers.methods.finetune_task import FinetuneTask, TrainingRun

    adapter, groups = make_lora(sd, options.low_rank, options.settings.seed)
    subjects = make_subjects(sd, concepts, options, cache)
    phase = FinetuneTask(sd, "lora", subjects, options, modules={"lora": adapter}, adapters=[adapter], groups=groups, cache=cache)
    return TrainingRun((phase,), lora=adapter)


FORMATS = {"kohya": "the names that the web interfaces read, and diffusers too", "diffusers": "those of diffusers alone"}
METHOD = Method(
    summary="Train a LoRA: small changes beside chosen layers, from a folder of pictures with one caption for all or one for each.",
    presets=PRESETS,
    build=build,
    formats=FORMATS,
)
