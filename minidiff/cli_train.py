"""The commands `minidiff train METHOD`: flags over a preset, one run (learn), and the files that it ends in.

    check everything -> class pictures -> memory told -> steps, with sheets of pictures -> files, and the command that uses them

The methods themselves are trainers/methods.py. Imports that take long stand inside the functions that need them.
"""

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from minidiff.cli_flags import (
    File, LowRank, Number, Pictures, PriorFlags, Run, Several, Text, TextEncoderFlags, Training, What, Whole, changed, choices,
)  # fmt: skip
from minidiff.cli_model import load, say, slug, training_on
from minidiff.trainers.presets import Concept, Family, FineTuneOptions, LowRankOptions, Options, PivotalOptions, Prior, family_of, preset
from minidiff.trainers.recipe import Recipe

if TYPE_CHECKING:
    import torch

    from minidiff.pipeline import StableDiffusion
    from minidiff.trainers.methods import Method
    from minidiff.trainers.personalise import Personalisation, Subject

SAMPLE_STEPS = 20
FILLED = ("generated", "scenes")  # kinds of prior whose class pictures are made
LoRANames = Literal["diffusers", "kohya"]
Words = Literal["photo", "scenes"]


# --- the commands -----------------------------------------------------------------------------------------------------


def lora(
    what: What,
    run: Run,
    training: Training = Training(),
    low_rank: LowRank = LowRank(),
    text: TextEncoderFlags = TextEncoderFlags(),
    pictures: Pictures = Pictures(),
    prior: PriorFlags = PriorFlags(),
    names: LoRANames = "diffusers",
) -> None:
    """A LoRA: small changes beside chosen layers, from a folder of pictures with one caption for all or one for each.

    Args:
        names: of the layers in the file: diffusers', or kohya's for the web interfaces
    """

    def options(family: Family) -> Options:
        base = preset("lora", family)
        return replace(
            base, settings=training.over(base.settings), samples=pictures.over(base.samples),
            low_rank=low_rank.over(base.low_rank, text), prior=prior.over(base.prior),
        )  # fmt: skip

    learn("lora", what, run, options, names)


def dreambooth(
    what: What,
    run: Run,
    training: Training = Training(),
    low_rank: Annotated[bool, tyro.conf.arg(name="low-rank")] = False,
    lora: LowRank = LowRank(),
    text: TextEncoderFlags = TextEncoderFlags(),
    pictures: Pictures = Pictures(),
    prior: PriorFlags = PriorFlags(),
    names: LoRANames = "diffusers",
) -> None:
    """DreamBooth: a rare word becomes the subject's name; the whole U-Net learns it, or a LoRA with --low-rank.

    Args:
        low_rank: train a LoRA instead of the U-Net: a small file in place of a whole checkpoint
        names: of the layers in the LoRA's file: diffusers', or kohya's for the web interfaces
    """
    if not low_rank and (lora != LowRank() or names != "diffusers"):
        flag = next((name for name, value in asdict(lora).items() if value not in (None, ())), "names")
        raise ValueError(f"--{flag} is of a LoRA; give --low-rank too, or leave it out")

    def options(family: Family) -> Options:
        base = preset("dreambooth-lora" if low_rank else "dreambooth", family)
        base = replace(base, settings=training.over(base.settings), samples=pictures.over(base.samples), prior=prior.over(base.prior))
        if low_rank:
            return replace(base, low_rank=lora.over(base.low_rank or LowRankOptions(), text))
        return changed(base, **text.values())

    learn("dreambooth", what, run, options, names)


def textual_inversion(
    what: What,
    run: Run,
    training: Training = Training(),
    pictures: Pictures = Pictures(),
    vectors: Whole = None,
    start: Text = None,
    kind: choices(Literal["object", "style"]) = None,
    words: choices(Words) = None,
    names: Literal["diffusers", "a1111"] = "diffusers",
) -> None:
    """Textual Inversion: a new word alone; the model stays as it is, and the file has a few kilobytes.

    Args:
        vectors: how many vectors a word
        start: the word that it starts from; the class word by default, random without one
        kind: templates around the word for an object, or for a style
        words: templates of photographs, or of the bundled model's scenes
        names: of the file's tensors: diffusers', or a1111's for the web interfaces
    """

    def options(family: Family) -> Options:
        base = preset("textual-inversion", family)
        base = changed(base, vectors=vectors, start=start, kind=kind, words=words)
        return replace(base, settings=training.over(base.settings), samples=pictures.over(base.samples))

    learn("textual-inversion", what, run, options, names)


def pivotal_tuning(
    what: What,
    run: Run,
    training: Training = Training(),
    low_rank: LowRank = LowRank(),
    text: TextEncoderFlags = TextEncoderFlags(),
    pictures: Pictures = Pictures(),
    prior: PriorFlags = PriorFlags(),
    token_steps: Whole = None,
    token_learning_rate: Number = None,
    vectors: Whole = None,
    start: Text = None,
    kind: choices(Literal["object", "style"]) = None,
    words: choices(Words) = None,
    names: LoRANames = "diffusers",
) -> None:
    """Pivotal tuning: first a new word, then a LoRA around it; two files, to be used together.

    Args:
        token_steps: steps of the new word; --steps are the LoRA's
        token_learning_rate: of the new word; --learning-rate is the LoRA's
        vectors: how many vectors a word
        start: the word that it starts from; the class word by default, random without one
        kind: templates around the word for an object, or for a style
        words: templates of photographs, or of the bundled model's scenes
        names: of the LoRA's layers: diffusers', or kohya's for the web interfaces
    """

    def options(family: Family) -> PivotalOptions:
        base = preset("pivotal-tuning", family)
        first = replace(training, steps=token_steps, learning_rate=token_learning_rate, warm_up=None, schedule=None)
        tokens = changed(base.tokens, vectors=vectors, start=start, kind=kind, words=words)
        tokens = replace(tokens, settings=first.over(tokens.settings), samples=pictures.over(tokens.samples))
        around = replace(
            base.lora, settings=training.over(base.lora.settings), samples=pictures.over(base.lora.samples),
            low_rank=low_rank.over(base.lora.low_rank, text), prior=prior.over(base.lora.prior),
        )  # fmt: skip
        return replace(base, tokens=tokens, lora=around)

    learn("pivotal-tuning", what, run, options, names)


def custom_diffusion(
    what: What,
    run: Run,
    training: Training = Training(),
    pictures: Pictures = Pictures(),
    prior: PriorFlags = PriorFlags(),
    start_from: File = None,
    start: Several = (),
    token_scale: Number = None,
    all_of_attention: bool = False,
    sizes: choices(Literal["none", "paper", "code"]) = None,
    words: choices(Words) = None,
    names: Literal["minidiff", "diffusers", "original"] = "minidiff",
) -> None:
    """Custom Diffusion: keys and values of cross-attention and a new word; several concepts jointly, or one after the other.

    Args:
        start_from: a Custom Diffusion to which these concepts are added, learnt before on the same model
        start: rare words that the new ones start from, in order
        token_scale: the words' share of the learning rate
        all_of_attention: queries and outputs of cross-attention too, as the authors do for faces
        sizes: show the subject at several sizes: as in the paper, as in its program, or not
        words: for these sizes, of photographs or of the bundled model's scenes
        names: minidiff, one safe file; diffusers, a folder; original, the authors' delta.bin
    """

    def options(family: Family) -> Options:
        base = preset("custom-diffusion", family)
        base = changed(base, start=start or None, token_scale=token_scale, all_of_attention=all_of_attention or None, sizes=sizes, words=words)
        return replace(base, settings=training.over(base.settings), samples=pictures.over(base.samples), prior=prior.over(base.prior))

    learn("custom-diffusion", what, run, options, names, start_from)


def fine_tune(
    what: What,
    run: Run,
    training: Training = Training(),
    pictures: Pictures = Pictures(),
    prior: PriorFlags = PriorFlags(),
    weights: Several = (),
    text_scale: Number = None,
) -> None:
    """Fine-tuning: the model's own weights, all of the U-Net or those of chosen names.

    Args:
        weights: regular expressions over names of weights, as "^unet\\.up" or cross_attention
        text_scale: the text encoder's share of the learning rate, where its weights are among them
    """

    def options(family: Family) -> FineTuneOptions:
        base = changed(preset("fine-tune", family), weights=weights or None, text_scale=text_scale)
        return replace(base, settings=training.over(base.settings), samples=pictures.over(base.samples), prior=prior.over(base.prior))

    learn("fine-tune", what, run, options)


def from_scratch(
    out: tyro.conf.Positional[Path],
    /,
    recipe: Recipe = Recipe(),
    init: Text = None,
    device: str = "auto",
    threads: Whole = None,
) -> None:
    """Train a small Stable Diffusion from nothing on composed scenes: the VAE, then text encoder and U-Net together.

    Stopped at any time and started again with the same arguments, it goes on from its last state.

    Args:
        out: folder of the run; the model ends there as model.safetensors
        recipe: how long, and how
        init: a checkpoint of the bundled model's shape to train on from; its VAE is kept
        device: auto, cpu, cuda, cuda:1, mps
        threads: CPU threads to use; all cores by default
    """
    from tqdm import tqdm

    import weights_loader
    from minidiff.trainers.from_scratch import bundled_config
    from minidiff.trainers.run import run_from_scratch

    with training_on(device, threads) as device, ExitStack() as outer, ExitStack() as bars:
        base = load(init, "float32", device) if init else None
        model, stage = out / "model.safetensors", None
        config = base.config if base else bundled_config()
        run = run_from_scratch(config, recipe, out, device, lambda sd: weights_loader.save(sd, model), base)
        for step in outer.enter_context(closing(run)):
            if step.stage != stage:
                bars.close()
                stage, bar = step.stage, bars.enter_context(tqdm(desc=step.stage, total=step.steps, initial=step.i - 1, file=sys.stderr))
            bar.update(step.i - bar.n)
            if step.text:
                bar.set_postfix_str(step.text, refresh=False)
        bars.close()
        print(model)


COMMANDS = {
    "lora": lora,
    "dreambooth": dreambooth,
    "textual-inversion": textual_inversion,
    "pivotal-tuning": pivotal_tuning,
    "custom-diffusion": custom_diffusion,
    "fine-tune": fine_tune,
    "from-scratch": from_scratch,
}


# --- a run ------------------------------------------------------------------------------------------------------------


def learn(
    method: str, what: What, run: Run, options: Callable[[Family], Options], names: str = "diffusers", start_from: Path | None = None
) -> None:
    """Checks, trains and writes. Whatever is wrong with what was asked for raises before the first step."""
    from minidiff.trainers.cache import Cache
    from minidiff.trainers.processes import number, wait_for_all

    run.check()
    concepts = what.concepts()
    with training_on(run.device, run.threads) as device:
        sd = load(run.model, "float32" if run.dtype == "auto" else run.dtype, device, prediction=run.prediction)
        options = options(family_of(sd.config))
        concepts = [with_class_folder(concept, i, run.out, prior_of(options)) for i, concept in enumerate(concepts, start=1)]
        asked = {"method": method, "model": run.model, "names": names}
        if prior_of(options).kind in FILLED:
            check(method, sd, concepts, options, start_from)
            if number() == 0:
                claim(run.out, asked)
                fill_class_folders(sd, concepts, options)
            wait_for_all()
        made = build(method, sd, concepts, options, Cache(run.out / "cache"), start_from)
        if number() == 0:
            claim(run.out, asked)
        wait_for_all()
        forecast(made, device)
        prompts = list(run.sample_prompt) or [first_caption(subject) for subject in made.phases[0].subjects]
        try:
            steps(made, run, prompts, device)
        except KeyboardInterrupt:
            say([f"stopped; the same command goes on from what is saved in {run.out}"])
            raise
        if number() == 0:
            settings = settings_of(method, run.model, concepts, options)
            flags = [text for flag, path in write(made, sd, run.out, names, settings) for text in (flag, str(path))]
            model = [] if "--model" in flags or run.model == "tiny" else ["--model", run.model]
            print(shlex.join(["minidiff", "generate", prompts[0], *model, *flags]))


def first_caption(subject: "Subject") -> str:
    return (subject.templates or (subject.pictures.examples[0].caption,))[0]


def build(
    method: str, sd: "StableDiffusion", concepts: list[Concept], options: Options, cache=None, start_from: Path | None = None
) -> "Method":
    """The method put together; raises for all that is wrong."""
    import weights_loader
    from minidiff.trainers import methods

    if method == "custom-diffusion":
        before = None if start_from is None else weights_loader.read_custom_diffusion(start_from, sd)
        return methods.custom_diffusion(sd, concepts, options, cache, before)
    functions = {
        "lora": methods.lora, "dreambooth": methods.dreambooth, "textual-inversion": methods.textual_inversion,
        "pivotal-tuning": methods.pivotal, "fine-tune": methods.fine_tune,
    }  # fmt: skip
    return functions[method](sd, concepts, options, cache)


def prior_of(options: Options) -> Prior:
    return options.lora.prior if isinstance(options, PivotalOptions) else getattr(options, "prior", Prior())


def with_class_folder(concept: Concept, number: int, out: Path, prior: Prior) -> Concept:
    """Class pictures that are made need a folder: one in the run's, unless another is given."""
    if concept.class_images is None and prior.kind in FILLED:
        return replace(concept, class_images=out / f"class-{number}")
    return concept


def check(method: str, sd: "StableDiffusion", concepts: list[Concept], options: Options, start_from: Path | None) -> None:
    """Finds what is wrong before class pictures are made, which may take long: puts the method together without them."""
    import warnings

    from minidiff.trainers.methods import class_caption

    bare = replace(options, lora=replace(options.lora, prior=Prior())) if isinstance(options, PivotalOptions) else replace(options, prior=Prior())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again
        build(method, sd, concepts, bare, None, start_from)
    for concept in concepts:
        class_caption(concept, class_prompt_of(options))


def class_prompt_of(options: Options) -> str:
    return options.lora.prompt if isinstance(options, PivotalOptions) else options.prompt


def claim(out: Path, asked: dict[str, str]) -> None:
    """Makes the folder, or makes sure that what stands in it is the same run; raises ValueError for another's, OSError for a file."""
    from minidiff.trainers.state import check_same

    try:
        out.mkdir(parents=True, exist_ok=True)
        path = out / "run.json"
        if not path.exists():
            path.write_text(json.dumps(asked, indent=1))
    except OSError as error:
        raise OSError(f"--out {out}: no folder to write to ({error.strerror}); choose another place") from error
    check_same(out, json.loads(path.read_text()), asked)


def fill_class_folders(sd: "StableDiffusion", concepts: list[Concept], options: Options) -> None:
    from tqdm import tqdm

    from minidiff.trainers.methods import fill_class_images

    prior = prior_of(options)
    phase = options.lora if isinstance(options, PivotalOptions) else options
    for concept in concepts:
        with tqdm(desc=f"class pictures in {concept.class_images}", total=prior.count, unit="picture", file=sys.stderr) as bar:
            for filled in fill_class_images(sd, concept, prior, class_prompt_of(options), phase.samples, phase.settings.seed):
                bar.update(filled.i - bar.n)


def forecast(method: "Method", device: "torch.device") -> None:
    """What is trained, and how much memory it will take; the latents are made on the way."""
    from tqdm import tqdm

    from minidiff.trainers.log import memory_taken
    from minidiff.trainers.memory import estimate_memory, readable
    from minidiff.trainers.processes import count

    for phase in method.phases:
        for _ in tqdm(phase.prepare(), desc="pictures to latents", unit="picture", file=sys.stderr, leave=False):
            pass
        taken = f"; this process has taken {readable(memory_taken(device))} so far, the model among it" if device.type == "cpu" else ""
        with phase:
            memory = estimate_memory(phase, phase.settings, device)
        settings = phase.settings
        trained = sum(p.numel() for group in phase.groups for p in group.params)
        pictures = sum(len(subject.pictures) for subject in phase.subjects)
        samples = settings.batch * settings.accumulate * count()
        how = f"{settings.steps} steps of {samples} samples, learning rate {settings.learning_rate:g}"
        say([f"{phase.name}: {trained:,} numbers are trained on {pictures} pictures, {how}", f"{memory}{taken}"])


def steps(method: "Method", run: Run, prompts: list[str], device: "torch.device") -> None:
    """Takes the steps that are left, with a bar, a log and sheets of pictures."""
    from tqdm import tqdm

    from minidiff.trainers.log import Log
    from minidiff.trainers.processes import number

    shown = None
    with ExitStack() as open_now, closing(method.run(device, run.out)) as going:
        for phase, step in going:
            if phase is not shown:
                open_now.close()
                shown, told = phase, False
                log = open_now.enter_context(Log(run.out, phase.name, device))
                bar = open_now.enter_context(tqdm(desc=phase.name, total=step.steps, initial=step.i - 1, unit="step", file=sys.stderr))
            log.add(step)
            bar.update(step.i - bar.n)
            bar.set_postfix_str(log.text(), refresh=False)
            if not told and log.pace.forecast() and (bar.n - bar.initial >= 5):
                told = True
                bar.write(f"minidiff: {log.pace.forecast()}", file=sys.stderr)
            due = step.i == step.steps or run.sample_every and step.i % run.sample_every == 0
            if due and number() == 0:
                save_sheet(phase, prompts, run.samples, run.out / f"{phase.name}-{step.i:06d}.png")
    if shown is None:
        say(["all steps were taken before; the files are written again"])


def save_sheet(phase: "Personalisation", prompts: list[str], count: int, path: Path) -> None:
    """A row for each prompt, the same seeds every time."""
    from minidiff.viz import grid, save_png

    columns = [phase.pictures(prompts, seed=seed, steps=SAMPLE_STEPS) for seed in range(count)]
    save_png(grid([column[row] for row in range(len(prompts)) for column in columns], columns=count), path)


# --- the end ----------------------------------------------------------------------------------------------------------


def settings_of(method: str, model: str, concepts: list[Concept], options: Options) -> dict[str, object]:
    """All that was asked for, for the metadata of the files; of folders their names alone, for files are passed on."""
    named = [{name: value.name if isinstance(value, Path) else value for name, value in asdict(concept).items()} for concept in concepts]
    return {"method": method, "model": Path(model).name, "concepts": named, **asdict(options)}


def write(method: "Method", sd: "StableDiffusion", out: Path, names: str, settings: dict[str, object]) -> Iterator[tuple[str, Path]]:
    """Writes what was learnt, and gives each file with the flag of `generate` that takes it. All settings stand in settings.json too."""
    import weights_loader

    (out / "settings.json").write_text(json.dumps(settings, indent=1, ensure_ascii=False), encoding="utf-8")
    if method.tokens is not None:
        form = "a1111" if names in ("a1111", "kohya") else "diffusers"
        for path, tokens in one_file_each(method.tokens, out) if form == "a1111" else [(out / "embedding.safetensors", method.tokens)]:
            weights_loader.write_embedding(path, tokens, form, settings)
            yield "--embedding", path
    if method.lora is not None:
        weights_loader.write_lora(out / "lora.safetensors", method.lora, sd, names, settings)
        yield "--lora", out / "lora.safetensors"
    if method.custom_diffusion is not None:
        path = out / {"minidiff": "custom-diffusion.safetensors", "diffusers": "custom-diffusion", "original": "delta.bin"}[names]
        if path.is_dir():
            say([f"{path} is there already and is left as it is"])
        else:
            weights_loader.write_custom_diffusion(path, method.custom_diffusion, sd, None if names == "original" else settings)
        yield "--custom-diffusion", path
    if method.lora is method.tokens is method.custom_diffusion is None:
        weights_loader.save(sd, out / "model.safetensors")
        yield "--model", out / "model.safetensors"


def one_file_each(tokens, out: Path):
    """The web interfaces take one word a file."""
    from minidiff.adapters.tokens import NewTokens

    return [(out / f"{slug(word)}.safetensors", NewTokens({word: rows})) for word, rows in tokens.rows.items()]
