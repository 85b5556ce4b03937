"""Textual Inversion: a new word alone, learned from captions around it, "a photo of a <cat>"; the model is unchanged (Gal et al. 2023).

Left out: the pull of learned words towards the vocabulary's norm, which some programs add.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from minidiff.trainers.engine.settings import Settings
from minidiff.trainers.methods.method import Method
from minidiff.trainers.methods.options import Concept, Family, PhaseOptions, Prior, TemplateSet

if TYPE_CHECKING:
    from minidiff.adapters.tokens import NewTokens
    from minidiff.pipeline import StableDiffusion
    from minidiff.trainers.data.cache import Cache
    from minidiff.trainers.methods.finetune_task import FinetuneTask, Subject, TrainingRun


@dataclass(frozen=True, kw_only=True)
class TextualInversionOptions(PhaseOptions):
    """The new word, and the templates that it is shown in.

    Args:
        vectors: how many vectors a word has
        start: the word that it starts from; the class word by default, random without one
        kind: templates around the word for an object, or for a style
        template_set: templates of photographs, or of the bundled model's scenes
    """

    # No options here: there is nothing that the model could forget, and templates take the place of a prompt.
    prior: ClassVar[Prior] = Prior()  # type: ignore[override]
    prompt: ClassVar[str] = "{}"  # type: ignore[override]
    kind: Literal["object", "style"] = "object"
    template_set: TemplateSet = "photo"
    vectors: int = 1
    start: str | None = None


# the authors' program, for batches of 4 to 8
STABLE_DIFFUSION = TextualInversionOptions(settings=Settings(steps=5000, batch=4, learning_rate=5e-3))
PRESETS: dict[Family, TextualInversionOptions] = {
    "sd1": STABLE_DIFFUSION,
    "sd2": STABLE_DIFFUSION,
    # diffusers' examples/textual_inversion/README_sdxl.md: 5e-4 times its batch of 4; there the first encoder's vector alone learns
    "sdxl": TextualInversionOptions(settings=Settings(steps=500, batch=4, learning_rate=2e-3)),
    # tried on five held-out subjects in five pictures each, with 200 steps (minidiff evaluate study)
    "bundled": TextualInversionOptions(settings=Settings(steps=400, batch=4, learning_rate=2e-2), template_set="scenes", vectors=4),
}


def build(
    sd: "StableDiffusion", concepts: Sequence[Concept], options: TextualInversionOptions, cache: "Cache | None" = None
) -> "TrainingRun":
    """Put together the training of new words; the result is .tokens.

    Args:
        sd: the model; its own weights stay as they are
        concepts: what is learned
        options: numbers of the method
        cache: of latents and contexts; None keeps them in memory
    """
    from minidiff.trainers.methods.common import make_subjects
    from minidiff.trainers.methods.finetune_task import TrainingRun

    tokens = make_tokens(sd, concepts, options)
    subjects = make_subjects(sd, concepts, options, cache, templates=templates_of(options))
    return TrainingRun((token_phase(sd, tokens, subjects, options, cache),), tokens=tokens)


def make_tokens(sd: "StableDiffusion", concepts: Sequence[Concept], options: TextualInversionOptions) -> "NewTokens":
    """Create a new word for each concept: from the options' start, its class word, or at random."""
    import torch

    from minidiff.adapters.tokens import create_tokens
    from minidiff.trainers.methods.common import concept_tokens

    for concept in concepts:
        if not concept.token:
            raise ValueError(f"{concept.images}: no token; give the new word, such as <cat>")
    start = {concept.token: options.start or concept.class_word or None for concept in concepts}
    generator = torch.Generator().manual_seed(options.settings.seed)
    return create_tokens(sd, dict.fromkeys(concept_tokens(concepts), options.vectors), start, generator)


def templates_of(options: TextualInversionOptions) -> tuple[str, ...]:
    """Return the captions with a hole that the options ask for."""
    from minidiff.trainers.data.templates import OBJECT, SCENE_STYLE, STYLE, scene_templates

    photo, scenes = {"object": OBJECT, "style": STYLE}, {"object": scene_templates(), "style": SCENE_STYLE}
    return {"photo": photo, "scenes": scenes}[options.template_set][options.kind]


def token_phase(
    sd: "StableDiffusion", tokens: "NewTokens", subjects: "Sequence[Subject]", options: TextualInversionOptions, cache: "Cache | None"
) -> "FinetuneTask":
    """Put together the phase that trains new words.

    Args:
        sd: the model
        tokens: the new words
        subjects: what they stand for
        options: numbers of the method
        cache: of latents; None keeps them in memory
    """
    from minidiff.trainers.methods.finetune_task import FinetuneTask, Group

    groups = [Group(tuple(tokens.vectors))]
    return FinetuneTask(sd, "tokens", subjects, options, modules={"tokens": tokens}, adapters=[tokens], groups=groups, cache=cache)


METHOD = Method(
    summary="Train Textual Inversion: a new word alone; the model is unchanged, and the file has a few kilobytes.",
    presets=PRESETS,
    example='--images cat-pictures --token "<cat>" --class-word cat',
    build=build,
    formats={"diffusers": "the names of diffusers", "a1111": "those of the web interfaces, one file per word"},
)
