"""Two models side by side, layer by layer: where do they first differ?

Both are given the same tokens, the same noisy latent and the same latent to decode; every module's output of one is held against the
other's, in the order in which they run. A wrong eps, a swapped half, a transposed weight shows at the first layer that has it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from minidiff.pipeline import StableDiffusion, noise_source


@dataclass(frozen=True)
class Difference:
    """The largest difference of one module's two outputs, and the same relative to the largest value of the first."""

    layer: str
    absolute: float
    relative: float


def compare_models(a: StableDiffusion, b: StableDiffusion, prompt: str, t: int, seed: int) -> list[Difference]:
    """Text encoder, U-Net at timestep t and VAE decoder of both on the same inputs; one Difference a module, in the order they run.

    The U-Nets are both given a's context, the decoders the same latent, so that each part is judged by itself.
    Raises ValueError where the two are not of one shape, and for t outside the schedule.
    """
    different = [name for name in ("text_encoder", "unet", "vae") if getattr(a.config, name) != getattr(b.config, name)]
    if different:
        raise ValueError(f"the two models are not of one shape: their configurations of {', '.join(different)} differ")
    if not 0 <= t < a.config.schedule.timesteps:
        raise ValueError(f"t {t} is outside 0..{a.config.schedule.timesteps - 1}")
    size = a.config.image_size // a.config.vae.factor
    x = noise_source([seed], (a.config.unet.in_channels, size, size), a.device)()
    latent = x[:, : a.config.vae.latent_channels] / a.config.vae.scaling_factor
    times = torch.tensor([t], device=a.device)
    tokens = a.tokenizer([prompt]).to(a.device)
    context = a.text_encoder(tokens)

    differences = []
    for name, inputs in (("text_encoder", (tokens,)), ("unet", (x, times, context)), ("vae.decoder", (latent,))):
        ours, theirs = (outputs_by_layer(part(sd, name), inputs) for sd in (a, b))
        for layer, output in ours.items():
            difference = (output.float() - theirs[layer].float()).abs().max().item()
            scale = output.float().abs().max().item()
            differences.append(Difference(f"{name}.{layer}".rstrip("."), difference, difference / scale if scale else difference))
    return differences


def part(sd: StableDiffusion, name: str) -> nn.Module:
    return sd.vae.decoder if name == "vae.decoder" else getattr(sd, name)


@torch.no_grad()
def outputs_by_layer(module: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The output of every submodule that gives one tensor, by name, in the order in which they finish; floats in the module's dtype."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str):
        def hook(submodule, args, output):
            if isinstance(output, Tensor):
                outputs[name] = output.detach()

        return hook

    handles = [submodule.register_forward_hook(keep(name)) for name, submodule in module.named_modules()]
    dtype = next(module.parameters()).dtype
    try:
        module(*(x.to(dtype) if x.is_floating_point() else x for x in inputs))
    finally:
        for handle in handles:
            handle.remove()
    return outputs
