"""The training of every personalising method: one task, in which a method says what is trained and which words go with which pictures.

    subject's pictures -. captions, or templates -> text encoder -> context -.
    prior's pictures ---' latents ----------------- q_sample ----> x_t ------+--> U-Net -> loss of the subject + weight * loss of the prior

The loss is latent diffusion's (diffusion_loss.py). Where prior pictures are given, each sample brings one of them into the same batch
(DreamBooth, Ruiz et al. 2023, eq. 2). What a frozen encoder gives is made once; the text encoder runs in each step only where it, or a
word, is trained or has an adapter on it.

    with task:                                          # adapters are on the model
        for step in train(task, task.settings, device, state): ...
        sd.generate("a photo of a <cat> cat")
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from minidiff.adapters.base import Adapter
from minidiff.files import digest, fingerprint
from minidiff.pipeline import StableDiffusion
from minidiff.trainers.data.cache import Cache, Contexts, Pictures
from minidiff.trainers.engine.diffusion_loss import diffusion_loss, draw
from minidiff.trainers.engine.loop import rng_for
from minidiff.trainers.engine.optimizer import adamw
from minidiff.trainers.engine.settings import Settings
from minidiff.trainers.methods.options import Samples


@dataclass(frozen=True, eq=False)
class Subject:
    """What is learned. templates: captions of which one is drawn for each sample, in place of the pictures' own. prior: pictures of its class."""

    pictures: Pictures
    templates: tuple[str, ...] = ()
    prior: Pictures | None = None


@dataclass(frozen=True, eq=False)
class Group:
    """Parameters that learn at `scale` times the learning rate."""

    params: tuple[nn.Parameter, ...]
    scale: float = 1.0


@dataclass(frozen=True)
class Drawn:
    """A batch: scaled latents, masks of the cells whose loss counts, and captions."""

    latents: Float[Tensor, "B C h w"]
    mask: Float[Tensor, "B 1 h w"]
    captions: tuple[str, ...]


class FinetuneTask:
    """A Task of loop.py, or one of several phases of a method. Within `with task:` the adapters are on the model and the groups can learn.

    name: of the phase. modules: as in Task; adapters, or parts of sd itself. adapters: those on the model meanwhile, also without being
    trained. groups: what is trained of the modules. prior_weight: see module docstring.
    Outside the block sd is as it was, but for those of its own weights that were trained, and that nothing of it requires a gradient.
    Raises ValueError for prior pictures of some subjects only.
    """

    def __init__(
        self,
        sd: StableDiffusion,
        name: str,
        subjects: Sequence[Subject],
        *,
        modules: dict[str, nn.Module],
        adapters: Sequence[Adapter],
        groups: Sequence[Group],
        settings: Settings,
        samples: Samples,
        prior_weight: float = 1.0,
        cache: Cache | None = None,
    ):
        if len({subject.prior is None for subject in subjects}) > 1:
            raise ValueError("class pictures for some of the concepts, and none for others; give them for all or for none")
        if sd.config.unet.in_channels != sd.config.vae.latent_channels:
            raise ValueError(
                f"this U-Net has {sd.config.unet.in_channels} input channels: an inpainting model; load a text-to-image checkpoint"
            )
        self.sd, self.name, self.subjects = sd, name, tuple(subjects)
        self.modules, self.adapters, self.groups = modules, tuple(adapters), tuple(groups)
        self.settings, self.samples, self.prior_weight = settings, samples, prior_weight
        self.cache = cache or Cache()
        self.contexts: dict[str, Tensor] | None = None  # by caption; None: the text encoder runs in every step
        self.about = {"phase": name, "prior weight": prior_weight, "data": self._digest(), "model": fingerprint(sd.unet.conv_in)}
        self.about |= asdict(samples)

    # --- before and after ---------------------------------------------------------------------------------------------

    def prepare(self) -> Iterator[int]:
        """Makes the latents that can be made ahead, one picture an iteration; `with task:` does it too, without saying how far it is."""
        done = 0
        for pictures in self._all_pictures():
            for _ in pictures.precompute_latents():
                done += 1
                yield done

    def __enter__(self) -> "FinetuneTask":
        for _ in self.prepare():
            pass
        for module in (self.sd.unet, self.sd.text_encoder, *self.adapters):
            module.requires_grad_(False)
        try:
            for adapter in self.adapters:
                adapter.attach(self.sd)
                adapter.train()  # dropout
            for group in self.groups:
                for p in group.params:
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
        for group in self.groups:
            for p in group.params:
                p.requires_grad_(False)
                p.grad = None
        self.contexts = None

    def _precompute_contexts(self) -> None:
        captions = sorted({caption for subject in self.subjects for caption in possible_captions(subject)} | {""})
        rows = self.sd.tokenizer(captions)  # warns of what is cut off, before the first step
        parts = list(self.sd.text_encoder.modules())
        moving = any(p.requires_grad for p in self.sd.text_encoder.parameters()) or any(part._forward_hooks for part in parts)
        if not moving and rows.max() < self.sd.text_encoder.config.vocab_size:
            encode = Contexts(self.sd, self.cache)
            self.contexts = {caption: encode([caption])[0] for caption in captions}

    def _all_pictures(self) -> list[Pictures]:
        return [pictures for subject in self.subjects for pictures in (subject.pictures, subject.prior) if pictures is not None]

    def _digest(self) -> str:
        """Return a digest of captions and pictures: a run does not go on with others."""
        captions = (repr((subject.templates, subject.pictures.sizes)).encode() for subject in self.subjects)
        examples = (example for pictures in self._all_pictures() for example in pictures.examples)
        return digest(chain(captions, (f"{example.caption}\n".encode() + example.path.read_bytes() for example in examples)))[:16]

    # --- what the loop asks for ---------------------------------------------------------------------------------------

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (self.sd.unet,) if self.contexts is not None else (self.sd.unet, self.sd.text_encoder)

    def optimizers(self, settings: Settings) -> tuple[torch.optim.Optimizer, ...]:
        return (adamw([{"params": list(group.params), "scale": group.scale} for group in self.groups], settings),)

    def loss(self, step: int, samples: range) -> Float[Tensor, ""]:
        """Mean over the samples of the subject's loss, plus the prior's weight times that of the picture beside each."""
        sd, B = self.sd, len(samples)
        rngs = [rng_for(self.settings.seed, step, sample) for sample in samples]
        batch, rngs = self._draw(rngs)
        draws = draw(rngs, batch.latents.shape[1:], sd.config.schedule.timesteps, sd.device, self.samples.offset_noise)
        context = self._context(batch.captions).to(sd.dtype)
        loss = diffusion_loss(
            lambda x_t, t, context: sd.unet(x_t.to(sd.dtype), t, context),
            sd.schedule,
            batch.latents,
            context,
            draws,
            mask=batch.mask,
            min_snr=self.samples.min_snr,
        )
        return loss[:B].mean() + self.prior_weight * loss[B:].sum() / B

    def _draw(self, rngs: Sequence[np.random.Generator]) -> tuple[Drawn, list[np.random.Generator]]:
        """The subjects' samples, then the prior's if there is one; and beside each the generator for what else it draws."""
        mine: list[list[np.random.Generator]] = [[] for _ in self.subjects]
        for rng in rngs:
            mine[int(rng.integers(len(self.subjects)))].append(rng)
        chosen = [(subject, own) for subject, own in zip(self.subjects, mine) if own]
        parts = [self._drawn(subject.pictures, subject.templates, own) for subject, own in chosen]
        parts += [self._drawn(subject.prior, (), own) for subject, own in chosen if subject.prior is not None]
        latents, mask = torch.cat([part.latents for part in parts]), torch.cat([part.mask for part in parts])
        ordered = [rng for _, own in chosen for rng in own]
        captions = tuple(caption for part in parts for caption in part.captions)
        return Drawn(latents, mask, captions), ordered * (len(captions) // len(rngs))

    def _drawn(self, pictures: Pictures, templates: Sequence[str], rngs: Sequence[np.random.Generator]) -> Drawn:
        batch = pictures.batch([int(rng.integers(len(pictures))) for rng in rngs], rngs)
        captions = batch.captions
        if templates:
            captions = [templates[int(rng.integers(len(templates)))] for rng in rngs]
            if pictures.sizes is not None:
                captions = [pictures.sizes.say(caption, word) for caption, word in zip(captions, batch.words)]
        dropped = [rng.random() < self.samples.caption_dropout for rng in rngs]
        return Drawn(batch.latents, batch.mask, tuple("" if drop else caption for drop, caption in zip(dropped, captions)))

    def _context(self, captions: Sequence[str]) -> Float[Tensor, "B L D"]:
        if self.contexts is not None:
            return torch.stack([self.contexts[caption] for caption in captions])
        return self.sd.text_encoder(self.sd.tokenizer(list(captions)).to(self.sd.device))

    # --- to look at ---------------------------------------------------------------------------------------------------

    def pictures(self, prompts: Sequence[str], *, seed: int = 0, steps: int = 30) -> list[Image.Image]:
        """What the model draws as it is now, between two steps; each prompt on the same seed, without dropout."""
        for adapter in self.adapters:
            adapter.eval()
        try:
            return self.sd.generate(list(prompts), seed=seed, steps=steps)
        finally:
            for adapter in self.adapters:
                adapter.train()


def possible_captions(subject: Subject) -> Iterable[str]:
    """Every caption that a sample may have, with the words of the size augmentation."""
    own = subject.templates or tuple(example.caption for example in subject.pictures.examples)
    for pictures, captions in ((subject.pictures, own), (subject.prior, ())):
        if pictures is not None:
            captions = captions or tuple(example.caption for example in pictures.examples)
            sizes = pictures.sizes
            words = ("",) if sizes is None else ("", *sizes.small, *sizes.large)
            yield from (caption if sizes is None else sizes.say(caption, word) for caption in captions for word in words)
