"""What the training methods share: their subjects (which words go with which pictures), class pictures, and what is trained.

    concept's pictures -> captions, or templates around its token -.
                                                                    >- Subject (finetune_task.py)
    prior's pictures -> class caption, or their own captions -------'

All that is wrong with what was asked for is found here, before training: ValueError. Several concepts are learned jointly.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import nn

from minidiff.adapters.layers import PARTS, choose
from minidiff.adapters.lora import PATTERNS, LoRA, create_lora
from minidiff.pipeline import StableDiffusion
from minidiff.tokenizer import Tokenizer
from minidiff.trainers.data.augment import SizeAugmentation
from minidiff.trainers.data.cache import Cache, Pictures
from minidiff.trainers.data.folder import Example, check_distinct, read_folder
from minidiff.trainers.data.templates import fill_in
from minidiff.trainers.methods.finetune_task import Group, Subject
from minidiff.trainers.methods.options import Concept, LowRankOptions, PhaseOptions
from minidiff.trainers.methods.prior_preservation import prior_examples

# --- what is trained --------------------------------------------------------------------------------------------------


def make_lora(sd: StableDiffusion, options: LowRankOptions, seed: int) -> tuple[LoRA, list[Group]]:
    """Create a LoRA; return it, and its parameters by learning rate."""
    patterns = tuple(pattern for name in options.layers for pattern in PATTERNS.get(name, (name,)))
    patterns += PATTERNS["text_encoder"] if options.text_encoder else ()
    adapter = create_lora(
        sd,
        patterns,
        rank=options.rank,
        alpha=options.rank if options.alpha is None else options.alpha,
        init=options.init,
        dropout=options.dropout,
        generator=torch.Generator().manual_seed(seed),
    )
    return adapter, param_groups(
        {f"{layer}.{half}": p for layer, low in adapter.layers.items() for half, p in low.named_parameters()}, options.text_scale
    )


def base_weights(sd: StableDiffusion, patterns: tuple[str, ...], text_scale: float) -> tuple[dict[str, nn.Module], list[Group]]:
    """Return the model's parts with their parameters of these names. Raises ValueError if none has them, or one is not float32."""
    parts = {part: sd.parts[part] for part in PARTS if part in sd.parts}
    names = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}
    params = {name: names[name] for name in choose(list(names), patterns)}
    for name, p in params.items():
        if p.dtype != torch.float32:
            raise ValueError(
                f"{name} is {p.dtype}, in which small steps are rounded away; load the model in float32 to train its own weights"
            )
    return {part: module for part, module in parts.items() if any(name.startswith(f"{part}.") for name in params)}, param_groups(
        params, text_scale
    )


def param_groups(params: Mapping[str, nn.Parameter], text_scale: float) -> list[Group]:
    """Split parameters into two groups, the U-Net's and the text encoders', as far as there are such."""
    text = tuple(p for name, p in params.items() if name.startswith("text_encoder"))
    unet = tuple(p for name, p in params.items() if not name.startswith("text_encoder"))
    return [group for group in (Group(unet), Group(text, text_scale)) if group.params]


def concept_tokens(concepts: Sequence[Concept]) -> list[str]:
    """Return the concepts' tokens. Raises ValueError for one that is given twice."""
    names = [concept.token for concept in concepts if concept.token]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"token {name!r} is given for two concepts; each needs its own")
    return names


# --- which words go with which pictures -------------------------------------------------------------------------------


def make_subjects(
    sd: StableDiffusion,
    concepts: Sequence[Concept],
    options: PhaseOptions,
    cache: Cache | None,
    *,
    templates: Sequence[str] = (),
    sizes: Sequence[SizeAugmentation | None] = (),
) -> list[Subject]:
    """Make a subject of each concept. Raises ValueError for no concept, and for a folder that is given twice.

    Args:
        concepts: one subject each
        sd, options, cache, templates: as in `make_subject`
        sizes: the augmentation of each concept's sizes; () for none
    """
    if not concepts:
        raise ValueError("no concept to learn; give at least one folder of pictures")
    check_distinct([folder for concept in concepts for folder in (concept.images, concept.class_images) if folder is not None])
    pairs = zip(concepts, sizes or [None] * len(concepts), strict=True)
    return [make_subject(sd, concept, options, cache, templates=templates, sizes=size) for concept, size in pairs]


def make_subject(
    sd: StableDiffusion,
    concept: Concept,
    options: PhaseOptions,
    cache: Cache | None,
    *,
    templates: Sequence[str] = (),
    sizes: SizeAugmentation | None = None,
) -> Subject:
    """Read the concept's pictures with their captions, and its class pictures.

    Args:
        sd: the model
        concept: its captions or its prompt come before the templates, and these before the options' prompt
        options: data, prior and prompt are read
        cache: of latents; None keeps them in memory
        templates: captions with a hole for the token alone; captions and prompts have the class word too, unless there are templates
        sizes: the augmentation of sizes
    """
    phrase = concept.token if templates else concept.subject_phrase
    size = options.data.size or sd.config.image_size
    templates = () if concept.captions or concept.prompt else tuple(fill_in(template, phrase) for template in templates)
    examples = captioned_examples(concept, concept.prompt or options.prompt, phrase, size)
    for caption in templates or [example.caption for example in examples]:
        if concept.token and not names_token(sd.tokenizer, caption, concept.token):
            raise ValueError(f"{concept.images}: the caption {caption!r} does not name {concept.token}; write {{}} where it belongs")
    cache = cache or Cache()
    crop, flip, buckets = options.data.crop, options.data.flip, options.data.buckets
    pictures = Pictures(sd, examples, cache, size=size, crop=crop, flip=flip, sizes=sizes, buckets=buckets)
    class_examples = prior_examples(sd, concept, options, size)
    prior = Pictures(sd, class_examples, cache, size=size, crop=crop, flip=flip, buckets=buckets) if class_examples else None
    return Subject(pictures, templates, prior)


def names_token(tokenizer: Tokenizer, caption: str, token: str) -> bool:
    """Say whether a caption has the token among its words, as the tokenizer splits them: "many tasks" does not name sks."""
    with suppress(ValueError):  # it is a word of the vocabulary, was added before, or is several words
        tokenizer = tokenizer.with_added({token: (-1,)})
    words, own = ([word for word, _ in tokenizer.words(text)] for text in (caption, token))
    return any(words[i : i + len(own)] == own for i in range(len(words)))


def captioned_examples(concept: Concept, prompt: str, phrase: str, size: int) -> list[Example]:
    """Read the concept's pictures with their captions.

    Args:
        concept: its folder; with `captions`, each picture has its own
        prompt: the caption of all pictures otherwise
        phrase: goes into the holes of either
        size: of the model, in pixels

    Raises ValueError for a prompt with a hole and an empty phrase.
    """
    if concept.captions:
        return [Example(example.path, fill_in(example.caption, phrase)) for example in read_folder(concept.images, size=size)]
    if "{}" in prompt and not phrase:
        raise ValueError(
            f"{concept.images}: nothing for the hole of {prompt!r}; give a token or a class word, a prompt of your own, or captions"
        )
    return read_folder(concept.images, size=size, caption=fill_in(prompt, phrase))


# --- class pictures ---------------------------------------------------------------------------------------------------
