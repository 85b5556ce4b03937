"""One run's training: its pictures, its method, and what it cost.

Run -> training pictures -> methods.py -> Learned: adapters to attach, or the model itself changed
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
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
from minidiff.study.plan import PICTURES, STEPS, SUBJECTS, UNTOUCHED, Run, Variant, standard, variants
from minidiff.trainers.engine.memory import estimate_memory
from minidiff.trainers.methods import table
from minidiff.trainers.methods.common import fill_class_images, make_subjects
from minidiff.trainers.methods.custom_diffusion import CustomDiffusionOptions
from minidiff.trainers.methods.finetuning import FinetuneTask, Group, TrainingRun
from minidiff.trainers.methods.lora import LoRAOptions
from minidiff.trainers.methods.method import MethodOptions
from minidiff.trainers.methods.options import Concept
from minidiff.trainers.methods.override import override

RANK = 8  # of the adapters of adapters/parallel.py
RIDGE = 0.1  # of a merge: the bundled model's text has few directions
RARE, RARE_TOO = "sks", "qhy"  # names of DreamBooth and LoRA; the words of Custom Diffusion start from others
FIRST_WORDS = ("ktn", "pll")  # that two words start from


@dataclass(frozen=True)
class Learned:
    """What a run leaves. adapters: to be attached for drawing. called: how each subject, or the style, is asked for.

    trained: how many numbers were trained; bytes: of what is to be kept, in float32. seconds: of training, class pictures not among them.
    memory: bytes at the peak, by trainers/engine/memory.py. changes: |W' - W| / |W| by kind of layer where the model's own weights moved.
    """

    adapters: tuple[Adapter, ...]
    called: tuple[str, ...]
    trained: int = 0
    bytes: int = 0
    seconds: float = 0.0
    memory: int = 0
    changes: dict[str, float] | None = None

    @contextmanager
    def on(self, sd: StableDiffusion) -> Iterator[None]:
        """The model with the adapters."""
        for adapter in self.adapters:
            adapter.attach(sd)
        try:
            yield
        finally:
            for adapter in reversed(self.adapters):
                adapter.detach()


def learned(sd: StableDiffusion, run: Run, folder: Path) -> Learned:
    """Trains what the run asks for; sd's own weights change where the method changes them. folder: for pictures, and what other runs use again."""
    if run.variant == UNTOUCHED:
        return Learned((), tuple(SUBJECTS[name] for name in run.subjects) or ("noto",))
    if run.part == "pairs":
        return pair(sd, run, folder)
    if run.part == "style":
        return style(sd, run, folder)
    if run.part == "compression":
        return compressed(sd, run, folder)
    if (run.part, run.variant) == ("methods", "custom-diffusion"):
        return custom_diffusion_of(sd, run.subjects[0], run.seed, folder)
    variant = variants(run.part)[run.variant]
    return trained(sd, variant, [concept(variant.method, run.subjects[0], run.seed, folder, variant.pictures)], run.seed)


def training_pictures(subject: str, seed: int, count: int = PICTURES) -> list[Image.Image]:
    """Pictures of the subject as a person would take them; the first ones of a longer row are those of a shorter."""
    rng = np.random.default_rng([seed, list(SUBJECTS).index(subject)])
    return [Image.fromarray(scene.image) for scene in subject_scenes(subject, "fluent", count, rng)]


def concept(method: str, subject: str, seed: int, folder: Path, count: int = PICTURES, second: bool = False) -> Concept:
    """The subject's pictures in a folder, and what the method calls it. second: of two subjects that are learned together."""
    images = folder / "pictures" / f"{subject}-{count}-{seed}"
    images.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(training_pictures(subject, seed, count)):
        save_png(picture, images / f"{i}.png")
    new_word = method in ("textual-inversion", "pivotal-tuning", "custom-diffusion")
    token = ("<two>" if second else "<one>") if new_word else (RARE_TOO if second else RARE)
    return Concept(images=images, token=token, class_word=SUBJECTS[subject])


def called(method: str, one: Concept) -> str:
    """The words for the subject, as the method taught them."""
    return one.token if method in ("textual-inversion", "pivotal-tuning") else one.subject_phrase


def with_class_pictures(sd: StableDiffusion, one: Concept, options: MethodOptions) -> Concept:
    """The concept with the folder of its class pictures, filled if it is not; all runs of the class share it."""
    prior = options.prior
    if prior.kind == "none":
        return one
    words = one.class_word or "style"
    one = replace(one, class_images=one.images.parent.parent / "class" / f"{words}-{prior.kind}-{prior.count}")
    for _ in fill_class_images(sd, one, options):
        pass
    return one


def trained(
    sd: StableDiffusion, variant: Variant, concepts: Sequence[Concept], seed: int, start_from: CustomDiffusion | None = None
) -> Learned:
    """Trains one method on one subject or several, with the run's seed."""
    options = override(variant.options, {"seed": seed})
    concepts = [with_class_pictures(sd, one, options) for one in concepts]
    before = None
    if variant.method in ADAPTER_METHODS:
        method, adapters = small_modules(sd, variant.method, concepts, options)
    else:
        more = {} if start_from is None else {"start_from": start_from}
        method = table.METHODS[variant.method.removesuffix("-lora")].build(sd, concepts, options, **more)
        adapters = tuple(one for one in (method.tokens, method.lora, method.custom_diffusion) if one is not None)
    if not adapters:
        before = {name: p.detach().clone() for name, p in sd.unet.named_parameters()}
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
    changes = None if before is None else relative_changes(before, dict(sd.unet.named_parameters()))
    return Learned(adapters, tuple(called(variant.method, one) for one in concepts), count, 4 * kept, seconds, memory, changes)


def small_modules(
    sd: StableDiffusion, name: str, concepts: Sequence[Concept], options: LoRAOptions
) -> tuple[TrainingRun, tuple[Adapter, ...]]:
    """A method of adapters/parallel.py at the attentions, trained as a LoRA is."""
    generator = torch.Generator().manual_seed(options.settings.seed)
    adapters = create_adapters(sd, LAYER_PATTERNS["attention"], method=name, rank=RANK, generator=generator)
    subjects, groups = make_subjects(sd, concepts, options, None), [Group(tuple(adapters.parameters()))]
    phase = FinetuneTask(sd, name, subjects, options, modules={name: adapters}, adapters=[adapters], groups=groups)
    return TrainingRun((phase,)), (adapters,)


# --- two subjects -----------------------------------------------------------------------------------------------------


def pair(sd: StableDiffusion, run: Run, folder: Path) -> Learned:
    """Two subjects: each with the steps that one has alone."""
    method = "dreambooth" if run.variant == "dreambooth" else "custom-diffusion"
    first, second = (concept(method, subject, run.seed, folder, second=i == 1) for i, subject in enumerate(run.subjects))
    options = standard(method)
    if run.variant in ("joint", "dreambooth"):
        options = replace(options, settings=replace(options.settings, steps=2 * STEPS))
        if method == "custom-diffusion":
            options = replace(options, start=FIRST_WORDS)
        return trained(sd, Variant(method, options), [first, second], run.seed)
    one = custom_diffusion_of(sd, run.subjects[0], run.seed, folder)
    if run.variant == "sequential":
        step = trained(sd, Variant(method, replace(options, start=FIRST_WORDS)), [second], run.seed, one.adapters[0])
        return replace(step, called=(first.subject_phrase, second.subject_phrase), seconds=one.seconds + step.seconds)
    other = custom_diffusion_of(sd, run.subjects[1], run.seed, folder, second=True)
    start = time.perf_counter()
    captions = [sample_scene(np.random.default_rng([1, i])).caption for i in range(1000)]
    targets = [[f"a photo of a {words}"] for words in (first.subject_phrase, second.subject_phrase)]
    merged, _ = merge_concepts(sd, [one.adapters[0], other.adapters[0]], targets, captions, RIDGE)
    seconds = one.seconds + other.seconds + time.perf_counter() - start
    size = 4 * sum(p.numel() for p in merged.parameters())
    return replace(
        one,
        adapters=(merged,),
        called=(first.subject_phrase, second.subject_phrase),
        seconds=seconds,
        trained=one.trained + other.trained,
        bytes=size,
    )


def custom_diffusion_of(sd: StableDiffusion, subject: str, seed: int, folder: Path, second: bool = False) -> Learned:
    """Custom Diffusion of one subject by the standard numbers; the first run that asks for it trains it, and the others read it.

    second: its word is another, and starts from another word."""
    path = folder / "learned" / f"{subject}-{seed}{'-second' if second else ''}.pt"
    one = concept("custom-diffusion", subject, seed, folder, second=second)
    if path.exists():
        kept = torch.load(path, weights_only=True)
        delta = CustomDiffusion(kept.pop("layers"), NewTokens(kept.pop("rows"))).to(sd.device)
        return Learned((delta,), (one.subject_phrase,), **kept)
    options: CustomDiffusionOptions = replace(standard("custom-diffusion"), start=FIRST_WORDS[second:])
    result = trained(sd, Variant("custom-diffusion", options), [one], seed)
    (delta,) = result.adapters
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = {name: getattr(result, name) for name in ("trained", "bytes", "seconds", "memory")}
    with atomic_write(path) as file:  # another process may train the same
        torch.save({"layers": _detached(delta.layers), "rows": _detached(delta.tokens.rows), **numbers}, file)
    return result


def _detached(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in tensors.items()}


# --- less of it, and a style ------------------------------------------------------------------------------------------


def compressed(sd: StableDiffusion, run: Run, folder: Path) -> Learned:
    """Custom Diffusion's changes by the singular values that make up a share of their sum."""
    whole = custom_diffusion_of(sd, run.subjects[0], run.seed, folder)
    (delta,) = whole.adapters
    small = compress(delta.deltas(sd), share=float(run.variant.split()[1]))
    words = sum(4 * row.numel() for row in delta.tokens.rows.values())
    return replace(whole, adapters=(from_deltas(sd, small.deltas(), delta.tokens),), bytes=small.size + words)


def style_pictures(seed: int, count: int = 10) -> list[tuple[Image.Image, str]]:
    """Scenes of one subject each, other subjects in each, without colour; and what the subject is."""
    found: list[tuple[Image.Image, str]] = []
    for i in range(1000):
        scene = sample_scene(np.random.default_rng([seed, 9, i]))
        name = scene.objects[0].subject
        if len(scene.objects) == 1 and len(found) < count and name not in [known for _, known in found]:
            found.append((Image.fromarray(scene.image).convert("L").convert("RGB"), name))
    return found


def style(sd: StableDiffusion, run: Run, folder: Path) -> Learned:
    """A style from ten pictures: everything without its colours."""
    images = folder / "pictures" / f"style-{run.seed}"
    images.mkdir(parents=True, exist_ok=True)
    for i, (picture, name) in enumerate(style_pictures(run.seed)):
        (images / f"{i}.txt").write_text(f"{with_article(name)} in {{}} style", encoding="utf-8")
        save_png(picture, images / f"{i}.png")
    options = standard(run.variant)
    one = Concept(images=images, token="<one>" if run.variant == "custom-diffusion" else RARE, captions=True, class_prompt="an icon")
    return trained(sd, Variant(run.variant, options), [one], run.seed)
