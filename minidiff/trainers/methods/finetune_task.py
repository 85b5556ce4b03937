"""What all training methods have in common: one task, in which a method says what is trained and which words go with which pictures.

    subject's pictures -. captions, or templates -> text encoder -> context -.
    prior's pictures ---' latents ----------------- q_sample ----> x_t ------+--> U-Net -> loss of the subject + weight * loss of the prior

The loss is latent diffusion's (diffusion_loss.py). Prior preservation: where prior pictures are given, each sample brings one of them into
the same batch (DreamBooth, Ruiz et al. 2023, eq. 2). What a frozen encoder gives is made once; the text encoder runs in each step only
where it, or a word, is trained or has an adapter on it.

    run = TrainingRun((task,), lora=lora)
    for phase, step in run.run(device, folder): ...     # within each phase its adapters are on the model
"""

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from minidiff.adapters.base import Adapter
from minidiff.adapters.custom_diffusion import CustomDiffusion
from minidiff.adapters.dropout import set_row_seeds
from minidiff.adapters.lora import LoRA
from minidiff.adapters.tokens import NewTokens
from minidiff.conditioning import Conditioning
from minidiff.controlnet import Control
from minidiff.files import digest, fingerprint
from minidiff.pictures import grid
from minidiff.pipeline import StableDiffusion
from minidiff.trainers.data.cache import Batch, Cache, Pictures, cached_texts
from minidiff.trainers.engine.diffusion_loss import diffusion_loss, sample_noise
from minidiff.trainers.engine.ema import EMA
from minidiff.trainers.engine.loop import Task, Training, TrainStep, rng_for
from minidiff.trainers.engine.optimizer import adamw
from minidiff.trainers.engine.settings import Settings
from minidiff.trainers.methods.options import PhaseOptions
from minidiff.trainers.methods.prior_preservation import prior_preservation_loss
from minidiff.transfer import to_device


@dataclass(frozen=True, eq=False)
class Subject:
    """What is learned. templates: captions, one at random for each sample, in place of the pictures' own. prior: class pictures."""

    pictures: Pictures
    templates: tuple[str, ...] = ()
    prior: Pictures | None = None


@dataclass(frozen=True, eq=False)
class Group:
    """Parameters that learn at `scale` times the learning rate."""

    params: tuple[nn.Parameter, ...]
    scale: float = 1.0


@dataclass(frozen=True, eq=False)
class Sheet:
    """Pictures to look at during training, and what was measured on them."""

    image: Image.Image
    numbers: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Piece:
    """Samples of one subject and one shape, or class pictures of theirs, and the generator of each."""

    batch: Batch
    rngs: tuple[np.random.Generator, ...]
    is_prior: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Return (C, h, w) of its latents."""
        return tuple(self.batch.latents.shape[1:])


class FinetuneTask:
    """A Task of loop.py: one phase of a method. Within `with task:` the adapters are on the model and the groups can learn.

    Outside the block sd is as it was, but for those of its own weights that were trained; nothing of it requires a gradient.
    Raises ValueError for prior pictures of some subjects only.

    Args:
        sd: the model
        name: of the phase
        subjects: each is as likely for a sample
        options: settings, data and the prior's weight are read
        modules: as in Task: adapters, or parts of sd itself, by name
        adapters: those on the model meanwhile, also without being trained
        groups: what is trained of the modules
        cache: of latents and contexts; None keeps them in memory
    """

    def __init__(
        self,
        sd: StableDiffusion,
        name: str,
        subjects: Sequence[Subject],
        options: PhaseOptions,
        *,
        modules: Mapping[str, nn.Module],
        adapters: Sequence[Adapter],
        groups: Sequence[Group],
        cache: Cache | None = None,
    ):
        if len({subject.prior is None for subject in subjects}) > 1:
            raise ValueError("class pictures for some of the concepts, and none for others; give them for all or for none")
        if sd.config.unet.in_channels != sd.config.vae.latent_channels:
            raise ValueError(
                f"this U-Net has {sd.config.unet.in_channels} input channels: an inpainting model; load a text-to-image checkpoint"
            )
        self.sd, self.name, self.subjects = sd, name, tuple(subjects)
        self.modules, self.adapters, self.groups = dict(modules), tuple(adapters), tuple(groups)
        self.trained = [p for group in self.groups for p in group.params]
        self.settings, self.data, self.prior_weight = options.settings, options.data, options.prior.weight
        self.has_prior = any(subject.prior is not None for subject in subjects)
        self.cache = cache or Cache()
        self.averages: Mapping[str, EMA] = {}  # by module, while the run keeps some: the weights that are its result
        self.contexts: dict[str, Conditioning] | None = None  # by caption; None: the text encoders run in every step
        self.about: dict[str, object] = {"phase": name, "prior weight": self.prior_weight, "data": self._digest()}
        self.about |= {"model": fingerprint(sd.unet.conv_in)} | asdict(self.data)

    # --- before and after ---------------------------------------------------------------------------------------------

    def prepare(self) -> Iterator[int]:
        """Make the latents that can be precomputed, one picture an iteration; `with task:` does it too, without saying how far it is."""
        pictures_done = (pictures.precompute_latents() for pictures in self._all_pictures())
        for done, _ in enumerate(chain.from_iterable(pictures_done), start=1):
            yield done

    def __enter__(self) -> "FinetuneTask":
        for _ in self.prepare():
            pass
        for module in (self.sd.unet, *self.sd.text.encoders.values(), *self.adapters):
            module.requires_grad_(False)
        try:
            for adapter in self.adapters:
                adapter.attach(self.sd)
                adapter.train()  # dropout
            for p in self.trained:
                p.requires_grad_(True)
            self._precompute_contexts()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for adapter in reversed(self.adapters):
            adapter.detach()
            adapter.eval()
            set_row_seeds(adapter, None)
        for p in self.trained:
            p.requires_grad_(False)
            p.grad = None
        self.contexts = None

    def _precompute_contexts(self) -> None:
        captions = sorted({caption for subject in self.subjects for caption in possible_captions(subject)} | {""})
        rows = self.sd.tokenizer(captions)  # warns of what is cut off, before the first step
        encoders = self.sd.text.encoders.values()
        parts = [part for encoder in encoders for part in encoder.modules()]
        moving = any(p.requires_grad for encoder in encoders for p in encoder.parameters()) or any(part._forward_hooks for part in parts)
        if not moving and rows.max() < self.sd.text_encoder.config.vocab_size:
            kept = cached_texts(self.sd, self.cache, captions)
            self.contexts = {caption: kept[i : i + 1] for i, caption in enumerate(captions)}

    def _all_pictures(self) -> list[Pictures]:
        return [pictures for subject in self.subjects for pictures in (subject.pictures, subject.prior) if pictures is not None]

    def _digest(self) -> str:
        """Return a digest of captions and pictures: a run does not resume with others."""
        captions = (repr((subject.templates, subject.pictures.sizes)).encode() for subject in self.subjects)
        examples = (example for pictures in self._all_pictures() for example in pictures.examples)
        return digest(chain(captions, (f"{example.caption}\n".encode() + example.path.read_bytes() for example in examples)))[:16]

    # --- what the loop asks for ---------------------------------------------------------------------------------------

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        """Return the modules that the loss runs through."""
        return (self.sd.unet,) if self.contexts is not None else (self.sd.unet, *self.sd.text.encoders.values())

    @property
    def resident(self) -> tuple[nn.Module, ...]:
        """Return the modules that are on the device: the whole model, which the sheets need, and the adapters."""
        return (*self.sd.parts.values(), *self.adapters)

    def optimizers(self, settings: Settings) -> tuple[torch.optim.Optimizer, ...]:
        """Return AdamW over the groups."""
        return (adamw([{"params": list(group.params), "scale": group.scale} for group in self.groups], settings),)

    def loss(self, step: int, sample_ids: range) -> Float[Tensor, ""]:
        """Return the mean over the samples of the subject's loss, plus the prior's weight times that of its class picture."""
        pieces = self._draw([rng_for(self.settings.seed, step, sample) for sample in sample_ids])
        subject, prior = [], []
        # Sorted, so that what a generator gives to a sample and its class picture does not depend on the rest of the batch.
        for shape in sorted({piece.shape for piece in pieces}):
            rows = [piece for piece in pieces if piece.shape == shape]
            losses = self._losses(Batch.concatenate([piece.batch for piece in rows]), [rng for piece in rows for rng in piece.rngs])
            for piece, own in zip(rows, losses.split([len(piece.rngs) for piece in rows])):
                (prior if piece.is_prior else subject).append(own)
        return prior_preservation_loss(torch.cat([*subject, *prior]), len(sample_ids), self.prior_weight)

    def _losses(self, batch: Batch, rngs: Sequence[np.random.Generator]) -> Float[Tensor, " N"]:
        """Return the loss of each row of a batch of one shape; its generator draws timestep and noise."""
        sd = self.sd
        noise = sample_noise(rngs, batch.latents.shape[1:], sd.config.schedule.timesteps, sd.device, self.data.offset_noise)
        seeds = torch.tensor([int(rng.spawn(1)[0].integers(2**62)) for rng in rngs])  # beside the stream of the noise
        for adapter in self.adapters:
            set_row_seeds(adapter, to_device(sd.device, seeds))
        told = self._encode(batch.captions).to(sd.device, sd.dtype)
        if told.pooled is not None:  # such a U-Net is told the size of each picture too
            told = replace(told, size=to_device(sd.device, batch.sizes))
        return diffusion_loss(
            lambda x_t, t, context: sd.unet(x_t.to(sd.dtype), t, context),
            sd.schedule,
            batch.latents,
            told,
            noise,
            mask=batch.mask,
            min_snr=self.data.min_snr,
        )

    def _draw(self, rngs: Sequence[np.random.Generator]) -> "list[Piece]":
        """Draw the samples of all subjects, then their class pictures if there are any.

        A sample and its class picture share a generator, which goes on to draw their timesteps and noise.
        """
        chosen = [int(rng.integers(len(self.subjects))) for rng in rngs]
        rngs_of = {k: [rng for rng, i in zip(rngs, chosen) if i == k] for k in sorted(set(chosen))}
        pieces = [one for k, own in rngs_of.items() for one in self._draw_from(self.subjects[k].pictures, self.subjects[k].templates, own)]
        for k, own in rngs_of.items():
            if prior := self.subjects[k].prior:
                pieces += [replace(one, is_prior=True) for one in self._draw_from(prior, (), own)]
        return pieces

    def _draw_from(self, pictures: Pictures, templates: Sequence[str], rngs: Sequence[np.random.Generator]) -> "Iterator[Piece]":
        """Draw one picture per generator; yield those of each shape."""
        indices = [int(rng.integers(len(pictures))) for rng in rngs]
        for shape in dict.fromkeys(pictures.shapes[i] for i in indices):
            own = [(i, rng) for i, rng in zip(indices, rngs) if pictures.shapes[i] == shape]
            batch = self._captioned(pictures, templates, [i for i, _ in own], [rng for _, rng in own])
            yield Piece(batch, tuple(rng for _, rng in own))

    def _captioned(
        self, pictures: Pictures, templates: Sequence[str], indices: Sequence[int], rngs: Sequence[np.random.Generator]
    ) -> Batch:
        """Draw pictures of one shape, then the template of each if there are any, then whether its caption is dropped.

        Args:
            pictures, templates: of a subject
            indices: of the pictures
            rngs: a generator for each
        """
        batch = pictures.batch(indices, rngs)
        captions = batch.captions
        if templates:
            captions = [templates[int(rng.integers(len(templates)))] for rng in rngs]
            if pictures.sizes is not None:
                captions = [pictures.sizes.with_phrase(caption, phrase) for caption, phrase in zip(captions, batch.size_phrases)]
        dropped = [rng.random() < self.data.caption_dropout for rng in rngs]
        return replace(batch, captions=tuple("" if drop else caption for drop, caption in zip(dropped, captions)))

    def _encode(self, captions: Sequence[str]) -> Conditioning:
        if self.contexts is not None:
            rows = [self.contexts[caption] for caption in captions]
            return rows[0].with_tensors([torch.cat(kind) for kind in zip(*(row.tensors() for row in rows))])
        return self.sd.text(captions, (self.sd.config.image_size, self.sd.config.image_size))

    # --- to look at ---------------------------------------------------------------------------------------------------

    @property
    def picture_count(self) -> int:
        """Return how many pictures are learned from, class pictures left out."""
        return sum(len(subject.pictures) for subject in self.subjects)

    @property
    def prompts(self) -> list[str]:
        """Return what each subject is asked for by."""
        return [(subject.templates or (subject.pictures.examples[0].caption,))[0] for subject in self.subjects]

    def sheet(self, prompts: Sequence[str], *, count: int, steps: int) -> Sheet:
        """Draw one row per prompt, the same seeds 0..count-1 every time."""
        columns = [self.pictures(prompts, seed=seed, steps=steps) for seed in range(count)]
        return Sheet(grid([column[row] for row in range(len(prompts)) for column in columns], columns=count))

    def pictures(self, prompts: Sequence[str], *, seed: int = 0, steps: int = 30) -> list[Image.Image]:
        """Generate a picture per prompt with the model as it is now, between two steps; all on the same seed, without dropout."""
        for adapter in self.adapters:
            adapter.eval()
        try:
            return self.sd.generate(list(prompts), seed=seed, steps=steps)
        finally:
            for adapter in self.adapters:
                adapter.train()


def possible_captions(subject: Subject) -> Iterable[str]:
    """Yield every caption that a sample may have, with the phrases of the size augmentation."""
    for pictures, captions in ((subject.pictures, subject.templates), (subject.prior, ())):
        if pictures is not None:
            captions = captions or tuple(example.caption for example in pictures.examples)
            sizes = pictures.sizes
            phrases = ("",) if sizes is None else ("", *sizes.small, *sizes.large)
            yield from (caption if sizes is None else sizes.with_phrase(caption, phrase) for caption in captions for phrase in phrases)


@runtime_checkable
class Phase(Task, Protocol):
    """A phase of a method: a Task, a context manager in which it can be trained, and what the command line shows of it."""

    name: str
    settings: Settings
    averages: Mapping[str, EMA]

    @property
    def groups(self) -> Sequence[Group]: ...

    @property
    def picture_count(self) -> int: ...

    @property
    def prompts(self) -> list[str]: ...

    def prepare(self) -> Iterator[int]: ...

    def sheet(self, prompts: Sequence[str], *, count: int, steps: int) -> Sheet: ...

    def __enter__(self) -> "Phase": ...

    def __exit__(self, *_) -> None: ...


@dataclass(frozen=True, eq=False)
class TrainingRun:
    """The phases of a method, and what is its result; without any, the result is the model's own weights.

    trains_model: whether these are a result too, where there is another one.
    """

    phases: tuple[Phase, ...]
    lora: LoRA | None = None
    tokens: NewTokens | None = None
    custom_diffusion: CustomDiffusion | None = None
    controlnet: Control | None = None
    trains_model: bool = False

    def run(self, device: torch.device, folder: Path | None = None) -> Generator[tuple[Phase, TrainStep], None, None]:
        """Train one phase after the other, a step an iteration, each with its state in folder/NAME.state; EMAs become the weights."""
        for number, phase in enumerate(self.phases):
            with phase:
                training = Training(phase, phase.settings, device, state_file(phase, folder))
                if training.extended:
                    self._check_later(phase, self.phases[number + 1 :], folder)
                phase.averages = training.ema
                for step in training.run():
                    yield phase, step
                for name, ema in training.ema.items():
                    ema.copy_to(phase.modules[name])
                phase.averages = {}

    def _check_later(self, phase: Phase, later: Sequence[Phase], folder: Path | None) -> None:
        """Raise ValueError if a later phase has begun on what this one had learned before it was given more steps."""
        if begun := [one.name for one in later if (path := state_file(one, folder)) is not None and path.exists()]:
            raise ValueError(f"{folder}: {begun[0]} was trained on {phase.name} as it was with fewer steps; choose another folder")


@contextmanager
def averaged(phase: Phase) -> Iterator[None]:
    """Let a phase hold, within the block and between two steps, the weights that would be written if the run ended now."""
    with ExitStack() as stack:
        for name, ema in phase.averages.items():
            stack.enter_context(ema.swapped_in(phase.modules[name]))
        yield


def state_file(phase: Phase, folder: Path | None) -> Path | None:
    """Return the file with the state of a phase, None without a folder."""
    return None if folder is None else folder / f"{phase.name}.state"
