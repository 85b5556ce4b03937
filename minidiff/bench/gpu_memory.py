"""How much of a GPU's memory a command takes, computed without a GPU: nothing is calculated, bytes alone are counted.

    drawing             weights + the U-Net's activations + the decoder's     a CUDA graph keeps the former while the latter come and go
    drawing, --offload  the largest part's weights + its activations
    training            weights + gradients, optimizer, EMA
                        + the U-Net's activations of the last sheet of pictures, kept in the same way
                        + the larger of a step's activations and the decoder's

Activations are tensors without contents (trainers/engine/memory.py), and the model may be one of windows onto a small pool of numbers
(common.random_model). Both are on the CPU, because without a driver PyTorch cannot run the backward pass of a GPU's tensors; `cuda_norms`
makes them keep what a GPU's keep.

Left out: CUDA's own context, the workspaces of its libraries, holes between tensors, and what torch.compile takes.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from minidiff.bundled.recipe import Recipe
from minidiff.bundled.tasks import AutoencoderTask, DiffusionTask, Latents, Scenes, bundled_config
from minidiff.conditioning import concatenate
from minidiff.kernels.dispatch import attention_backend
from minidiff.pipeline import StableDiffusion
from minidiff.tiled_decode import ON_A_GPU, decode_tiled, should_tile
from minidiff.trainers.data.cache import Cache, Make
from minidiff.trainers.engine.loop import Task, networks_of
from minidiff.trainers.engine.memory import LiveBytes, Memory, bytes_of, estimate_memory
from minidiff.trainers.engine.settings import Settings
from minidiff.trainers.methods.method import Method
from minidiff.trainers.methods.options import Concept

PIXELS_AT_ONCE = 2**18  # of StableDiffusion.decode
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
Made = TypeVar("Made")


@contextmanager
def cuda_norms(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Let the networks' norms keep within the block, in the CPU's autocast, what they keep in CUDA's.

    That one computes them in float32 (PyTorch, "Automatic mixed precision package", list of CUDA's operations), the CPU's in the type that
    they are given; matrix products and convolutions are in 16 bits with both.
    """
    norms = {part: None for network in networks for part in network.modules() if isinstance(part, nn.GroupNorm | nn.LayerNorm)}  # each once
    for norm in norms:
        norm.forward = partial(_norm_in_float32, norm)
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward


def _norm_in_float32(norm: nn.GroupNorm | nn.LayerNorm, input: Tensor) -> Tensor:
    """Apply a norm, where autocast is on in float32."""
    weight, bias = norm.weight, norm.bias
    if torch.is_autocast_enabled("cpu"):
        input, weight, bias = input.float(), weight.float(), bias.float()
    if isinstance(norm, nn.GroupNorm):
        return F.group_norm(input, norm.num_groups, weight, bias, norm.eps)
    return F.layer_norm(input, norm.normalized_shape, weight, bias, norm.eps)


class Finite(TorchFunctionMode):
    """Let tensors without contents pass tests of their contents, as `if not x.isfinite().all()`."""

    def __torch_function__(self, func: Callable, types: object, args: tuple = (), kwargs: dict | None = None) -> Any:
        return True if func is Tensor.__bool__ else func(*args, **(kwargs or {}))


def peak_of(run: Callable[[], Made]) -> tuple[int, Made]:
    """Run a function on tensors without contents and without gradients; return the bytes it held at most, and its result."""
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, Finite(), torch.no_grad(), attention_backend("pytorch"):
        made = run()
    return live.peak, made


# --- drawing ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drawing:
    """Bytes that drawing takes: of the weights, of the largest part's weights, and of the activations of each part."""

    weights: int
    largest_part: int
    text: int
    unet: int
    decoder: int

    def total(self, offload: bool) -> int:
        """Return the peak; offload: the parts take turns. The largest one, the U-Net, has the larger activations too, or nearly."""
        return self.largest_part + max(self.text, self.unet, self.decoder) if offload else self.weights + self.unet + self.decoder


def count_drawing(sd: StableDiffusion, batch: int, size: int | None = None) -> Drawing:
    """Count what drawing takes, with guidance.

    Args:
        sd: The model, in the dtype that it draws in.
        batch: Pictures at once.
        size: Of the squares, in pixels; the model's own by default.
    """
    side, _ = sd.pixel_size(size)
    cells, parts = side // sd.config.vae.factor, [bytes_of(part.parameters()) for part in sd.parts.values()]
    x_t = torch.zeros(batch, sd.config.unet.in_channels, cells, cells, dtype=sd.dtype)
    t = torch.zeros(batch, dtype=torch.int64)
    text, told = peak_of(lambda: concatenate(*sd.text.guided(["a cat"] * batch, None, (side, side))))
    told = told.with_tensors([torch.zeros(x.shape, dtype=x.dtype) for x in told.tensors()])
    unet, _ = peak_of(lambda: sd.unet(x_t, t, told))
    return Drawing(sum(parts), max(parts), text, unet, count_decoder(sd, batch, side))


def count_decoder(sd: StableDiffusion, batch: int, side: int) -> int:
    """Count the activations of decoding squares of that many pixels a side: whole, or in strips where a GPU would take them."""
    cells, together = side // sd.config.vae.factor, min(batch, max(1, PIXELS_AT_ONCE // side**2))
    z = torch.zeros(together, sd.config.vae.latent_channels, cells, cells, dtype=sd.dtype)
    if should_tile(sd.config.vae, z.to("meta")):  # a device that has no numbers of its own there, like a GPU
        return peak_of(lambda: decode_tiled(sd.vae, z, max(1, ON_A_GPU["cells"] // (together * side))).float().clamp(-1, 1))[0]
    return peak_of(lambda: sd.vae.decode(z).float().clamp(-1, 1))[0]


# --- training ---------------------------------------------------------------------------------------------------------


class Shapes(Cache):
    """Zeros in place of latents and contexts, of their shapes; `peak` has the bytes that making one of them would take at most."""

    peak = 0

    def get(self, key: str, make: Make) -> Tensor:
        if key not in self._kept:
            peak, made = peak_of(make)
            self.peak, self._kept[key] = max(self.peak, peak), torch.zeros(made.shape)
        return self._kept[key]


class InHalf:
    """A task whose loss runs in bfloat16's autocast, as on a GPU."""

    def __init__(self, task: Task):
        self.task, self.modules = task, task.modules
        self.networks, self.resident = networks_of(task), getattr(task, "resident", ())

    def optimizers(self, settings: Settings) -> tuple[torch.optim.Optimizer, ...]:
        return self.task.optimizers(settings)

    def loss(self, step: int, sample_ids: range) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.task.loss(step, sample_ids)


def count_steps(task: Task, settings: Settings) -> Memory:
    """Estimate the memory of a task as `estimate_memory` does on a GPU, in bfloat16."""
    with cuda_norms(networks_of(task)), attention_backend("pytorch"):
        # float32 where the estimate would turn autocast on for CUDA, which is not there
        return estimate_memory(InHalf(task), replace(settings, precision="float32"), CUDA)


def count_training(sd: StableDiffusion, method: Method[Any], options: Any) -> int:
    """Return the bytes that training by a method takes at most, on one concept with one picture and one class picture.

    Args:
        sd: The model in the dtype of its frozen weights.
        method: Of the table of methods.
        options: Of that method.
    """
    sheet, peaks = count_drawing(sd, batch=1), []
    with tempfile.TemporaryDirectory() as folder, attention_backend("pytorch"):
        images, class_images = (picture_folder(Path(folder) / name, sd.config.image_size) for name in ("images", "class"))
        concept = Concept(images=images, token="<cat>", class_word="cat", class_images=class_images)
        cache = Shapes()
        for phase in method.build(sd, [concept], options, cache).phases:
            with phase:
                step = count_steps(phase, phase.settings)
            # Latents are made before anything else is there; a sheet is decoded between two steps.
            peaks += [step.frozen + step.trained + cache.peak, step.total + sheet.unet + max(0, sheet.decoder - step.activations)]
    return max(peaks)


def count_from_scratch(recipe: Recipe) -> int:
    """Return the bytes that training from scratch by a recipe takes at most; all scenes are on the GPU, as bytes and then as latents."""
    config = bundled_config(recipe.widths)
    size, cells = config.image_size, config.image_size // config.vae.factor
    tokens = torch.ones(1, config.tokenizer.context_length, dtype=torch.int64)
    mask = torch.zeros(1, 1, cells, cells)
    latents = Latents(torch.zeros(1, config.vae.latent_channels, cells, cells), tokens, mask)
    first = AutoencoderTask(config, recipe, Scenes(np.zeros((1, size, size, 3), dtype=np.uint8), tokens, mask), CPU)
    second = DiffusionTask(config, recipe, latents, CPU)
    scenes = recipe.scenes * bytes_of([first.images, first.weight])
    encoded = recipe.scenes * bytes_of([second.x_0, second.tokens, second.weight])
    return max(count_steps(first, recipe.autoencoder()).total + scenes, count_steps(second, recipe.diffusion()).total + encoded)


def picture_folder(folder: Path, size: int) -> Path:
    """Make a folder with one grey picture."""
    folder.mkdir()
    Image.new("RGB", (size, size), "grey").save(folder / "0.png")
    return folder
