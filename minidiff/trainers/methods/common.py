"""The methods of personalising, each put together from the same pieces: what is trained, and which words go with which pictures.

    method               trained                                              words                    prior pictures
    lora                 low-rank changes of chosen layers                    captions                 if wanted
    dreambooth           the U-Net, or a LoRA; the text encoder if wanted     "a photo of a sks dog"   the model's own of "a photo of a dog"
    textual_inversion    rows of new words                                    templates around <cat>   none
    pivotal              rows of new words, then a LoRA while they stay       templates around <cat>   if wanted
    custom_diffusion     keys, values of cross-attention, and new words       "photo of a <cat> cat"   real ones with captions nearby
    fine_tune            chosen weights of the model                          captions                 if wanted

    method = dreambooth(sd, [Concept(images=Path("dog"), token="sks", class_word="dog", ...)], preset("dreambooth", "sd1"))
    for phase, step in method.run(device, folder): ...

All that is wrong with what was asked for is found here, before training: ValueError. Adapters stay outside sd and are its result; dreambooth
without a LoRA and fine_tune train sd's own weights. Several concepts are learned jointly. Papers: Hu et al. 2021 (LoRA), Ruiz et al. 2023
(DreamBooth), Gal et al. 2023 (Textual Inversion), Roich et al. 2021 (pivotal tuning, of GANs), Kumari et al. 2023 (Custom Diffusion).
Left out: the pull of learned words towards the vocabulary's norm, which some programs for pivotal tuning add.
"""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from minidiff.adapters.custom_diffusion import CustomDiffusion, create_custom_diffusion
from minidiff.adapters.lora import PATTERNS, LoRA, choose, create_lora
from minidiff.adapters.tokens import RARE_TOKENS, NewTokens, create_tokens
from minidiff.captions import find_caption_sources
from minidiff.pipeline import StableDiffusion
from minidiff.scenes.scenes import with_article
from minidiff.trainers.data.augment import CODE_SIZES, PAPER_SIZES, SCENE_SIZES, SizeAugmentation
from minidiff.trainers.data.cache import Cache, Pictures
from minidiff.trainers.data.folder import Example, check_distinct, read_folder
from minidiff.trainers.data.regularisation import Filled, class_pictures, near_examples, pooled_text, scene_pictures
from minidiff.trainers.data.templates import OBJECT, SCENE_STYLE, STYLE, scene_templates
from minidiff.trainers.engine.loop import Training, TrainStep
from minidiff.trainers.methods.finetuning import Adapter, FinetuneTask, Group, Subject
from minidiff.trainers.methods.options import (
    Concept,
    CustomDiffusionOptions,
    DreamBoothOptions,
    FineTuneOptions,
    LoRAOptions,
    LowRankOptions,
    PivotalOptions,
    Prior,
    Samples,
    TextualInversionOptions,
)


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """The phases of a method, and the adapters that they train; none of these where the model's own weights are trained."""

    phases: tuple[FinetuneTask, ...]
    lora: LoRA | None = None
    tokens: NewTokens | None = None
    custom_diffusion: CustomDiffusion | None = None

    def run(self, device: torch.device, folder: Path | None = None) -> Iterator[tuple[FinetuneTask, TrainStep]]:
        """Trains one phase after the other, a step an iteration, each with its state in folder/NAME.state; averages are put in at the end."""
        for phase in self.phases:
            with phase:
                training = Training(phase, phase.settings, device, folder / f"{phase.name}.state" if folder is not None else None)
                for step in training.run():
                    yield phase, step
                for name, average in training.ema.items():
                    average.copy_to(phase.modules[name])


# --- the methods ------------------------------------------------------------------------------------------------------


def lora(sd: StableDiffusion, concepts: Sequence[Concept], options: LoRAOptions, cache: Cache | None = None) -> TrainingRun:
    """Low-rank changes beside the model's layers; the result is .lora."""
    adapter, groups = new_lora(sd, options.low_rank, options.settings.seed)
    subjects = captioned(sd, concepts, options, cache)
    phase = make_phase(sd, "lora", subjects, options, cache, modules={"lora": adapter}, adapters=[adapter], groups=groups)
    return TrainingRun((phase,), lora=adapter)


def dreambooth(sd: StableDiffusion, concepts: Sequence[Concept], options: DreamBoothOptions, cache: Cache | None = None) -> TrainingRun:
    """A rare word becomes the subject's name. The result is sd, or .lora with options.low_rank.

    Warns of a name that splits into several tokens, which the model knows too well to forget.
    """
    for concept in concepts:
        if not concept.token:
            raise ValueError("DreamBooth needs a token, the subject's name: a rare word of the vocabulary, such as sks")
        pieces = sd.tokenizer.encode(concept.token)
        if len(pieces) != 1:
            shown = ", ".join(repr(sd.tokenizer.decode([i])) for i in pieces)
            warnings.warn(
                f"token {concept.token!r} splits into {len(pieces)} ({shown}): a rare word of one token, such as sks, learns better",
                stacklevel=2,
            )
    if options.low_rank is not None:
        adapter, groups = new_lora(sd, options.low_rank, options.settings.seed)
        modules, adapters = {"lora": adapter}, [adapter]
    else:
        adapter, adapters = None, []
        patterns = (r"^unet\.", r"^text_encoder\.") if options.text_encoder else (r"^unet\.",)
        modules, groups = base_weights(sd, patterns, options.text_scale)
    subjects = captioned(sd, concepts, options, cache)
    phase = make_phase(sd, "dreambooth", subjects, options, cache, modules=modules, adapters=adapters, groups=groups)
    return TrainingRun((phase,), lora=adapter)


def textual_inversion(
    sd: StableDiffusion, concepts: Sequence[Concept], options: TextualInversionOptions, cache: Cache | None = None
) -> TrainingRun:
    """New words alone; the result is .tokens."""
    tokens = words_from_classes(sd, concepts, options)
    subjects = [templated(sd, one, options, cache) for one in distinct(concepts)]
    return TrainingRun((word_phase(sd, tokens, subjects, options, cache),), tokens=tokens)


def pivotal(sd: StableDiffusion, concepts: Sequence[Concept], options: PivotalOptions, cache: Cache | None = None) -> TrainingRun:
    """New words first, then a LoRA around them; the result is .tokens and .lora, to be used together."""
    tokens = words_from_classes(sd, concepts, options.tokens)
    adapter, groups = new_lora(sd, options.lora.low_rank, options.lora.settings.seed)
    first = [templated(sd, one, options.tokens, cache) for one in distinct(concepts)]
    around = replace(options.tokens, samples=options.lora.samples)
    second = [templated(sd, one, around, cache, options.lora.prior, options.lora.prompt) for one in concepts]
    phase = make_phase(sd, "lora", second, options.lora, cache, modules={"lora": adapter}, adapters=[tokens, adapter], groups=groups)
    return TrainingRun((word_phase(sd, tokens, first, options.tokens, cache), phase), lora=adapter, tokens=tokens)


def custom_diffusion(
    sd: StableDiffusion,
    concepts: Sequence[Concept],
    options: CustomDiffusionOptions,
    cache: Cache | None = None,
    start_from: CustomDiffusion | None = None,
) -> TrainingRun:
    """Keys and values of cross-attention and a new word a concept; the result is .custom_diffusion.

    start_from: one that was learned before, to which these concepts are added (the paper's sequential training); it is not changed, its
    words stay as they are.
    """
    generator = torch.Generator().manual_seed(options.settings.seed)
    tokens = rare_words(
        sd, concepts, options.start, generator, {} if start_from is None or start_from.tokens is None else start_from.tokens.rows
    )
    if start_from is None:
        adapter = create_custom_diffusion(sd, "cross_attention" if options.all_of_attention else "keys and values", tokens)
    else:
        adapter = CustomDiffusion(start_from.layers, tokens, start_from.biases).to(sd.device)
    learned = () if tokens is None else tuple(tokens.rows[one.token] for one in concepts if one.token)
    groups = [Group((*adapter.weights, *adapter.bias_vectors)), *([Group(learned, options.token_scale)] if learned else [])]
    subjects = [
        make_subject(sd, one, options.samples, options.prior, options.prompt, cache, sizes=sizes_for(one, options))
        for one in distinct(concepts)
    ]
    modules = {"custom_diffusion": adapter}
    phase = make_phase(sd, "custom-diffusion", subjects, options, cache, modules=modules, adapters=[adapter], groups=groups)
    return TrainingRun((phase,), custom_diffusion=adapter)


def fine_tune(sd: StableDiffusion, concepts: Sequence[Concept], options: FineTuneOptions, cache: Cache | None = None) -> TrainingRun:
    """The model's own weights, or those of chosen names; the result is sd."""
    modules, groups = base_weights(sd, options.weights, options.text_scale)
    subjects = captioned(sd, concepts, options, cache)
    return TrainingRun((make_phase(sd, "fine-tune", subjects, options, cache, modules=modules, adapters=[], groups=groups),))


def make_phase(
    sd: StableDiffusion,
    name: str,
    subjects: Sequence[Subject],
    options: LoRAOptions | DreamBoothOptions | CustomDiffusionOptions | FineTuneOptions,
    cache: Cache | None,
    *,
    modules: dict[str, nn.Module],
    adapters: Sequence[Adapter],
    groups: Sequence[Group],
) -> FinetuneTask:
    """A training with the options' settings, samples and prior."""
    return FinetuneTask(
        sd,
        name,
        subjects,
        modules=modules,
        adapters=adapters,
        groups=groups,
        settings=options.settings,
        samples=options.samples,
        prior_weight=options.prior.weight,
        cache=cache,
    )


# --- what is trained --------------------------------------------------------------------------------------------------


def new_lora(sd: StableDiffusion, options: LowRankOptions, seed: int) -> tuple[LoRA, list[Group]]:
    """A LoRA, and its parameters by learning rate."""
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
    """The model's parts with their parameters of these names. Raises ValueError if none has them, or one is not float32."""
    parts = {"unet": sd.unet, "text_encoder": sd.text_encoder}
    names = {f"{part}.{name}": p for part, module in parts.items() for name, p in module.named_parameters()}
    params = {name: names[name] for name in choose(list(names), patterns)}
    for name, p in params.items():
        if p.dtype != torch.float32:
            raise ValueError(
                f"{name} is {p.dtype}, in which small steps are rounded away; load the model in float32 to train its own weights"
            )
    return {part: module for part, module in parts.items() if any(name.startswith(part) for name in params)}, param_groups(
        params, text_scale
    )


def param_groups(params: Mapping[str, nn.Parameter], text_scale: float) -> list[Group]:
    """Two groups, the U-Net's and the text encoder's, as far as there are such."""
    text = tuple(p for name, p in params.items() if name.startswith("text_encoder."))
    unet = tuple(p for name, p in params.items() if not name.startswith("text_encoder."))
    return [group for group in (Group(unet), Group(text, text_scale)) if group.params]


def words_from_classes(sd: StableDiffusion, concepts: Sequence[Concept], options: TextualInversionOptions) -> NewTokens:
    """A new word for each concept, from the options' start, its class word, or random."""
    for concept in concepts:
        if not concept.token:
            raise ValueError(f"{concept.images}: no token; give the new word, such as <cat>")
    start = {concept.token: options.start or concept.class_word or None for concept in concepts}
    generator = torch.Generator().manual_seed(options.settings.seed)
    return create_tokens(sd, dict.fromkeys(tokens_of(concepts), options.vectors), start, generator)


def rare_words(
    sd: StableDiffusion,
    concepts: Sequence[Concept],
    start: Sequence[str | int] | None,
    generator: torch.Generator,
    before: Mapping[str, nn.Parameter],
) -> NewTokens | None:
    """The words of before, and one for each concept that has a token, from rare ones of the vocabulary or random. None without any."""
    names = tokens_of(concepts)
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


def tokens_of(concepts: Sequence[Concept]) -> list[str]:
    """The concepts' tokens. Raises ValueError for one that is given twice."""
    names = [concept.token for concept in concepts if concept.token]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"token {name!r} is given for two concepts; each needs its own")
    return names


def word_phase(
    sd: StableDiffusion, tokens: NewTokens, subjects: Sequence[Subject], options: TextualInversionOptions, cache: Cache | None
) -> FinetuneTask:
    """The training of new words."""
    return FinetuneTask(
        sd,
        "tokens",
        subjects,
        modules={"tokens": tokens},
        adapters=[tokens],
        groups=[Group(tuple(tokens.vectors))],
        settings=options.settings,
        samples=options.samples,
        cache=cache,
    )


# --- which words go with which pictures -------------------------------------------------------------------------------


def distinct(concepts: Sequence[Concept]) -> Sequence[Concept]:
    """The concepts. Raises ValueError for none, and for a folder that is given twice."""
    if not concepts:
        raise ValueError("no concept to learn; give at least one folder of pictures")
    folders = [folder for concept in concepts for folder in (concept.images, concept.class_images) if folder is not None]
    check_distinct(folders)
    return concepts


def fill_in(template: str, words: str) -> str:
    """The template with the words in its hole: "a {}" and "apple" give "an apple"."""
    return re.sub(r"\ba \{\}", lambda _: with_article(words), template).replace("{}", words)


def captioned(
    sd: StableDiffusion, concepts: Sequence[Concept], options: LoRAOptions | DreamBoothOptions | FineTuneOptions, cache: Cache | None
) -> list[Subject]:
    """Each concept with one caption for all its pictures, or its own captions."""
    return [make_subject(sd, one, options.samples, options.prior, options.prompt, cache) for one in distinct(concepts)]


def make_subject(
    sd: StableDiffusion,
    concept: Concept,
    samples: Samples,
    prior: Prior,
    prompt: str,
    cache: Cache | None,
    *,
    templates: Sequence[str] = (),
    words: str | None = None,
    sizes: SizeAugmentation | None = None,
) -> Subject:
    """The concept's pictures with their captions, and its class pictures. words: for the holes of captions; the concept's own by default."""
    words, size = concept.words if words is None else words, samples.size or sd.config.image_size
    own_prompt = concept.prompt or prompt
    templates = () if concept.captions or concept.prompt else tuple(fill_in(template, words) for template in templates)
    if concept.captions:
        examples = [Example(one.path, fill_in(one.caption, words)) for one in read_folder(concept.images, size=size)]
    elif "{}" in own_prompt and not words:
        raise ValueError(
            f"{concept.images}: nothing for the hole of {own_prompt!r}; give a token or a class word, a prompt of your own, or captions"
        )
    else:
        examples = read_folder(concept.images, size=size, caption=fill_in(own_prompt, words))
    for caption in templates or [example.caption for example in examples]:
        if concept.token not in caption:
            raise ValueError(f"{concept.images}: the caption {caption!r} does not name {concept.token}; write {{}} where it belongs")
    cache = cache or Cache()
    pictures = Pictures(sd, examples, cache, size=size, crop=samples.crop, flip=samples.flip, sizes=sizes)
    class_examples = prior_examples(sd, concept, prior, prompt, size)
    beside = Pictures(sd, class_examples, cache, size=size, crop=samples.crop, flip=samples.flip) if class_examples else None
    return Subject(pictures, templates, beside)


def templated(
    sd: StableDiffusion, concept: Concept, options: TextualInversionOptions, cache: Cache | None, prior: Prior = Prior(), prompt: str = "{}"
) -> Subject:
    """The concept with templates around its token alone, unless it brings captions or a prompt. prompt: of its class pictures."""
    photo = options.words == "photo"
    templates = {"object": OBJECT if photo else scene_templates(), "style": STYLE if photo else SCENE_STYLE}[options.kind]
    return make_subject(sd, concept, options.samples, prior, prompt, cache, templates=templates, words=concept.token)


def sizes_for(concept: Concept, options: CustomDiffusionOptions) -> SizeAugmentation | None:
    """Custom Diffusion's augmentation in the words that the model knows."""
    if options.sizes == "none":
        return None
    if options.words == "scenes":
        return replace(SCENE_SIZES, kind=options.sizes, before=concept.words or None)
    return {"paper": PAPER_SIZES, "code": CODE_SIZES}[options.sizes]


# --- class pictures ---------------------------------------------------------------------------------------------------


def class_caption(concept: Concept, prompt: str) -> str:
    """As "a photo of a dog". Raises ValueError without a class word where one is needed."""
    template = concept.class_prompt or prompt
    if "{}" in template and not concept.class_word:
        raise ValueError(f"{concept.images}: class pictures need a class word, such as dog, for {template!r}; give one, or a class prompt")
    return fill_in(template, concept.class_word)


def fill_class_images(
    sd: StableDiffusion, concept: Concept, prior: Prior, prompt: str, samples: Samples, seed: int = 0
) -> Iterator[Filled]:
    """Fills the concept's folder of class pictures, if the prior is one that does, some pictures an iteration; prompt: the method's own."""
    if prior.kind not in ("generated", "scenes"):
        return
    if concept.class_images is None:
        raise ValueError(f"{concept.images}: no folder for its class pictures; give class_images")
    caption = class_caption(concept, prompt)
    if prior.kind == "scenes":
        yield from scene_pictures(sd, caption, concept.class_images, count=prior.count, seed=seed)
    else:
        yield from class_pictures(
            sd,
            caption,
            concept.class_images,
            count=prior.count,
            seed=seed,
            steps=prior.steps,
            guidance_scale=prior.guidance_scale,
            size=samples.size,
        )


def prior_examples(sd: StableDiffusion, concept: Concept, prior: Prior, prompt: str, size: int) -> list[Example]:
    """The concept's class pictures as the prior asks for them; none of kind "none". Folders must be filled before."""
    if prior.kind == "none":
        return []
    if concept.class_images is None:
        raise ValueError(
            f"{concept.images}: the prior {prior.kind!r} needs class pictures; give their folder, class_images, or the prior none"
        )
    caption = class_caption(concept, prompt)
    if prior.kind == "near":
        features: Callable = partial(pooled_text, sd)
        return near_examples(read_folder(concept.class_images, size=size), caption, features, least=prior.least, most=prior.count)
    captioned = prior.kind == "scenes" or concept.class_prompt is None and bool(find_caption_sources(concept.class_images))
    return read_folder(concept.class_images, size=size, caption=None if captioned else caption)
