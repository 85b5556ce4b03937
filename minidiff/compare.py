"""Two models side by side, layer by layer: where do they first differ?

Both are given the same tokens, the same noisy latent, the same picture to encode and the same latent to decode; every module's output
of one is held against the other's, in the order in which they run. A wrong eps, a swapped half, a transposed weight shows at the first
layer that has it.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields, is_dataclass
from functools import partial

import torch
from torch import Tensor, nn

from minidiff.conditioning import Conditioning
from minidiff.pipeline import StableDiffusion, noise_source
from minidiff.vae import VAE


@dataclass(frozen=True)
class Difference:
    """The largest difference of one module's two outputs, and the same relative to the largest value of the first.

    Infinite where an output is not finite, or has another shape.
    """

    layer: str
    absolute: float
    relative: float


@torch.no_grad()
def compare_models(a: StableDiffusion, b: StableDiffusion, prompt: str, t: int, seed: int) -> list[Difference]:
    """Run text encoders, U-Net and VAE of both on the same inputs; return one Difference per module, in the order they run.

    The U-Nets are both told what a's text side gives, the decoders the same latent, so that each part is judged by itself.

    Args:
        a, b: two models of one shape.
        prompt: the text encoders' input, in the tokens of a.
        t: the U-Nets' timestep, 0..T-1.
        seed: of the random latent and pixels.

    Raises ValueError where the weights of the two are not of one shape, and for t outside the schedule.
    """
    for name in dict.fromkeys([*a.parts, *b.parts]):
        if name not in a.parts or name not in b.parts:
            raise ValueError(f"the two models are not of one shape: only one of them has a {name}")
        check_shapes(name, a.parts[name], b.parts[name])
    if not 0 <= t < a.config.schedule.timesteps:
        raise ValueError(f"t {t} is outside 0..{a.config.schedule.timesteps - 1}")
    size = 16  # cells of the latent: every layer's output of both models is held at once
    x = noise_source([seed], (a.config.unet.in_channels, size, size), a.device)()
    latent = x[:, : a.config.vae.latent_channels] / a.config.vae.scaling_factor
    pixels = noise_source([seed], (3, size * a.config.vae.factor, size * a.config.vae.factor), a.device)().clamp(-1, 1)
    times = torch.tensor([t], device=a.device)
    side = size * a.config.vae.factor
    told = a.text([prompt], (side, side))

    differences = []
    for name, run, inputs in (
        *((name, nn.Module.__call__, (a.text.tokens(name, [prompt]),)) for name in a.text.encoders),
        ("unet", nn.Module.__call__, (x, times, told)),
        ("vae", VAE.encode, (pixels,)),
        ("vae", VAE.decode, (latent,)),
    ):
        ours, theirs = (outputs_by_layer(sd.parts[name], run, inputs) for sd in (a, b))
        differences += [difference(f"{name}.{layer}".rstrip("."), ours[layer], theirs[layer]) for layer in ours]
    return differences


def config_differences(a: StableDiffusion, b: StableDiffusion) -> list[str]:
    """List the numbers that the two differ in, as "unet.groups: 32 and 16"."""
    parts = [f.name for f in fields(a.config) if is_dataclass(getattr(a.config, f.name)) and is_dataclass(getattr(b.config, f.name))]
    pairs = [
        (f"{part}.{f.name}", *(getattr(getattr(sd.config, part), f.name) for sd in (a, b)))
        for part in parts
        for f in fields(getattr(a.config, part))
    ]
    return [f"{name}: {one} and {other}" for name, one, other in pairs if one != other]


def check_shapes(name: str, a: nn.Module, b: nn.Module) -> None:
    """Raise ValueError for the first parameter of the part `name` that is missing or of another shape in one of the two."""
    shapes_a, shapes_b = ({key: tuple(p.shape) for key, p in module.named_parameters()} for module in (a, b))
    for key in [*shapes_a, *shapes_b]:
        one, other = (str(shapes.get(key, "missing")) for shapes in (shapes_a, shapes_b))
        if one != other:
            raise ValueError(f"the two models are not of one shape: {name}.{key} is {one} in the first and {other} in the second")


def difference(layer: str, a: Tensor, b: Tensor) -> Difference:
    """Compare two outputs of one layer."""
    a, b = a.float(), b.float().to(a.device)
    absolute = (a - b).abs().max().item() if a.shape == b.shape else math.inf
    absolute = math.inf if math.isnan(absolute) else absolute  # inf - inf: nothing can be said
    scale = a.abs().max().item()
    return Difference(layer, absolute, absolute / scale if scale and absolute < math.inf else absolute)


def outputs_by_layer(module: nn.Module, run: Callable[..., object], inputs: Sequence[Tensor | Conditioning]) -> dict[str, Tensor]:
    """Return the output of every submodule that gives one tensor, by name, as they finish in run(module, *inputs).

    Floats are given in the module's dtype.
    """
    dtype = next(module.parameters()).dtype
    return record_outputs(dict(module.named_modules()), partial(run, module, *(_cast(x, dtype) for x in inputs)))


def record_outputs(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> dict[str, Tensor]:
    """Return the output of every layer that gives one tensor, by name, as they finish in run()."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str, layer: nn.Module, args: tuple, output: object) -> None:
        if isinstance(output, Tensor):
            outputs[name] = output

    with ExitStack() as hooks:
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_hook(partial(keep, name)))
        run()
    return outputs


def _cast(x: Tensor | Conditioning, dtype: torch.dtype) -> Tensor | Conditioning:
    if isinstance(x, Conditioning):
        return x.to(x.context.device, dtype)
    return x.to(dtype) if x.is_floating_point() else x
