"""What the page of `minidiff play` does with the model: draws step by step, teaches, and remembers what was learned.

    Request  -> Studio.draw  -> Film: x0_hat and the attention to each word, after each step
    pictures -> Studio.teach -> Progress: steps, loss, sheets -> Learned, which has a weight

Both are generators, to be taken through `run_alone`: the model is loaded once, and one job at a time has it. Nothing here knows the page.
"""

import shutil
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from queue import Queue
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any

from minidiff import __version__
from minidiff.cli.advice import syntax_notes, word_notes
from minidiff.cli.again import sampler_of
from minidiff.cli.names import free_path, slug
from minidiff.cli.outputs import write_results
from minidiff.cli.reference import draw_reference
from minidiff.cli.train import Job, RunFlags, build, claim, settings_of, with_class_folder
from minidiff.trainers.methods.options import Concept, family_of
from minidiff.trainers.methods.override import override
from minidiff.trainers.methods.table import METHODS, preset

if TYPE_CHECKING:
    import torch
    from PIL import Image
    from torch import Tensor

    from minidiff.pipeline import StableDiffusion
    from minidiff.trainers.methods.finetune_task import TrainingRun

    Numbers = list[tuple[torch.nn.Parameter, Tensor, Tensor]]  # parameters with their start and their end, on the CPU

LOW_RANK = "-lora"  # behind a method's name: a LoRA in place of the model's weights, from its presets for --low-rank
NAMES = {"--lora": "LoRA", "--embedding": "Embedding", "--custom-diffusion": "Custom Diffusion", "--model": "Model"}  # in a PNG, by flag
SHEETS, COLUMNS, SHEET_STEPS = 4, 2, 20  # sheets of a phase, pictures of a prompt, and sampler steps of each


@dataclass(frozen=True)
class Request:
    """A picture that is asked for. learned: the name of what was taught, "" for the model as it was loaded."""

    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 30
    guidance_scale: float = 4.0
    sampler: str = "ddim"
    learned: str = ""
    weight: float = 1.0


@dataclass(eq=False, repr=False)
class Film:
    """A picture on its way.

    words: of the prompt, with the positions of their tokens. frames: x0_hat after each step, as pixels in [-1, 1]. maps: after each step,
    how much each cell of the latent attends to each word. file: the finished picture.
    """

    words: list[tuple[str, list[int]]]
    notes: list[str]
    frames: "list[Tensor]" = field(default_factory=list)
    maps: "list[Tensor]" = field(default_factory=list)
    file: Path | None = None

    def picture(self, step: int) -> "Image.Image | Path":
        """Return x0_hat after a step, from 1; after the last one the finished file, so that its download has the settings."""
        from minidiff.pipeline import to_images

        return self.file if self.file and step == len(self.frames) else to_images(self.frames[step - 1])[0]

    def attention(self, word: int, step: int) -> "Image.Image":
        """Return x0_hat after a step, from 1, bright where it attends to a word, the first of which is 0."""
        from minidiff.heat_maps import lay_over
        from minidiff.pipeline import to_images

        return to_images(lay_over(self.frames[step - 1], self.maps[step - 1][word : word + 1]))[0]


@dataclass(frozen=True, eq=False)
class Learned:
    """What was taught, to be put on the model and taken off.

    The weight is the LoRA's, if there is one; a word that came with it stays as learned. Of other methods, the trained numbers are put
    between where they started, at 0, and where they ended, at 1.

    Args:
        name: of its folder
        prompt: one that asks for it
        training: its results
        files: flags of generate, and what they take
        numbers: what was trained, of methods without a LoRA
    """

    name: str
    prompt: str
    training: "TrainingRun"
    files: tuple[tuple[str, Path], ...]
    numbers: "Numbers"

    def put_on(self, sd: "StableDiffusion", weight: float) -> None:
        """Let the model compute with it."""
        import torch

        for p, start, end in self.numbers:
            p.data.copy_(torch.lerp(start, end, weight))  # exact at 0 and 1
        if self.training.lora is not None:
            self.training.lora.weight = weight
        for adapter in self._adapters():
            adapter.attach(sd)

    def take_off(self) -> None:
        """Leave the model as it was, bit for bit."""
        for adapter in reversed(self._adapters()):
            adapter.detach()
        for p, start, _ in self.numbers:
            p.data.copy_(start)

    def _adapters(self) -> list[Any]:
        found = (self.training.tokens, self.training.custom_diffusion, self.training.lora)
        return [adapter for adapter in found if adapter is not None]

    def settings(self, weight: float) -> dict[str, object]:
        """Return what a picture's PNG says of it: files under the names that `generate --settings` reads, a LoRA's with its weight."""
        values: dict[str, Any] = {}
        for flag, path in self.files:
            text = f"{path}:{weight:g}" if flag == "--lora" and weight != 1 else str(path)
            values[NAMES[flag]] = (*values.get(NAMES[flag], ()), text)
        return {**values, "Learned": self.name, "Learned weight": weight}


@dataclass(frozen=True, eq=False)
class Progress:
    """How far teaching is. share: of what the text is about, 0 to 1. sheet: where there is a new one. learned: at the end."""

    text: str
    share: float
    sheet: "Image.Image | None" = None
    learned: Learned | None = None


class Studio:
    """The model, what it was taught so far, and the job that uses it.

    model: its name, as --model takes it. out: folder for pictures and for what is learned.
    """

    def __init__(self, sd: "StableDiffusion", model: str, out: Path):
        self.sd, self.model, self.out = sd, model, out
        self.learned: dict[str, Learned] = {}
        self.on: Learned | None = None
        self.alone, self.stopped = Lock(), Event()

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def run_alone(self, job: Generator[Any, None, None]) -> Iterator[Any]:
        """Yield what a job yields, and raise what it raises. It has a thread of its own, and the model for itself.

        Closed before the end, this stops the job after its step.
        """
        updates, stopped = Queue[tuple[str, Any]](), Event()

        def work() -> None:
            with self.alone, closing(job):
                self.stopped = stopped
                try:
                    for update in job:
                        updates.put(("update", update))
                except Exception as error:
                    updates.put(("error", error))
            updates.put(("end", None))

        Thread(target=work, daemon=True).start()
        try:
            while (said := updates.get())[0] != "end":
                if said[0] == "error":
                    raise said[1]
                yield said[1]
        finally:
            stopped.set()

    def stop(self) -> None:
        """Let the job that runs end after its step."""
        self.stopped.set()

    def use(self, name: str = "", weight: float = 1.0) -> None:
        """Put what was learned on the model, in place of what is on it; "", or a weight of 0, leaves the model as it was loaded.

        Raises ValueError for what was not learned here.
        """
        if self.on is not None:
            self.on.take_off()
            self.on = None
        if name and name not in self.learned:
            raise ValueError(f"{name!r} was not learned here; choose {', '.join(self.learned) or 'nothing'}")
        if name and weight:
            self.learned[name].put_on(self.sd, weight)
            self.on = self.learned[name]

    # --- drawing ------------------------------------------------------------------------------------------------------

    def draw(self, request: Request) -> Generator[Film, None, None]:
        """Draw a picture; yield its film after each step, the last time with the file. Raises ValueError as `denoise` does."""
        import torch

        from minidiff.attention_maps import with_attention_maps, word_map
        from minidiff.editing.prompt_weights import parse_weights, weighted_side
        from weights_loader.contents import BUNDLED

        sd = self.sd
        self.use(request.learned, request.weight)
        plain = "".join(part.text for part in parse_weights(request.prompt))
        fits = len(sd.tokenizer.encode(plain)) <= sd.config.tokenizer.context_length - 2
        film = Film(sd.tokenizer.words(plain) if fits else [], list(syntax_notes([request.prompt])))
        film.notes += [] if fits else ["no attention to words: the prompt is longer than what the model reads at once"]
        film.notes += word_notes([request.prompt], sd.tokenizer.added) if self.model in BUNDLED and not self.on else []
        trajectory = sd.denoise(
            request.prompt,
            steps=request.steps,
            sampler=request.sampler,
            guidance_scale=request.guidance_scale,
            negative_prompt=request.negative_prompt or None,
            seeds=[request.seed],
            text=weighted_side(sd.text),
        )
        for step in with_attention_maps(trajectory, sd.unet):
            maps = [word_map(step.attention_maps or {}, places, (step.x_t.shape[2], step.x_t.shape[3])) for _, places in film.words]
            film.maps.append(torch.cat(maps).float().cpu() if maps else torch.empty(0))
            film.frames.append(sd.decode(step.x0_hat).cpu())
            if len(film.frames) == request.steps:
                film.file = self._write(request, sd.decode(step.x_t))
            elif self.stopped.is_set():
                film.notes.append(f"stopped after step {len(film.frames)} of {request.steps}")
                yield film
                return
            yield film

    def _write(self, request: Request, pixels: "Tensor") -> Path:
        from minidiff.pictures import save_png
        from minidiff.pipeline import to_images
        from minidiff.png_settings import picture_settings

        self.out.mkdir(parents=True, exist_ok=True)
        file = free_path(self.out / f"{slug(request.prompt)}-{request.seed}.png")
        save_png(to_images(pixels)[0], file, picture_settings([request.prompt], request.negative_prompt, self.settings(request)))
        return file

    def settings(self, request: Request) -> dict[str, object]:
        """Return what the PNG of a picture says, under the names of web interfaces, for `recall` and for `minidiff generate --settings`."""
        from minidiff.samplers import SAMPLERS

        row, (width, height) = SAMPLERS[request.sampler], self.sd.pixel_size(None)
        values: dict[str, object] = {
            "Steps": request.steps,
            "Sampler": row.web_name,
            "Schedule type": row.web_schedule or row.own_spacing,
            "CFG scale": request.guidance_scale,
            "Seed": request.seed,
            "Size": f"{width}x{height}",
            "Model": self.model,
            "Spacing": None if row.own_spacing else self.sd.config.schedule.spacing,
            "RNG": "CPU",
            "dtype": str(self.sd.dtype).removeprefix("torch."),
            "Version": f"minidiff {__version__}",
        }
        return values | (self.learned[request.learned].settings(request.weight) if request.learned and request.weight else {})

    def recall(self, file: Path) -> tuple[Request, list[str]]:
        """Return the request that a PNG was made from, and notes on what it has that is not here. Raises ValueError without settings."""
        from minidiff.png_settings import parse, picture_settings, read_parameters

        found = parse(read_parameters(file)[0])
        if found is None:
            raise ValueError(f"{file.name}: no settings in it; give a PNG as this page, generate or a web interface wrote it")
        usual = self.settings(Request("", guidance_scale=self.sd.config.guidance_scale))
        values = {name: str(usual[name]) for name in ("Steps", "Sampler", "CFG scale", "Seed")} | {"Learned weight": "1", **found.values}
        sampler = sampler_of(file, values.pop("Sampler"), values.pop("Schedule type", None))
        learned = name if (name := values.get("Learned", "")) in self.learned else ""
        numbers = {name: values.pop(name) for name in ("Seed", "Steps", "CFG scale", "Learned weight")}
        try:
            seed, steps, scale, weight = int(numbers["Seed"]), int(numbers["Steps"]), *map(float, list(numbers.values())[2:])
        except ValueError:
            raise ValueError(f"{file.name}: {', '.join(f'{name} {value}' for name, value in numbers.items())}: expected numbers") from None
        request = Request(" | ".join(found.prompts), found.negative_prompt, seed, steps, scale, sampler, learned, weight)
        ours = parse(picture_settings([""], "", self.settings(request)))
        left = [f"{name}: {value}" for name, value in values.items() if name != "Version" and ours and ours.values.get(name) != value]
        notes = [f"not taken over: {', '.join(left)}"] if left else []
        return request, notes + ["its noise was not drawn on a CPU, so the picture will be another one"] * (values.get("RNG") != "CPU")

    # --- teaching -----------------------------------------------------------------------------------------------------

    def methods(self) -> dict[str, Any]:
        """Return the methods that learn from pictures of a thing, by name, with their presets for this model."""
        family = family_of(self.sd.config)
        usable = {name: method for name, method in METHODS.items() if method.needs_images}
        names = [name for name, method in usable.items() if family in method.presets]
        names += [name + LOW_RANK for name, method in usable.items() if family in method.low_rank_presets]
        return {name: preset(name, family) for name in names}

    def teach(self, pictures: Sequence[Path], name: str, token: str, class_word: str, steps: int) -> Generator[Progress, None, None]:
        """Train a method on pictures; yield the progress, and at the end what was learned. Stopped or failed, it leaves nothing behind.

        Args:
            pictures: of the thing, three to five or more
            name: of the method, as in `methods`
            token: the new name of the thing
            class_word: what kind of thing it is
            steps: of the method's last phase

        Raises ValueError for what the method refuses.
        """
        self.use()
        if not pictures:
            raise ValueError("no pictures to learn from; drop three to five of one thing")
        method, folder = name.removesuffix(LOW_RANK), free_path(self.out / slug(f"{name} {token or class_word}"))
        options = override(self.methods()[name], {"steps": steps})
        concept = Concept(images=folder / "pictures", token=token, class_word=class_word)
        names = next(iter(METHODS[method].formats), "diffusers")
        concepts = [with_class_folder(concept, 1, folder, options.phases()[-1])]
        job, started, learned = Job(method, options, concepts, RunFlags(out=folder, model=self.model), names, None), [], None
        try:
            concept.images.mkdir(parents=True)
            for i, picture in enumerate(pictures):
                shutil.copy(picture, concept.images / f"{i}{picture.suffix}")
            yield from self._make_class_pictures(job)
            if self.stopped.is_set():
                return
            training = build(job, self.sd)
            own = training.phases if training.lora is None else ()
            started += [(p, p.detach().cpu().clone()) for phase in own for group in phase.groups for p in group.params]
            yield from self._take_steps(training, job)
            if self.stopped.is_set():
                return
            files = tuple(write_results(training, self.sd, folder, names, settings_of(job)))
            numbers = [(p, start, p.detach().cpu().clone()) for p, start in started]
            learned = Learned(folder.name, training.phases[-1].prompts[0], training, files, numbers)
            self.learned[learned.name] = learned
        finally:
            for p, start in started:
                p.data.copy_(start)
            if learned is None:
                shutil.rmtree(folder, ignore_errors=True)
        yield Progress(f"{folder.name}: learned, in {folder}", 1, learned=learned)

    def _make_class_pictures(self, job: Job) -> Iterator[Progress]:
        """Find what is wrong with the job, claim its folder, and make the class pictures that its options ask for."""
        from minidiff.trainers.methods.prior_preservation import fill_class_images

        last = job.options.phases()[-1]
        build(Job(job.name, override(job.options, {"prior": "none"}), job.concepts, job.run, job.names, None), self.sd)
        claim(job.run.out, {"method": job.name, "model": job.run.model, "names": job.names}, [])
        for filled in fill_class_images(self.sd, job.concepts[0], last, last.settings.seed) if last.prior.is_made else ():
            yield Progress(f"class pictures: {filled.done} of {last.prior.count}", filled.done / last.prior.count)
            if self.stopped.is_set():
                return

    def _take_steps(self, training: "TrainingRun", job: Job) -> Iterator[Progress]:
        """Take the steps of all phases, with a few sheets of each; stopped, end after a step."""
        from minidiff.trainers.engine.log import Log
        from minidiff.trainers.methods.finetune_task import averaged

        sd, folder, prompts = self.sd, job.run.out, training.phases[-1].prompts
        yield Progress("drawing what the untouched model makes of the words", 0)
        reference = draw_reference(sd, [job.concepts[0].images], prompts, count=COLUMNS, steps=SHEET_STEPS)
        with closing(training.run(sd.device, folder)) as run:
            for phase, own in groupby(run, key=lambda pair: pair[0]):
                with Log(folder, phase.name, sd.device) as log:
                    for _, step in own:
                        log.add(step)
                        sheet = None
                        if step.done % -(-step.steps // SHEETS) == 0 or step.done == step.steps:
                            with averaged(phase):
                                sheet = reference.beside(phase.sheet(prompts, count=COLUMNS, steps=SHEET_STEPS).image)
                        text = f"{phase.name}: step {step.done} of {step.steps}, {log.text()}"
                        yield Progress(text, step.done / step.steps, sheet)
                        if self.stopped.is_set():
                            return
