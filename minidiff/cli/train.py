"""`minidiff train METHOD`: from the flags to the files that a run ends in.

    flags over the preset -> check -> class pictures -> forecast -> steps, with sheets of pictures -> files, and the command that uses them

The methods are trainers/methods/table.py; their flags are made from their options (cli/flags.py). Whatever is wrong with what was asked
for raises before the first step, with nothing written. Imports that take long are inside the functions that need them.
"""

import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from minidiff.cli.effects import without_effect
from minidiff.cli.endings import readers, size_of
from minidiff.cli.flags import Attentions, DTypes, File, Several, Text, Whole, check_least, command_class, flag_groups, given, parse_flags
from minidiff.cli.model import load, print_notes, training_on
from minidiff.cli.names import check_folder, check_writable
from minidiff.cli.reference import Reference, draw_reference
from minidiff.trainers.methods.method import Method, MethodOptions
from minidiff.trainers.methods.options import Concept, PhaseOptions, family_of
from minidiff.trainers.methods.override import documented, override, places
from minidiff.trainers.methods.table import METHODS

if TYPE_CHECKING:
    import torch

    from minidiff.pipeline import StableDiffusion
    from minidiff.trainers.engine.loop import TrainStep
    from minidiff.trainers.methods.finetune_task import Phase, TrainingRun

SAMPLE_STEPS = 20
CONCEPT_NAMES = {"class" if name == "class_word" else name.replace("_", "-"): name for name in documented(Concept)}
EXAMPLE = 'images=DIR,token="<cat>",class=cat'


@dataclass(frozen=True, kw_only=True)
class RunFlags:
    """Where it is learned, and what is shown meanwhile. Stopped at any time, the same command resumes from the last save in --out.

    Args:
        out: folder of the run, where the files it ends in are written
        model: "tiny" (ships with minidiff), a .safetensors or .ckpt file, or a diffusers folder
        prediction: what the model predicts, eps or v, where its file is wrong about it
        ignore: a regular expression of unknown tensors in the model's file to leave out
        dtype: of the frozen weights; float32 by default, float16 or bfloat16 halve them on a GPU
        device: auto, cpu, cuda, cuda:1, mps
        attention: how it is computed: auto takes what is fastest; triton is this package's kernels, on a GPU
        threads: CPU threads to use; all cores by default
        sample_every: steps between two sheets of validation pictures, always on the same seeds; beside each the small file of what is
            learned so far; 0 for none but at the end
        sample_prompt: what they show; the first caption of each concept by default
        num_samples: how many pictures of each prompt
    """

    out: Annotated[Path, tyro.conf.arg(metavar="DIR")]
    model: str = "tiny"
    prediction: Literal["eps", "v"] | None = None
    ignore: Text = None
    dtype: DTypes = "auto"
    device: str = "auto"
    attention: Attentions = "auto"
    threads: Whole = None
    sample_every: int = 100
    sample_prompt: Several = ()
    num_samples: int = 4

    def check(self) -> None:
        """Raise ValueError for a number out of range."""
        check_least(0, sample_every=self.sample_every)
        check_least(1, num_samples=self.num_samples, threads=self.threads)


@dataclass(frozen=True)
class Job:
    """All that was asked for.

    Args:
        name: of the method
        options: the preset with the flags that were given
        concepts: what is learned, with the folders of class pictures
        run: where it is learned
        names: spelling of the files
        start_from: a file of an earlier result, to which the concepts are added
    """

    name: str
    options: MethodOptions
    concepts: list[Concept]
    run: RunFlags
    names: str
    start_from: Path | None


def train(name: str, args: list[str]) -> None:
    """Parse the flags of a method, train, and write what was learned."""
    method = METHODS[name]
    asked = vars(parse_flags(flag_class(method, low_rank="--low-rank" in args), f"train {name}", describe(method, name), args))
    run: RunFlags = asked["run"]
    run.check()
    check_folder(run.out)
    concepts = read_concepts(given([asked["concept"]], Concept), asked["more"], method.needs_images)
    with training_on(run.device, run.threads, run.attention) as device:
        sd = load(run.model, "float32" if run.dtype == "auto" else run.dtype, device, prediction=run.prediction, ignore=run.ignore)
        presets = method.low_rank_presets if asked.get("as_lora") else method.presets
        if (family := family_of(sd.config)) not in presets:
            raise ValueError(f"--model {run.model}: {name} is not taught to models like it ({family}); take one of {', '.join(presets)}")
        options = apply_flags(presets[family], method, asked)
        given_flags = {*given(option_flags(asked, method), method.options), *given([asked["concept"]], Concept)}
        print_notes(without_effect(given_flags, options, concepts))
        concepts = [with_class_folder(concept, i, run.out, options.phases()[-1]) for i, concept in enumerate(concepts, start=1)]
        learn(Job(name, options, concepts, run, asked.get("names", "diffusers"), asked.get("start_from")), sd, device)


def learn(job: Job, sd: "StableDiffusion", device: "torch.device") -> None:
    """Prepare the run, take its steps, write its files, and print the command that uses them."""
    from minidiff.cli.outputs import write_results
    from minidiff.trainers.engine.distributed import rank

    run = job.run
    with ExitStack() as stack:
        training = prepare(job, sd, stack)
        print_forecast(training, device)
        prompts = list(run.sample_prompt) or training.phases[0].prompts
        reference = None
        if METHODS[job.name].needs_images and rank() == 0:  # others have sheets of their own
            folders = [concept.images for concept in job.concepts]
            reference = draw_reference(sd, folders, prompts, count=run.num_samples, steps=SAMPLE_STEPS)
        try:
            take_steps(training, job, prompts, sd, device, reference)
        except KeyboardInterrupt:
            print_notes([f"stopped; the same command resumes from what is saved in {run.out}"])
            raise
        if rank() > 0:
            return
        written = list(write_results(training, sd, run.out, job.names, settings_of(job)))
        print_results(written, training, job, family_of(sd.config))
        flags = [text for flag, path in written for text in (flag, str(path))]
        model = [] if "--model" in flags or run.model == "tiny" else ["--model", run.model]
        for flag, value in (("--prediction", run.prediction), ("--ignore", run.ignore)):
            model += [flag, value] if model and value else []
        print(shlex.join(["minidiff", "generate", prompts[0], *model, *flags]))


def print_results(written: "list[tuple[str, Path]]", training: "TrainingRun", job: Job, family: str) -> None:
    """Print each file that was written, who else reads it, and where the last sheet is.

    Args:
        written: flags of generate, and the files that they take
        training: the run
        job: what was asked for
        family: of the model
    """
    for flag, path in written:
        known = readers(flag, job.names, family)
        print_notes([f"{path}: {size_of(path)}" + (f"; read by: {known}" if known else "")])
    last = training.phases[-1]
    if (sheet := job.run.out / f"{last.name}-{last.settings.steps:06d}.png").is_file():
        rows = ": your pictures, then for each prompt the untouched model and what was learned" if METHODS[job.name].needs_images else ""
        print_notes([f"{sheet}{rows}"])


def describe(method: Method[Any], name: str) -> str:
    """Return what a method does, with an example of its command."""
    return f"{method.summary}\n\n    minidiff train {name} {method.example} --out runs/{name}"


# --- flags ------------------------------------------------------------------------------------------------------------


def flag_class(method: Method[Any], low_rank: bool = False) -> type:
    """Make the class of all flags of a method. low_rank: --help shows the values of the presets behind --low-rank."""
    parts: dict[str, Any] = {"concept": flag_groups(Concept)["method"], "run": (RunFlags,)}
    if method.low_rank_presets:
        about = "train a LoRA instead of the U-Net: a small file in place of a whole checkpoint; with --help, show its presets"
        parts["as_lora"] = (Annotated[bool, tyro.conf.arg(name="low-rank", help=about)], False)
    if method.start_from:
        about = f"a {method.start_from.replace('_', ' ').title()} to which these concepts are added, learned before on the same model"
        parts["start_from"] = (Annotated[File, tyro.conf.arg(metavar="FILE", help=about)], None)
    if method.formats:
        about = "spelling of the files: " + "; ".join(f"{name}: {what}" for name, what in method.formats.items())
        parts["names"] = (Annotated[Literal[tuple(method.formats)], tyro.conf.arg(help=about)], next(iter(method.formats)))
    about = f"one more thing to learn, as {EXAMPLE}; it knows {', '.join(f'{name}=' for name in CONCEPT_NAMES)}"
    parts["more"] = (Annotated[Several, tyro.conf.arg(name="concept", help=about)], ())
    presets: dict[str, Any] = {**(method.low_rank_presets if low_rank else method.presets)}
    return command_class(parts | flag_groups(method.options, documented(Concept), presets))


def apply_flags(preset: MethodOptions, method: Method[Any], asked: dict[str, Any]) -> MethodOptions:
    """Return the preset with the flags that were given. Raises ValueError for one that these options have no place for."""
    changes = given(option_flags(asked, method), method.options)
    known = {flat.name for flat in places(preset)}
    lost = [name for name in changes if name not in known]
    if method.low_rank_presets and not asked["as_lora"] and asked.get("names") != next(iter(method.formats)):
        lost.append("names")
    if lost:
        raise ValueError(f"--{lost[0].replace('_', '-')} is of a LoRA; give --low-rank too, or leave it out")
    return override(preset, changes)


def option_flags(asked: dict[str, Any], method: Method[Any]) -> list[Any]:
    """Return those of the parsed parts that are flags of the method's options."""
    return [part for name, part in asked.items() if name in flag_groups(method.options)]


def read_concepts(values: dict[str, Any], more: tuple[str, ...], needed: bool = True) -> list[Concept]:
    """Return the concept of --images and its companions, and those of --concept. Raises ValueError where one is `needed` and missing."""
    if values and "images" not in values:
        raise ValueError(
            f"--{next(iter(values)).replace('_', '-')} without --images; give the folder of the pictures, or --concept {EXAMPLE}"
        )
    if not values and not more and needed:
        raise ValueError(f"nothing to learn; give --images DIR, or --concept {EXAMPLE}")
    return [*([Concept(**values)] if values else []), *(parse_concept(text) for text in more)]


def parse_concept(text: str) -> Concept:
    """Read 'images=cat,token=<cat>,class=cat' as a Concept; a comma within a value is one unless a known name and = follow."""
    parts = re.split(rf",?\b({'|'.join(sorted(CONCEPT_NAMES, key=len, reverse=True))})=", text)
    if parts[0] or len(parts) < 3:
        raise ValueError(f"--concept {text}: expected {EXAMPLE}; it knows {', '.join(CONCEPT_NAMES)}")
    names, values = parts[1::2], [value.strip('"') for value in parts[2::2]]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"--concept {text}: {twice[0]} is given twice")
    found: dict[str, Any] = {CONCEPT_NAMES[name]: value for name, value in zip(names, values) if value}
    if "images" not in found:
        raise ValueError(f"--concept {text}: no images=DIR")
    if found.get("captions", "no") not in ("yes", "no"):
        raise ValueError(f"--concept {text}: captions={found['captions']}; write yes or no")
    found["captions"] = found.get("captions") == "yes"
    for name in {"images", "class_images"} & found.keys():
        found[name] = Path(found[name])
    return Concept(**found)


# --- before the first step --------------------------------------------------------------------------------------------


def with_class_folder(concept: Concept, number: int, out: Path, options: PhaseOptions) -> Concept:
    """Give the concept a folder for class pictures within the run's folder, if they are to be made and it has none.

    Args:
        concept: what is learned
        number: of the concept, for the folder's name
        out: the run's folder
        options: the prior is read
    """
    has_folder = concept.class_images is not None or not options.prior.is_made
    return concept if has_folder else replace(concept, class_images=out / f"class-{number}")


def prepare(job: Job, sd: "StableDiffusion", stack: ExitStack) -> "TrainingRun":
    """Check everything, claim the folder of the run, fill the folders of class pictures, and put the run together.

    The folder is this run's alone until the stack is closed.
    Making class pictures may take long, so what can be wrong is found before: the run is put together without them first.
    """
    import weights_loader
    from minidiff.cli.outputs import result_names
    from minidiff.files import exclusive
    from minidiff.trainers.engine.distributed import barrier, rank
    from minidiff.trainers.methods.prior_preservation import class_caption

    last = job.options.phases()[-1]
    is_made = last.prior.is_made
    with warnings.catch_warnings():
        if is_made:
            warnings.simplefilter("ignore")  # they come again
            for concept in job.concepts:
                class_caption(concept, last.prompt)
        training = build(replace(job, options=override(job.options, {"prior": "none"})) if is_made else job, sd)
    if training.lora is not None:
        weights_loader.check_lora_names(training.lora, job.names)
    if rank() == 0:
        asked = {"method": job.name, "model": job.run.model, "names": job.names, "prediction": job.run.prediction, "ignore": job.run.ignore}
        claim(job.run.out, asked, result_names(training, job.names))
        stack.enter_context(exclusive(job.run.out))
        fill_class_folders(job, sd)
    barrier()
    return build(job, sd) if is_made else training


def build(job: Job, sd: "StableDiffusion") -> "TrainingRun":
    """Put the run together; raises for all that is wrong."""
    import weights_loader
    from minidiff.trainers.data.cache import Cache

    method = METHODS[job.name]
    more = {"start_from": getattr(weights_loader, f"read_{method.start_from}")(job.start_from, sd)} if job.start_from else {}
    return method.build(sd, job.concepts, job.options, Cache(job.run.out / "cache"), **more)


def claim(out: Path, asked: dict[str, str | None], names: list[str]) -> None:
    """Claim the folder for the run. Raises ValueError if it holds another's, or files that are no run's; OSError if it cannot be written.

    Args:
        out: the folder, which is made if it is not there
        asked: what makes the run this one
        names: of the files that it ends in
    """
    from minidiff.files import ensure_same_run

    held = [path.name for path in out.iterdir() if path.is_file() and not path.name.startswith(".")] if out.is_dir() else []
    if held and not (out / "run.json").exists():
        raise ValueError(f"--out {out}: holds {held[0]}, and no run; choose a new folder, or an empty one")
    try:
        ensure_same_run(out / "run.json", asked, defaults={name: asked.get(name) for name in ("prediction", "ignore")})
    except OSError as error:
        raise OSError(f"--out {out}: no folder to write to ({error.strerror}); choose another place") from error
    for name in names:
        check_writable(out / name)


def fill_class_folders(job: Job, sd: "StableDiffusion") -> None:
    """Fill the folders of class pictures, if the prior's are made, with a bar for each."""
    from tqdm import tqdm

    from minidiff.trainers.methods.prior_preservation import fill_class_images

    last = job.options.phases()[-1]
    for concept in job.concepts if last.prior.is_made else ():
        with tqdm(desc=f"class pictures in {concept.class_images}", total=last.prior.count, unit="picture", file=sys.stderr) as bar:
            for filled in fill_class_images(sd, concept, last, last.settings.seed):
                bar.update(filled.done - bar.n)


def print_forecast(training: "TrainingRun", device: "torch.device") -> None:
    """Make the latents, and print what is trained and how much memory it will take."""
    from tqdm import tqdm

    from minidiff.markdown import format_bytes
    from minidiff.trainers.engine.distributed import world_size
    from minidiff.trainers.engine.log import memory_taken
    from minidiff.trainers.engine.memory import estimate_memory

    for phase in training.phases:
        for _ in tqdm(phase.prepare(), desc="pictures to latents", unit="picture", file=sys.stderr, leave=False):
            pass
        taken = f"; {format_bytes(memory_taken(device))} are in use now" if device.type == "cpu" else ""
        with phase:
            memory = estimate_memory(phase, phase.settings, device)
        settings = phase.settings
        trained = sum(p.numel() for group in phase.groups for p in group.params)
        samples = settings.batch * settings.gradient_accumulation * world_size()
        how = f"{settings.steps} steps of {samples} samples, learning rate {settings.learning_rate:g}"
        print_notes([f"{phase.name}: {trained:,} numbers are trained on {phase.picture_count} pictures, {how}", f"{memory}{taken}"])


# --- steps ------------------------------------------------------------------------------------------------------------


def take_steps(
    training: "TrainingRun", job: Job, prompts: list[str], sd: "StableDiffusion", device: "torch.device", reference: Reference | None
) -> None:
    """Take the steps that are left, phase by phase.

    Args:
        training: the run
        job: its folder, and when to draw a sheet of pictures
        prompts: of the sheets, one per row
        sd: the model
        device: where it is trained
        reference: what the sheets show beside the results
    """
    phases = 0
    with closing(training.run(device, job.run.out)) as steps:
        for phase, own in groupby(steps, key=lambda pair: pair[0]):
            for done in show_phase(phase, (step for _, step in own), job.run, prompts, device, reference):
                keep_results(training, phase, sd, job, done)
            phases += 1
    if not phases:
        print_notes(["all steps were taken before; the files are written again; a larger --steps goes on from there"])


def show_phase(
    phase: "Phase", steps: "Iterator[TrainStep]", run: RunFlags, prompts: list[str], device: "torch.device", reference: Reference | None
) -> Iterator[int]:
    """Take the steps of one phase, with a bar, a log and sheets of pictures; yield how many are done after each sheet but the last.

    Args:
        phase: the phase's task
        steps: those that are left of it, at least one
        run: the flags of the run
        prompts, device, reference: as in `take_steps`
    """
    from tqdm import tqdm

    from minidiff.trainers.engine.distributed import rank
    from minidiff.trainers.engine.log import Log
    from minidiff.trainers.methods.finetune_task import averaged

    first, announced = next(steps), False
    bar = tqdm(desc=phase.name, total=first.steps, initial=first.done - 1, unit="step", file=sys.stderr)
    with Log(run.out, phase.name, device) as log, bar:
        for step in chain([first], steps):
            log.add(step)
            bar.update(step.done - bar.n)
            bar.set_postfix_str(log.text(), refresh=False)
            if not announced and log.pace.forecast() and bar.n - bar.initial >= 5:
                announced = True
                bar.write(f"minidiff: {log.pace.forecast()}", file=sys.stderr)
            is_due = step.done == step.steps or (run.sample_every and step.done % run.sample_every == 0)
            if is_due and rank() == 0:
                with averaged(phase):
                    numbers = save_sheet(phase, prompts, run, step.done, reference)
                    if numbers:
                        bar.write(f"minidiff: step {step.done}: {numbers}", file=sys.stderr)
                    if step.done < step.steps:
                        yield step.done


def keep_results(training: "TrainingRun", phase: "Phase", sd: "StableDiffusion", job: Job, done: int) -> None:
    """Write what the phase has learned so far beside its sheet, as lora-000100.safetensors; a whole model, which is large, is not kept.

    Args:
        training, sd, job: the run
        phase: its adapters are written
        done: steps that are over
    """
    from minidiff.cli.outputs import results_of

    for leftover in job.run.out.glob(".results-*"):  # of a run that was killed meanwhile; the folder is this run's alone
        rmtree(leftover, ignore_errors=True)
    with TemporaryDirectory(dir=job.run.out, prefix=".results-") as folder:
        for write, result in results_of(training):
            if any(result is adapter for adapter in getattr(phase, "adapters", ())):
                for _, path in write(result, sd, Path(folder), job.names, settings_of(job)):
                    target = job.run.out / f"{path.stem}-{done:06d}{path.suffix}"
                    if not target.is_dir():
                        path.rename(target)


def save_sheet(phase: "Phase", prompts: list[str], run: RunFlags, done: int, reference: Reference | None = None) -> str:
    """Write a sheet of pictures, one row per prompt, and a line of what was measured on it, if anything was, to NAME-sheets.csv.

    Args:
        phase: draws the pictures
        prompts: one per row
        run: how many in a row, and the folder
        done: steps that are over
        reference: rows to show beside them

    Return what was measured, as text.
    """
    from minidiff.files import write_text
    from minidiff.pictures import save_png

    sheet = phase.sheet(prompts, count=run.num_samples, steps=SAMPLE_STEPS)
    save_png(reference.beside(sheet.image) if reference else sheet.image, run.out / f"{phase.name}-{done:06d}.png")
    if sheet.numbers:
        path = run.out / f"{phase.name}-sheets.csv"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else [",".join(["step", *sheet.numbers])]
        lines.append(",".join([str(done), *(f"{value:.4f}" for value in sheet.numbers.values())]))
        write_text(path, "\n".join(lines) + "\n")
    return ", ".join(f"{name} {value:.2f}" for name, value in sheet.numbers.items())


def settings_of(job: Job) -> dict[str, object]:
    """Return all that was asked for, for the metadata of the files; of folders their names alone, for files are passed on."""
    named = [{k: value.name if isinstance(value, Path) else value for k, value in asdict(concept).items()} for concept in job.concepts]
    options: Any = job.options  # a dataclass
    values = {k: value.name if isinstance(value, Path) else value for k, value in asdict(options).items()}
    return {"method": job.name, "model": Path(job.run.model).name, "concepts": named, **values}
