"""A run of `minidiff train METHOD`, from what was asked for to the files that it ends in.

    check everything -> class pictures -> memory told -> steps, with sheets of pictures -> files, and the command that uses them

The methods themselves are trainers/methods/common.py. Imports that take long stand inside the functions that need them.
"""

import json
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from minidiff.cli.flags import Run, What
from minidiff.cli.model import load, say, slug, training_on
from minidiff.trainers.methods.options import Concept, Family, Options, PivotalOptions, Prior, family_of

if TYPE_CHECKING:
    import torch

    from minidiff.adapters.tokens import NewTokens
    from minidiff.pipeline import StableDiffusion
    from minidiff.trainers.data.cache import Cache
    from minidiff.trainers.methods.common import TrainingRun
    from minidiff.trainers.methods.finetuning import FinetuneTask, Subject

SAMPLE_STEPS = 20
FILLED = ("generated", "scenes")  # kinds of prior whose class pictures are made


def learn(
    method: str, what: What, run: Run, options: Callable[[Family], Options], names: str = "diffusers", start_from: Path | None = None
) -> None:
    """Checks, trains and writes. Whatever is wrong with what was asked for raises before the first step."""
    from minidiff.trainers.data.cache import Cache
    from minidiff.trainers.engine.distributed import barrier, rank

    run.check()
    concepts = what.concepts()
    with training_on(run.device, run.threads, run.attention) as device:
        sd = load(run.model, "float32" if run.dtype == "auto" else run.dtype, device, prediction=run.prediction)
        options = options(family_of(sd.config))
        concepts = [with_class_folder(concept, i, run.out, prior_of(options)) for i, concept in enumerate(concepts, start=1)]
        asked = {"method": method, "model": run.model, "names": names}
        if prior_of(options).kind in FILLED:
            check(method, sd, concepts, options, start_from)
            if rank() == 0:
                claim(run.out, asked)
                fill_class_folders(sd, concepts, options)
            barrier()
        made = build(method, sd, concepts, options, Cache(run.out / "cache"), start_from)
        if rank() == 0:
            claim(run.out, asked)
        barrier()
        forecast(made, device)
        prompts = list(run.sample_prompt) or [first_caption(subject) for subject in made.phases[0].subjects]
        try:
            steps(made, run, prompts, device)
        except KeyboardInterrupt:
            say([f"stopped; the same command goes on from what is saved in {run.out}"])
            raise
        if rank() == 0:
            settings = settings_of(method, run.model, concepts, options)
            flags = [text for flag, path in write(made, sd, run.out, names, settings) for text in (flag, str(path))]
            model = [] if "--model" in flags or run.model == "tiny" else ["--model", run.model]
            prediction = ["--prediction", run.prediction] if model and run.prediction else []
            print(shlex.join(["minidiff", "generate", prompts[0], *model, *prediction, *flags]))


def first_caption(subject: "Subject") -> str:
    return (subject.templates or (subject.pictures.examples[0].caption,))[0]


def build(
    method: str, sd: "StableDiffusion", concepts: list[Concept], options: Options, cache: "Cache | None", start_from: Path | None
) -> "TrainingRun":
    """The method put together; raises for all that is wrong."""
    import weights_loader
    from minidiff.trainers.methods import common

    if method == "custom-diffusion":
        before = None if start_from is None else weights_loader.read_custom_diffusion(start_from, sd)
        return common.custom_diffusion(sd, concepts, options, cache, before)
    functions = {
        "lora": common.lora,
        "dreambooth": common.dreambooth,
        "textual-inversion": common.textual_inversion,
        "pivotal-tuning": common.pivotal,
        "fine-tune": common.fine_tune,
    }
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
    from minidiff.trainers.methods.common import class_caption

    pivotal = isinstance(options, PivotalOptions)
    bare = replace(options, lora=replace(options.lora, prior=Prior())) if pivotal else replace(options, prior=Prior())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they come again
        build(method, sd, concepts, bare, None, start_from)
    for concept in concepts:
        class_caption(concept, class_prompt_of(options))


def class_prompt_of(options: Options) -> str:
    return options.lora.prompt if isinstance(options, PivotalOptions) else options.prompt


def claim(out: Path, asked: dict[str, str]) -> None:
    """Claim the folder for the run. Raises ValueError if it holds another's, OSError for a file."""
    from minidiff.files import ensure_same_run

    try:
        ensure_same_run(out / "run.json", asked)
    except OSError as error:
        raise OSError(f"--out {out}: no folder to write to ({error.strerror}); choose another place") from error


def fill_class_folders(sd: "StableDiffusion", concepts: list[Concept], options: Options) -> None:
    from tqdm import tqdm

    from minidiff.trainers.methods.common import fill_class_images

    prior = prior_of(options)
    phase = options.lora if isinstance(options, PivotalOptions) else options
    for concept in concepts:
        with tqdm(desc=f"class pictures in {concept.class_images}", total=prior.count, unit="picture", file=sys.stderr) as bar:
            for filled in fill_class_images(sd, concept, prior, class_prompt_of(options), phase.samples, phase.settings.seed):
                bar.update(filled.i - bar.n)


def forecast(method: "TrainingRun", device: "torch.device") -> None:
    """What is trained, and how much memory it will take; the latents are made on the way."""
    from tqdm import tqdm

    from minidiff.markdown import format_bytes
    from minidiff.trainers.engine.distributed import world_size
    from minidiff.trainers.engine.log import memory_taken
    from minidiff.trainers.engine.memory import estimate_memory

    for phase in method.phases:
        for _ in tqdm(phase.prepare(), desc="pictures to latents", unit="picture", file=sys.stderr, leave=False):
            pass
        taken = f"; this process has taken {format_bytes(memory_taken(device))} so far, the model among it" if device.type == "cpu" else ""
        with phase:
            memory = estimate_memory(phase, phase.settings, device)
        settings = phase.settings
        trained = sum(p.numel() for group in phase.groups for p in group.params)
        pictures = sum(len(subject.pictures) for subject in phase.subjects)
        samples = settings.batch * settings.gradient_accumulation * world_size()
        how = f"{settings.steps} steps of {samples} samples, learning rate {settings.learning_rate:g}"
        say([f"{phase.name}: {trained:,} numbers are trained on {pictures} pictures, {how}", f"{memory}{taken}"])


def steps(method: "TrainingRun", run: Run, prompts: list[str], device: "torch.device") -> None:
    """Takes the steps that are left, with a bar, a log and sheets of pictures."""
    from tqdm import tqdm

    from minidiff.trainers.engine.distributed import rank
    from minidiff.trainers.engine.log import Log

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
            if due and rank() == 0:
                save_sheet(phase, prompts, run.samples, run.out / f"{phase.name}-{step.i:06d}.png")
    if shown is None:
        say(["all steps were taken before; the files are written again"])


def save_sheet(phase: "FinetuneTask", prompts: list[str], count: int, path: Path) -> None:
    """A row for each prompt, the same seeds every time."""
    from minidiff.pictures import grid, save_png

    columns = [phase.pictures(prompts, seed=seed, steps=SAMPLE_STEPS) for seed in range(count)]
    save_png(grid([column[row] for row in range(len(prompts)) for column in columns], columns=count), path)


# --- the end ----------------------------------------------------------------------------------------------------------


def settings_of(method: str, model: str, concepts: list[Concept], options: Options) -> dict[str, object]:
    """All that was asked for, for the metadata of the files; of folders their names alone, for files are passed on."""
    named = [{name: value.name if isinstance(value, Path) else value for name, value in asdict(concept).items()} for concept in concepts]
    return {"method": method, "model": Path(model).name, "concepts": named, **asdict(options)}


def write(method: "TrainingRun", sd: "StableDiffusion", out: Path, names: str, settings: dict[str, object]) -> Iterator[tuple[str, Path]]:
    """Writes what was learned, and gives each file with the flag of `generate` that takes it. All settings stand in settings.json too."""
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
        weights_loader.save(sd, out / "model.safetensors", settings=settings)
        yield "--model", out / "model.safetensors"


def one_file_each(tokens: "NewTokens", out: Path) -> list[tuple[Path, "NewTokens"]]:
    """The web interfaces take one word a file."""
    from minidiff.adapters.tokens import NewTokens

    return [(out / f"{slug(word)}.safetensors", NewTokens({word: rows})) for word, rows in tokens.rows.items()]
