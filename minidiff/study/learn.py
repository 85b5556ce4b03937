"""Train one run of the study: its pictures, its method, and what it cost.

StudyRun -> training pictures -> a method of trainers/methods -> Outcome: adapters to attach, or the model itself changed
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from minidiff.adapters.base import Adapter
from minidiff.adapters.custom_diffusion import CustomDiffusion, compress, from_deltas
from minidiff.adapters.merge_concepts import merge_concepts
from minidiff.adapters.parallel import ADAPTER_METHODS, LAYER_PATTERNS, create_adapters
from minidiff.adapters.tokens import NewTokens
from minidiff.evaluation.weights import relative_changes
from minidiff.files import atomic_write
from minidiff.pictures import save_png
from minidiff.pipeline import StableDiffusion
from minidiff.scenes.pictures import subject_scenes
from minidiff.scenes.scenes import sample_scene, with_article
from minidiff.study.plan import PICTURES, STEPS, SUBJECTS, UNTOUCHED, StudyRun, Variant, standard_options, variants
from minidiff.trainers.engine.memory import estimate_memory
from minidiff.trainers.methods import table
from minidiff.trainers.methods.common import make_subjects
from minidiff.trainers.methods.custom_diffusion import CustomDiffusionOptions
from minidiff.trainers.methods.finetune_task import FinetuneTask, Group, TrainingRun
from minidiff.trainers.methods.lora import LoRAOptions
from minidiff.trainers.methods.method import MethodOptions
from minidiff.trainers.methods.options import Concept
from minidiff.trainers.methods.override import override
from minidiff.trainers.methods.prior_preservation import fill_class_images

RANK = 8  # of the adapters of adapters/parallel.py
RIDGE = 0.1  # of a merge: the bundled model's text has few directions
RARE, RARE_TOO = "sks", "qhy"  # names of DreamBooth and LoRA; the words of Custom Diffusion start from others
FIRST_WORDS = ("ktn", "pll")  # that two words start from


@dataclass(frozen=True)
class Outcome:
    """What a run's training leaves.

    adapters: to attach before drawing. prompt_names: the words that call each subject, or the style, in a prompt.
    trained: number of trained parameters. bytes: of what is kept, in float32. seconds: of training, without drawing class pictures.
    memory: estimated peak in bytes (trainers/engine/memory.py). changes: |W' - W| / |W| by kind of layer if the model's own weights moved.
    """

    adapters: tuple[Adapter, ...]
    prompt_names: tuple[str, ...]
    trained: int = 0
    bytes: int = 0
    seconds: float = 0.0
    memory: int = 0
    changes: dict[str, float] | None = None

    @property
    def custom_diffusion(self) -> CustomDiffusion:
        """Return the only adapter, of a run of Custom Diffusion."""
        (delta,) = self.adapters
        assert isinstance(delta, CustomDiffusion)
        return delta


def train_run(sd: StableDiffusion, run: StudyRun, folder: Path) -> Outcome:
    """Train what the run asks for. The weights of `sd` change if the method changes them.

    folder: for pictures, and for what other runs use again.
    """
    if run.variant == UNTOUCHED:
        return Outcome((), tuple(SUBJECTS[name] for name in run.subjects) or ("noto",))
    parts = {"pairs": train_pair, "style": train_style, "compression": compress_custom_diffusion}
    if run.part in parts:
        return parts[run.part](sd, run, folder)
    if (run.part, run.variant) == ("methods", "custom-diffusion"):
        return train_custom_diffusion(sd, run.subjects[0], run.seed, folder)
    variant = variants(run.part)[run.variant]
    return train_method(sd, variant, [make_concept(variant.method, run.subjects[0], run.seed, folder, variant.pictures)], run.seed)


def draw_training_pictures(subject: str, seed: int, count: int = PICTURES) -> list[Image.Image]:
    """Draw pictures of the subject as a person would take them. The first ones do not depend on how many there are."""
    scenes = subject_scenes(subject, "fluent", count, np.random.default_rng([seed, list(SUBJECTS).index(subject)]))
    return [Image.fromarray(scene.image) for scene in scenes]


def make_concept(method: str, subject: str, seed: int, folder: Path, count: int = PICTURES, second: bool = False) -> Concept:
    """Write the subject's pictures into a folder and name it as the method does.

    Args:
        method: Decides whether the subject gets a new word or a rare one.
        subject: Of SUBJECTS.
        seed: Of the pictures.
        folder: Of the study.
        count: Number of pictures.
        second: The second of two subjects that are learned together has another word.
    """
    images = folder / "pictures" / f"{subject}-{count}-{seed}"
    images.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(draw_training_pictures(subject, seed, count)):
        save_png(picture, images / f"{i}.png")
    new_word = method in ("textual-inversion", "pivotal-tuning", "custom-diffusion")
    token = ("<two>" if second else "<one>") if new_word else (RARE_TOO if second else RARE)
    return Concept(images=images, token=token, class_word=SUBJECTS[subject])


def with_class_pictures(sd: StableDiffusion, one: Concept, options: MethodOptions) -> Concept:
    """Return the concept with a folder of class pictures, filled first if necessary; all runs of the class share it."""
    last = options.phases()[-1]
    prior = last.prior
    if prior.kind == "none":
        return one
    name = f"{one.class_word or 'style'}-{prior.kind}-{prior.count}"
    one = replace(one, class_images=one.images.parent.parent / "class" / name)
    for _ in fill_class_images(sd, one, last):
        pass
    return one


def train_method(
    sd: StableDiffusion, variant: Variant, concepts: Sequence[Concept], seed: int, start_from: CustomDiffusion | None = None
) -> Outcome:
    """Train one method on one subject or several, and measure what that costs.

    Args:
        sd: The untouched model.
        variant: The method and its options.
        concepts: The subjects.
        seed: Of the run.
        start_from: Custom Diffusion that is trained further.
    """
    options = override(variant.options, {"seed": seed})
    concepts = [with_class_pictures(sd, one, options) for one in concepts]
    if variant.method in ADAPTER_METHODS:
        assert isinstance(options, LoRAOptions)
        method, adapters = make_adapter_run(sd, variant.method, concepts, options)
    else:
        more = {} if start_from is None else {"start_from": start_from}
        method = table.METHODS[variant.method.removesuffix("-lora")].build(sd, concepts, options, **more)
        adapters = tuple(one for one in (method.tokens, method.lora, method.custom_diffusion) if one is not None)
    before = {} if adapters else {name: p.detach().clone() for name, p in sd.unet.named_parameters()}
    memory = 0
    for phase in method.phases:
        with phase:
            memory = max(memory, estimate_memory(phase, phase.settings, sd.device).total)
    start = time.perf_counter()
    for _ in method.run(sd.device):
        pass
    seconds = time.perf_counter() - start
    count = sum(p.numel() for phase in method.phases for group in phase.groups for p in group.params)
    kept = count if start_from is None else sum(p.numel() for adapter in adapters for p in adapter.parameters())
    changes = relative_changes(before, dict(sd.unet.named_parameters())) if before else None
    by_token = variant.method in ("textual-inversion", "pivotal-tuning")  # which teach what the token alone stands for
    return Outcome(
        adapters, tuple(one.token if by_token else one.subject_phrase for one in concepts), count, 4 * kept, seconds, memory, changes
    )


def make_adapter_run(
    sd: StableDiffusion, name: str, concepts: Sequence[Concept], options: LoRAOptions
) -> tuple[TrainingRun, tuple[Adapter, ...]]:
    """Put a method of adapters/parallel.py on the attention layers, to be trained like a LoRA.

    Args:
        sd: The untouched model.
        name: Of the method.
        concepts: The subjects.
        options: Those of LoRA.
    """
    generator = torch.Generator().manual_seed(options.settings.seed)
    adapters = create_adapters(sd, LAYER_PATTERNS["attention"], method=name, rank=RANK, generator=generator)
    subjects, groups = make_subjects(sd, concepts, options, None), [Group(tuple(adapters.parameters()))]
    phase = FinetuneTask(sd, name, subjects, options, modules={name: adapters}, adapters=[adapters], groups=groups)
    return TrainingRun((phase,)), (adapters,)


# --- two subjects -----------------------------------------------------------------------------------------------------


def train_pair(sd: StableDiffusion, run: StudyRun, folder: Path) -> Outcome:
    """Train two subjects, each with the number of steps that one has alone."""
    method = "dreambooth" if run.variant == "dreambooth" else "custom-diffusion"
    first, second = (make_concept(method, subject, run.seed, folder, second=i == 1) for i, subject in enumerate(run.subjects))
    options = standard_options(method)
    if run.variant in ("joint", "dreambooth"):
        options = replace(options, settings=replace(options.settings, steps=2 * STEPS))
        if method == "custom-diffusion":
            options = replace(options, start=FIRST_WORDS)
        return train_method(sd, Variant(method, options), [first, second], run.seed)
    one = train_custom_diffusion(sd, run.subjects[0], run.seed, folder)
    if run.variant == "sequential":
        step = train_method(sd, Variant(method, replace(options, start=FIRST_WORDS)), [second], run.seed, one.custom_diffusion)
        return replace(step, prompt_names=(first.subject_phrase, second.subject_phrase), seconds=one.seconds + step.seconds)
    other = train_custom_diffusion(sd, run.subjects[1], run.seed, folder, second=True)
    start = time.perf_counter()
    captions = [sample_scene(np.random.default_rng([1, i])).caption for i in range(1000)]
    targets = [[f"a photo of a {words}"] for words in (first.subject_phrase, second.subject_phrase)]
    merged, _ = merge_concepts(sd, [one.custom_diffusion, other.custom_diffusion], targets, captions, RIDGE)
    return replace(
        one,
        adapters=(merged,),
        prompt_names=(first.subject_phrase, second.subject_phrase),
        seconds=one.seconds + other.seconds + time.perf_counter() - start,
        trained=one.trained + other.trained,
        bytes=4 * sum(p.numel() for p in merged.parameters()),
    )


def train_custom_diffusion(sd: StableDiffusion, subject: str, seed: int, folder: Path, second: bool = False) -> Outcome:
    """Return Custom Diffusion of one subject with the standard options: trained by the first run that asks for it, read by the others.

    Args:
        sd: The untouched model.
        subject: A key of SUBJECTS.
        seed: Of the training.
        folder: Of the study.
        second: Start from a different rare word and use another name, so that two subjects stay distinct.
    """
    path = folder / "learned" / f"{subject}-{seed}{'-second' if second else ''}.pt"
    one = make_concept("custom-diffusion", subject, seed, folder, second=second)
    if path.exists():
        kept = torch.load(path, weights_only=True)
        delta = CustomDiffusion(kept.pop("layers"), NewTokens(kept.pop("rows"))).to(sd.device)
        return Outcome((delta,), (one.subject_phrase,), **kept)
    options: CustomDiffusionOptions = replace(standard_options("custom-diffusion"), start=FIRST_WORDS[second:])
    result = train_method(sd, Variant("custom-diffusion", options), [one], seed)
    delta = result.custom_diffusion
    assert delta.tokens is not None
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = {name: getattr(result, name) for name in ("trained", "bytes", "seconds", "memory")}
    with atomic_write(path) as file:  # another process may train the same
        torch.save({"layers": _detached(delta.layers), "rows": _detached(delta.tokens.rows), **numbers}, file)
    return result


def _detached(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


# --- less of it, and a style ------------------------------------------------------------------------------------------


def compress_custom_diffusion(sd: StableDiffusion, run: StudyRun, folder: Path) -> Outcome:
    """Compress Custom Diffusion's changes to the largest singular values, a share of their sum."""
    whole = train_custom_diffusion(sd, run.subjects[0], run.seed, folder)
    delta = whole.custom_diffusion
    assert delta.tokens is not None
    small = compress(delta.deltas(sd), share=float(run.variant.split()[1]))
    words = sum(4 * row.numel() for row in delta.tokens.rows.values())
    return replace(whole, adapters=(from_deltas(sd, small.deltas(), delta.tokens),), bytes=small.size + words)


def draw_style_pictures(seed: int, count: int = 10) -> list[tuple[Image.Image, str]]:
    """Draw scenes in greys, each of another subject, with the subject's name."""
    found: dict[str, Image.Image] = {}
    for i in range(1000):
        scene = sample_scene(np.random.default_rng([seed, 9, i]))
        if len(scene.objects) == 1 and len(found) < count:
            found.setdefault(scene.objects[0].subject, Image.fromarray(scene.image).convert("L").convert("RGB"))
    return [(picture, name) for name, picture in found.items()]


def train_style(sd: StableDiffusion, run: StudyRun, folder: Path) -> Outcome:
    """Train a style from ten pictures: everything in greys."""
    images = folder / "pictures" / f"style-{run.seed}"
    images.mkdir(parents=True, exist_ok=True)
    for i, (picture, name) in enumerate(draw_style_pictures(run.seed)):
        (images / f"{i}.txt").write_text(f"{with_article(name)} in {{}} style", encoding="utf-8")
        save_png(picture, images / f"{i}.png")
    options = standard_options(run.variant)
    one = Concept(images=images, token="<one>" if run.variant == "custom-diffusion" else RARE, captions=True, class_prompt="an icon")
    return train_method(sd, Variant(run.variant, options), [one], run.seed)
