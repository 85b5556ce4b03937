"""Pivotal tuning: first a new word, then a LoRA around it while the word stays (Roich et al. 2021, of GANs; cloneofsimo's LoRA program).

phase 1    <cat> -> Textual Inversion
phase 2    <cat>, frozen -> LoRA in the same templates
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from minidiff.trainers.engine.settings import Settings
from minidiff.trainers.methods.lora import FORMATS, LoRAOptions
from minidiff.trainers.methods.method import Method
from minidiff.trainers.methods.options import Concept, Family, LowRankOptions, PhaseOptions
from minidiff.trainers.methods.textual_inversion import TextualInversionOptions, make_tokens, templates_of, token_phase

if TYPE_CHECKING:
    from minidiff.pipeline import StableDiffusion
    from minidiff.trainers.data.cache import Cache
    from minidiff.trainers.methods.finetune_task import TrainingRun


@dataclass(frozen=True, kw_only=True)
class PivotalOptions:
    """The two phases. On the command line a setting is of both, but for these.

    Args:
        token_steps: steps of the new word; --steps are the LoRA's
        token_learning_rate: of the new word; --learning-rate is the LoRA's
    """

    FLAT_NAMES: ClassVar[Mapping[str, str | None]] = {
        "tokens.settings.steps": "token_steps",
        "tokens.settings.learning_rate": "token_learning_rate",
        "tokens.settings.warmup_steps": None,
        "tokens.settings.schedule": None,
    }

    lora: LoRAOptions
    tokens: TextualInversionOptions

    def phases(self) -> tuple[PhaseOptions, ...]:
        """Return the word's phase and the LoRA's."""
        return self.tokens, self.lora


# cloneofsimo's LoRA program
STABLE_DIFFUSION = PivotalOptions(
    tokens=TextualInversionOptions(settings=Settings(steps=1000, batch=4, learning_rate=5e-4)),
    lora=LoRAOptions(
        settings=Settings(steps=1000, batch=4, learning_rate=1e-4, schedule="linear"),
        low_rank=LowRankOptions(text_encoder=True, text_scale=0.1),
    ),
)
PRESETS: dict[Family, PivotalOptions] = {
    "sd1": STABLE_DIFFUSION,
    "sd2": STABLE_DIFFUSION,
    # The same program, which had no other numbers for it. Replicate's trainer of SDXL (cog-sdxl, train.py) is no model for two phases: it
    # trains words of two vectors (3e-4) and a LoRA of rank 32 (1e-4) together, 1000 steps in batches of 4.
    "sdxl": STABLE_DIFFUSION,
    # tried on five held-out subjects in five pictures each, with 200 steps (minidiff evaluate study)
    "bundled": PivotalOptions(
        tokens=TextualInversionOptions(settings=Settings(steps=150, batch=4, learning_rate=2e-2), template_set="scenes", vectors=2),
        lora=LoRAOptions(
            settings=Settings(steps=200, batch=4, learning_rate=2e-3), low_rank=LowRankOptions(rank=8, layers=("transformer",))
        ),
    ),
}


def build(sd: "StableDiffusion", concepts: Sequence[Concept], options: PivotalOptions, cache: "Cache | None" = None) -> "TrainingRun":
    """Put together both phases; the result is .tokens and .lora, to be used together.

    Args:
        sd: the model; its own weights stay as they are
        concepts: what is learned
        options: numbers of the method
        cache: of latents and contexts; None keeps them in memory
    """
    from minidiff.trainers.methods.common import make_lora, make_subjects
    from minidiff.trainers.methods.finetune_task import FinetuneTask, TrainingRun

    tokens = make_tokens(sd, concepts, options.tokens)
    adapter, groups = make_lora(sd, options.lora.low_rank, options.lora.settings.seed)
    templates, adapters = templates_of(options.tokens), [tokens, adapter]
    first = make_subjects(sd, concepts, options.tokens, cache, templates=templates)
    second = make_subjects(sd, concepts, options.lora, cache, templates=templates)
    phase = FinetuneTask(sd, "lora", second, options.lora, modules={"lora": adapter}, adapters=adapters, groups=groups, cache=cache)
    return TrainingRun((token_phase(sd, tokens, first, options.tokens, cache), phase), lora=adapter, tokens=tokens)


METHOD = Method(
    summary="Train pivotal tuning: first a new word, then a LoRA around it; two files, to be used together.",
    presets=PRESETS,
    example='--images cat-pictures --token "<cat>" --class-word cat',
    build=build,
    formats=FORMATS,
)
