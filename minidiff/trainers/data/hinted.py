"""What a ControlNet learns from: pictures with captions and hints.

    folder of pictures -> hint made from each (hints.py), or a folder of hints with the same names
    scenes             -> hint that the scene knows exactly (scenes/hints.py), or made from its picture

A hint goes with its picture pixel by pixel, so pictures are neither mirrored nor cropped at random.
"""

import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from minidiff.config import check_choice
from minidiff.files import digest, fingerprint
from minidiff.hints import HINTS
from minidiff.pictures import fit, list_pictures, load_picture, to_pixels
from minidiff.pipeline import StableDiffusion, to_images
from minidiff.scenes.hints import SCENE_HINTS
from minidiff.scenes.scenes import Scene, sample_scene
from minidiff.trainers.data.cache import Cache, Pictures
from minidiff.trainers.data.folder import Example
from minidiff.trainers.engine.loop import randn_per_sample
from minidiff.transfer import to_device

CHUNK = 100  # scenes that are encoded at once
SCENES = 2  # of a scene's random numbers, beside the recipe's 1: so that a ControlNet's scenes are others than the model's


@dataclass(frozen=True)
class HintedBatch:
    """Training samples: scaled latents in float32, captions, and hints in [0, 1] of the pictures' size."""

    latents: Float[Tensor, "B C h w"]
    captions: tuple[str, ...]
    hints: Float[Tensor, "B 3 H W"]


@runtime_checkable
class HintedSource(Protocol):
    """A set of pictures with captions and hints."""

    def __len__(self) -> int: ...

    def prepare(self) -> Iterator[int]:
        """Make what is made once, some pictures an iteration, and yield how many are done."""
        ...

    def batch(self, indices: Sequence[int], rngs: Sequence[np.random.Generator]) -> HintedBatch:
        """Draw one sample per index, its latent from its generator."""
        ...

    def fixed(self, count: int) -> list[tuple[str, Float[Tensor, "3 H W"]]]:
        """Return up to `count` captions and hints for the sheets, always the same; not from the training where that can be."""
        ...

    def identity(self) -> Iterator[bytes]:
        """Yield all that makes these pictures and hints what they are."""
        ...


class HintedPictures:
    """Pictures of a folder. Raises ValueError for an unknown kind, and for hints that are missing.

    Args:
        sd: the model whose VAE encodes the pictures
        examples: paths and captions
        cache: of latents, and of hints that are made
        size: pixels a side
        kind: a name in HINTS, unless there is a folder of hints
        folder: of hints, each with its picture's name but for the ending
    """

    def __init__(
        self, sd: StableDiffusion, examples: Sequence[Example], cache: Cache, *, size: int, kind: str | None, folder: Path | None = None
    ):
        self.pictures, self.cache, self.size, self.kind = Pictures(sd, examples, cache, size=size), cache, size, kind
        self.paths: list[Path] | None = None
        if folder is not None:
            found = {path.stem: path for path in list_pictures(folder)}
            if missing := [example.path.name for example in examples if example.path.stem not in found]:
                raise ValueError(f"{folder}: no hint for {missing[0]}, and {len(missing) - 1} more; name each as its picture")
            self.paths = [found[example.path.stem] for example in examples]
        elif kind not in HINTS:
            raise ValueError(f"hint {kind!r} cannot be made from a picture; choose {', '.join(HINTS)}, or give a folder of hints, --hints")

    def __len__(self) -> int:
        return len(self.pictures)

    def prepare(self) -> Iterator[int]:
        """Make the latents."""
        return self.pictures.precompute_latents()

    def batch(self, indices: Sequence[int], rngs: Sequence[np.random.Generator]) -> HintedBatch:
        """Draw one sample per index."""
        batch = self.pictures.batch(indices, rngs)
        hints = torch.stack([self.hint(i) for i in indices])
        return HintedBatch(batch.latents, batch.captions, to_device(batch.latents.device, hints))

    def hint(self, i: int) -> Float[Tensor, "3 H W"]:
        """Read or make the hint of picture i."""
        if self.paths is not None:
            return (fit(load_picture(self.paths[i]), self.size) + 1) / 2
        path = self.pictures.examples[i].path
        return self.cache.get(digest([f"hint {self.kind} {self.size} ".encode(), path.read_bytes()]), lambda: self._make(path))

    def _make(self, path: Path) -> Float[Tensor, "3 H W"]:
        assert self.kind is not None
        pixels = np.asarray(to_images(fit(load_picture(path), self.size)[None])[0])
        return _to_unit(HINTS[self.kind](pixels))

    def fixed(self, count: int) -> list[tuple[str, Float[Tensor, "3 H W"]]]:
        """Return the first captions and hints."""
        return [(example.caption, self.hint(i)) for i, example in enumerate(self.pictures.examples[:count])]

    def identity(self) -> Iterator[bytes]:
        """Yield captions, pictures and hints."""
        yield f"{self.kind} {self.size}".encode()
        for i, example in enumerate(self.pictures.examples):
            yield example.caption.encode() + example.path.read_bytes() + (self.paths[i].read_bytes() if self.paths else b"")


class HintedScenes:
    """The first `count` scenes of a seed, composed and encoded once. Raises ValueError for a model of another size than theirs.

    Args:
        sd: the model whose VAE encodes the pictures
        count: how many scenes
        cache: of latents
        kind: a name in SCENE_HINTS or in HINTS
        seed: of the scenes
    """

    def __init__(self, sd: StableDiffusion, count: int, cache: Cache, *, kind: str, seed: int = 0):
        check_choice("hint", kind, (*SCENE_HINTS, *HINTS))
        self.sd, self.count, self.cache, self.kind, self.seed = sd, count, cache, kind, seed
        self.size = self._scene(0).image.shape[0]
        if sd.config.image_size != self.size:
            raise ValueError(f"scenes have {self.size} pixels, this model {sd.config.image_size}; give pictures of your own, --images")
        self.moments: Tensor | None = None
        self.captions: list[str] = []
        self.packed: list[bytes] = []  # hints are almost empty: a hundredth of their size

    def __len__(self) -> int:
        return self.count

    def _scene(self, i: int) -> Scene:
        return sample_scene(np.random.default_rng([self.seed, SCENES, i]))

    def _hint(self, scene: Scene) -> UInt8[np.ndarray, "H W 3"]:
        make: Callable[..., UInt8[np.ndarray, "H W 3"]] = SCENE_HINTS.get(self.kind) or (lambda scene: HINTS[self.kind](scene.image))
        return make(scene)

    def prepare(self) -> Iterator[int]:
        """Compose the scenes, and encode them."""
        if self.moments is not None:
            return
        parts, self.captions, self.packed = [], [], []
        for start in range(0, self.count, CHUNK):
            scenes = [self._scene(i) for i in range(start, min(start + CHUNK, self.count))]
            self.captions += [scene.caption for scene in scenes]
            self.packed += [zlib.compress(self._hint(scene).tobytes(), 1) for scene in scenes]
            parts.append(self.cache.get(self._key(start, len(scenes)), lambda scenes=scenes: self._encode(scenes)))
            yield from range(start + 1, len(self.captions) + 1)
        self.moments = torch.cat(parts)

    def _key(self, start: int, count: int) -> str:
        return digest([f"scenes {fingerprint(self.sd.vae)} {self.sd.device.type} {self.seed} {self.size} {start} {count}".encode()])

    @torch.no_grad()
    def _encode(self, scenes: Sequence[Scene]) -> Float[Tensor, "B 2 C h w"]:
        pixels = to_pixels(np.stack([scene.image for scene in scenes]))
        with torch.autocast(self.sd.device.type, enabled=False):
            posterior = self.sd.vae.encode(pixels.to(self.sd.device, self.sd.vae.quant_conv.weight.dtype))
        return torch.stack([posterior.mean.float(), (0.5 * posterior.logvar.float()).exp()], dim=1)

    def batch(self, indices: Sequence[int], rngs: Sequence[np.random.Generator]) -> HintedBatch:
        """Draw one sample per index."""
        assert self.moments is not None, "prepare() comes first"
        mean, std = self.moments[list(indices)].unbind(1)
        latents = (mean + std * randn_per_sample(rngs, mean.shape[1:])) * self.sd.config.vae.scaling_factor
        hints = [np.frombuffer(zlib.decompress(self.packed[i]), np.uint8).reshape(self.size, self.size, 3) for i in indices]
        latents, unit = (to_device(self.sd.device, x) for x in (latents, _to_unit(np.stack(hints))))
        return HintedBatch(latents, tuple(self.captions[i] for i in indices), unit)

    def fixed(self, count: int) -> list[tuple[str, Float[Tensor, "3 H W"]]]:
        """Return captions and hints of the scenes behind those of the training."""
        scenes = [self._scene(self.count + i) for i in range(count)]
        return [(scene.caption, _to_unit(self._hint(scene))) for scene in scenes]

    def identity(self) -> Iterator[bytes]:
        """Yield what the scenes are drawn from, and the first of them."""
        yield f"{self.kind} {self.count} {self.seed}".encode()
        yield self._scene(0).image.tobytes()


def _to_unit(hints: UInt8[np.ndarray, "*B H W 3"]) -> Float[Tensor, "*B 3 H W"]:
    return torch.from_numpy(np.array(hints)).movedim(-1, -3).float() / 255
