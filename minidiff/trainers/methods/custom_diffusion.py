"""Custom Diffusion: keys and values of cross-attention, and a new word per concept, several concepts at once (Kumari et al. 2023).

subject at several sizes   "very small photo of a <cat> cat"  -.
                                                                >- one batch -> U-Net -> loss, of small pictures inside them only
class pictures with captions near "photo of a cat"  -----------'
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from minidiff.trainers.engine.settings import Settings
from minidiff.trainers.methods.method import Method
from minidiff.trainers.methods.options import Concept, Family, PhaseOptions, Prior, TemplateSet

if TYPE_CHECKING:
    import torch
    from torch import nn

    from minidiff.adapters.custom_diffusion import CustomDiffusion
    from minidiff.adapters.tokens import NewTokens
    from minidiff.pipeline import StableDiffusion
    from minidiff.trainers.data.augment import SizeAugmentation
    from minidiff.trainers.data.cache import Cache
    from minidiff.trainers.methods.finetune_task import TrainingRun


@dataclass(frozen=True, kw_only=True)
class CustomDiffusionOptions(PhaseOptions):
    """What learns, and how the subject is shown.

    Args:
        start: rare words or token numbers that the new words start from, in order; None takes adapters/tokens.py's, () random rows
        token_scale: the words' share of the learning rate
        all_of_attention: queries and outputs of cross-attention too, as the authors do for faces
        sizes: show the subject at several sizes: as in the paper, as in its program, or not (data/augment.py)
        size_phrases: what captions say of these sizes: phrases of photographs, or of the bundled model's scenes
    """

    prior: Prior = Prior(kind="near", min_similarity=0.85)
    start: tuple[str | int, ...] | None = None
    token_scale: float = 1.0
    all_of_attention: bool = False
    sizes: Literal["none", "paper", "code"] = "paper"
    size_phrases: TemplateSet = "photo"
    prompt: str = "photo of a {}"


# the paper: 8e-5 at batch 8, 250 steps a concept, words as fast as weights
STABLE_DIFFUSION = CustomDiffusionOptions(settings=Settings(steps=250, batch=8, learning_rate=8e-5))
PRESETS: dict[Family, CustomDiffusionOptions] = {
    "sd1": STABLE_DIFFUSION,
    "sd2": STABLE_DIFFUSION,
    "sdxl": STABLE_DIFFUSION,  # nobody has published numbers for it
    # Tried on five held-out subjects in five pictures each, with 200 steps (minidiff evaluate study). It shows its pictures in one size:
    # subjects of 64 pixels lose what they are known by when they shrink.
    "bundled": CustomDiffusionOptions(
        settings=Settings(steps=300, batch=4, learning_rate=2e-3),
        token_scale=5.0,
        prior=Prior(kind="scenes", count=100),
        start=("ktn", "pll", "ucd"),
        sizes="none",
        size_phrases="scenes",
        prompt="a photo of a {}",
    ),
}


def build(
    sd: "StableDiffusion",
    concepts: Sequence[Concept],
    options: CustomDiffusionOptions,
    cache: "Cache | None" = None,
    start_from: "CustomDiffusion | None" = None,
) -> "TrainingRun":
    """Put together Custom Diffusion; the result is .custom_diffusion.

    Args:
        sd: the model; its own weights stay as they are
        concepts: what is learned
        options: numbers of the method
        cache: of latents and contexts; None keeps them in memory
        start_from: one that was learned before, to which these concepts are added (the paper's sequential training); it is not changed,
            and its words stay as they are
    """
    import torch

    from minidiff.adapters.custom_diffusion import CustomDiffusion, create_custom_diffusion
    from minidiff.trainers.methods.common import make_subjects
    from minidiff.trainers.methods.finetune_task import FinetuneTask, Group, TrainingRun

    generator = torch.Generator().manual_seed(options.settings.seed)
    before = {} if start_from is None or start_from.tokens is None else start_from.tokens.rows
    tokens = make_rare_tokens(sd, concepts, options.start, generator, before)
    if start_from is None:
        adapter = create_custom_diffusion(sd, "cross_attention" if options.all_of_attention else "keys and values", tokens)
    else:
        adapter = CustomDiffusion(start_from.layers, tokens, start_from.biases).to(sd.device)
    learned = () if tokens is None else tuple(tokens.rows[concept.token] for concept in concepts if concept.token)
    groups = [Group((*adapter.weights, *adapter.bias_vectors)), *([Group(learned, options.token_scale)] if learned else [])]
    subjects = make_subjects(sd, concepts, options, cache, sizes=[size_augmentation(concept, options) for concept in concepts])
    modules = {"custom_diffusion": adapter}
    phase = FinetuneTask(sd, "custom-diffusion", subjects, options, modules=modules, adapters=[adapter], groups=groups, cache=cache)
    return TrainingRun((phase,), custom_diffusion=adapter)


def make_rare_tokens(
    sd: "StableDiffusion",
    concepts: Sequence[Concept],
    start: Sequence[str | int] | None,
    generator: "torch.Generator",
    before: "Mapping[str, nn.Parameter]",
) -> "NewTokens | None":
    """Create a new word for each concept that has a token, beside the words learned before; None without any.

    Args:
        sd: the model
        concepts: whose tokens are the new words
        start: words or token numbers to start from, in order; None takes the rare ones, () random rows
        generator: of random rows
        before: rows of words that were learned before
    """
    from minidiff.adapters.tokens import RARE_TOKENS, NewTokens, create_tokens
    from minidiff.trainers.methods.common import concept_tokens

    names = concept_tokens(concepts)
    if again := [name for name in names if name in before]:
        raise ValueError(f"{again[0]} was learned before; choose another token")
    start = RARE_TOKENS if start is None else start
    # Those that the words of before began with are passed over, as long as there are enough.
    first = len(before) if len(start) >= len(before) + len(names) else 0
    if start and len(names) > len(start):
        raise ValueError(f"{len(names)} concepts and {len(start)} words to start from ({', '.join(map(str, start))}); give one a concept")
    rows = {name: p.detach() for name, p in before.items()}
    if names:
        rows |= create_tokens(sd, dict.fromkeys(names, 1), dict(zip(names, start[first:])), generator).rows
    return NewTokens(rows) if rows else None


def size_augmentation(concept: Concept, options: CustomDiffusionOptions) -> "SizeAugmentation | None":
    """Return the augmentation that the options ask for, in phrases that the model knows."""
    from minidiff.trainers.data.augment import CODE_SIZES, PAPER_SIZES, SCENE_SIZES

    if options.sizes == "none":
        return None
    if options.size_phrases == "scenes":
        return replace(SCENE_SIZES, kind=options.sizes, before=concept.subject_phrase or None)
    return {"paper": PAPER_SIZES, "code": CODE_SIZES}[options.sizes]


METHOD = Method(
    summary="Train Custom Diffusion: keys and values of cross-attention and a new word; several concepts jointly, or one after the other.",
    presets=PRESETS,
    example='--images cat-pictures --token "<cat>" --class-word cat',
    build=build,
    formats={"minidiff": "one safe file", "diffusers": "a folder", "original": "the authors' delta.bin"},
    start_from="custom_diffusion",
)
