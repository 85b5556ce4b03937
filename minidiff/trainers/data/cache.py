"""Latents and text made once: what a frozen encoder gives for a picture or a caption never changes while the others train.

    picture -> fit -> VAE encoder -> mean, std  -. kept under the checksum of encoder and input
    caption -> tokens -> text encoder -> context -'

The key holds all that the value depends on, the pixels and the encoder's weights themselves, so an old value is never taken for a new
one. The mean and the standard deviation are kept, not a sample: the originals draw a new latent z ~ N(mean, std^2) at every step
(Rombach et al. 2022, section 3.1). A picture has two entries if it is flipped. With random crops or sizes there is nothing to keep,
and pictures are encoded at every step.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.conditioning import Conditioning
from minidiff.config import check_choice
from minidiff.files import atomic_write, digest, fingerprint, tensor_bytes
from minidiff.pictures import fit, load_picture
from minidiff.pipeline import StableDiffusion
from minidiff.trainers.data.augment import SizeAugmentation, View, size_numbers, sized_view
from minidiff.trainers.data.buckets import nearest_bucket
from minidiff.trainers.data.folder import Example
from minidiff.trainers.engine.loop import randn_per_sample
from minidiff.transfer import to_device

Make = Callable[[], Float[Tensor, "*shape"]]
KEPT_PICTURES = 16  # decoded ones, where every step needs the picture again; a photograph of 12 megapixels takes 36 MB


class Cache:
    """Float32 tensors by key: in memory up to `memory` bytes, then in files of the folder; without a folder all in memory."""

    def __init__(self, folder: Path | None = None, memory: int = 2**30):
        self.folder, self.memory = folder, memory
        self._kept: dict[str, Tensor] = {}
        self._bytes = 0

    def get(self, key: str, make: Make) -> Float[Tensor, "*shape"]:
        """Return the tensor under the key, or make and keep it. A broken file is made again."""
        if key in self._kept:
            return self._kept[key]
        path = self.folder / f"{key}.npy" if self.folder is not None else None
        if path is not None and (found := _read_array(path)) is not None:
            return found
        tensor = make().detach().float().cpu().contiguous()
        if path is None or self._bytes + tensor.nbytes <= self.memory:
            self._kept[key] = tensor
            self._bytes += tensor.nbytes
        else:
            _write_array(path, tensor.numpy())
        return tensor


def _read_array(path: Path) -> Tensor | None:
    try:
        return torch.from_numpy(np.load(path))
    except (OSError, ValueError, EOFError):
        return None


def _write_array(path: Path, array: np.ndarray) -> None:
    """Write the file whole or not at all. Raises OSError, which names the file, where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as file:
            np.save(file, array)
    except OSError as error:
        raise OSError(f"{path}: cannot be written ({error.strerror}); the cache needs room there, or another folder") from error


@torch.no_grad()
def cached_texts(sd: StableDiffusion, cache: Cache, captions: Sequence[str]) -> Conditioning:
    """Return contexts of captions and, where the model has them, pooled vectors, without the size of a picture.

    Each is encoded once, by itself, by the text encoders as they are now; float32, on the model's device. Not for encoders that are being
    trained. Raises ValueError for what must not be kept: a new token, an encoder with an adapter on it, or one that overflows.
    """
    encoders = sd.text.encoders
    if any(module._forward_hooks or module._forward_pre_hooks for encoder in encoders.values() for module in encoder.modules()):
        raise ValueError("the text encoder has an adapter on it, so its contexts change: encode the captions at every step")
    rows = {name: sd.text.tokens(name, captions) for name in encoders}
    prints = f"{' '.join(fingerprint(encoder) for encoder in encoders.values())} {sd.device.type}"
    kept: list[list[Tensor]] = []
    for i, caption in enumerate(captions):
        if any(rows[name][i].max() >= encoder.config.vocab_size for name, encoder in encoders.items()):
            raise ValueError(f"caption {caption!r} holds a new token, whose vector changes: encode it at every step")
        key = f"{prints} {' '.join(str(rows[name][i].tolist()) for name in encoders)}"
        encode = functools.cache(functools.partial(_encode_alone, sd, caption))
        kept.append([cache.get(digest([f"context {key}".encode()]), lambda encode=encode: encode().context[0])])
        if sd.config.unet.pooled_width is not None:
            kept[-1].append(cache.get(digest([f"pooled {key}".encode()]), lambda encode=encode: encode().tensors()[1][0]))
    context, *pooled = [torch.stack(kind).to(sd.device) for kind in zip(*kept)]
    return Conditioning(context, pooled[0] if pooled else None)


def _encode_alone(sd: StableDiffusion, caption: str) -> Conditioning:
    with torch.autocast(sd.device.type, enabled=False):
        told = sd.text([caption], (sd.config.image_size, sd.config.image_size))
    if not all(x.isfinite().all() for x in told.tensors()):
        raise ValueError(
            f"caption {caption!r}: its context is not finite in {told.context.dtype}; load the text encoders in float32 or bfloat16"
        )
    return told


@dataclass(frozen=True)
class Batch:
    """Training samples: scaled latents in float32 and masks on the model's device; mask is 1 in the cells whose loss counts."""

    latents: Float[Tensor, "B C h w"]
    mask: Float[Tensor, "B 1 h w"]
    captions: tuple[str, ...]
    size_phrases: tuple[str, ...]  # what the size augmentation says of each, already in its caption
    sizes: Float[Tensor, "B 6"]  # SDXL's size numbers, on the CPU

    @classmethod
    def concatenate(cls, batches: "Sequence[Batch]") -> "Batch":
        """Put batches behind each other."""
        latents, mask, sizes = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("latents", "mask", "sizes"))
        captions, phrases = ([text for batch in batches for text in getattr(batch, name)] for name in ("captions", "size_phrases"))
        return cls(latents, mask, tuple(captions), tuple(phrases), sizes)


class Pictures:
    """A set of captioned pictures, as the U-Net is given them. Raises ValueError for values outside those below.

    Args:
        sd: the model whose VAE encodes them
        examples: paths and captions
        cache: of latents
        size: pixels, a multiple of the VAE's factor
        crop: "centre", or "random" along the longer side
        flip: the share of samples that are mirrored, 0..1
        sizes: Custom Diffusion's augmentation, which takes the centre square
        buckets: pixels between the shapes of about size x size pixels, of which each picture has the nearest; None cuts squares
        posterior: "sample" draws a latent at every step, "mean" takes the most likely one
    """

    def __init__(
        self,
        sd: StableDiffusion,
        examples: Sequence[Example],
        cache: Cache,
        *,
        size: int,
        crop: str = "centre",
        flip: float = 0.0,
        sizes: SizeAugmentation | None = None,
        buckets: int | None = None,
        posterior: str = "sample",
    ):
        factor = sd.config.vae.factor
        if not examples:
            raise ValueError("no pictures to learn from; give at least one")
        if size < factor or size % factor:
            raise ValueError(f"size {size}: must be a multiple of {factor} pixels")
        check_choice("crop", crop, ("centre", "random"))
        check_choice("posterior", posterior, ("sample", "mean"))
        if not 0 <= flip <= 1:
            raise ValueError(f"flip {flip}: a share of the samples, 0..1")
        if sizes is not None:
            sizes.check(size, factor)
        if buckets is not None and (sizes is not None or buckets % factor):
            why = "the augmentation of sizes shows squares" if sizes else f"not a multiple of the VAE's {factor} pixels"
            raise ValueError(f"buckets in steps of {buckets} pixels: {why}; leave one out")
        self.sd, self.examples, self.cache = sd, tuple(examples), cache
        self.size, self.crop, self.flip, self.sizes, self.posterior = size, crop, flip, sizes, posterior
        self.buckets = buckets
        self.shapes = [(size, size)] * len(self.examples)  # width and height at which each is shown
        if buckets is not None:
            self.shapes = [nearest_bucket(*load_picture(example.path).size, size, buckets) for example in self.examples]
        self._encoder = f"{fingerprint(sd.vae)} {sd.device.type}"
        self._keys: dict[tuple[int, bool], str] = {}
        self._shapes: dict[int, tuple[int, int]] = {}  # width and height of the pictures before they were scaled
        self._picture = functools.lru_cache(KEPT_PICTURES)(load_picture)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def cacheable(self) -> bool:
        """Say whether a picture has one latent, or two with flips."""
        return self.crop == "centre" and self.sizes is None

    def precompute_latents(self) -> Iterator[int]:
        """Fill the cache, one picture an iteration, and yield how many are done; do nothing where latents cannot be kept."""
        for i in range(len(self) if self.cacheable else 0):
            for flip in {self.flip == 1, self.flip > 0}:
                self._moments(i, flip)
            yield i + 1

    def batch(self, indices: Sequence[int], rngs: Sequence[np.random.Generator]) -> Batch:
        """Draw one sample per index, all of one shape, each from its own generator: flip, then crop or size, then the latent."""
        flips = [bool(rng.random() < self.flip) for rng in rngs]
        captions = tuple(self.examples[i].caption for i in indices)
        if self.cacheable:
            moments = torch.stack([self._moments(i, flip) for i, flip in zip(indices, flips, strict=True)])
            mask, phrases = torch.ones(len(captions), 1, *moments.shape[-2:]), ("",) * len(captions)
            numbers = [size_numbers(self._shapes[i], self.shapes[i]) for i in indices]
        else:
            views = [self._view(i, flip, rng) for i, flip, rng in zip(indices, flips, rngs, strict=True)]
            moments = self._encode(torch.stack([view.pixels for view in views]))
            mask, phrases = torch.stack([view.mask for view in views]), tuple(view.size_phrase for view in views)
            numbers = [view.numbers for view in views]
        if self.sizes is not None:
            captions = tuple(self.sizes.with_phrase(caption, phrase) for caption, phrase in zip(captions, phrases))
        device = self.sd.device
        latents, std = to_device(device, moments).unbind(1)
        if self.posterior == "sample":
            latents = latents + std * to_device(device, randn_per_sample(rngs, latents.shape[1:]))
        latents = latents * self.sd.config.vae.scaling_factor
        return Batch(latents, to_device(device, mask), captions, phrases, torch.tensor(numbers).float())

    def _view(self, i: int, flip: bool, rng: np.random.Generator) -> View:
        image = self._picture(self.examples[i].path)
        factor = self.sd.config.vae.factor
        if self.sizes is not None:
            return sized_view(image, self.size, factor, self.sizes, rng, flip=flip)
        x, y = (float(place) for place in rng.random(2))
        width, height = shape = self.shapes[i]
        pixels, numbers = fit(image, shape, crop=(x, y), flip=flip), size_numbers(image.size, shape, crop=(x, y), flip=flip)
        return View(pixels, torch.ones(1, height // factor, width // factor), "", numbers)

    def _moments(self, i: int, flip: bool) -> Tensor:
        """Return mean and standard deviation of the posterior of picture i, (2, C, h, w), from the cache or into it."""

        def pixels() -> Tensor:
            image = load_picture(self.examples[i].path)
            self._shapes[i] = image.size
            return fit(image, self.shapes[i], flip=flip)

        shape = self.size if self.buckets is None else self.shapes[i]
        if (i, flip) not in self._keys:
            self._keys[i, flip] = digest([f"latent {self._encoder} {shape} ".encode(), tensor_bytes(pixels())])
        return self.cache.get(self._keys[i, flip], lambda: self._checked(i, self._encode(pixels()[None])[0]))

    def _checked(self, i: int, moments: Tensor) -> Tensor:
        if not moments.isfinite().all():
            path, dtype = self.examples[i].path, self.sd.vae.quant_conv.weight.dtype
            raise ValueError(f"{path}: its latent is not finite in {dtype}; load the VAE in float32 or bfloat16")
        return moments

    @torch.no_grad()
    def _encode(self, pixels: Tensor) -> Tensor:
        """Encode (B, 3, H, W) to mean and standard deviation, (B, 2, C, h, w), in float32."""
        dtype = self.sd.vae.quant_conv.weight.dtype
        with torch.autocast(self.sd.device.type, enabled=False):  # the training's precision is none of a kept latent's business
            posterior = self.sd.vae.encode(to_device(self.sd.device, pixels).to(dtype))
        return torch.stack([posterior.mean.float(), (0.5 * posterior.logvar.float()).exp()], dim=1)
