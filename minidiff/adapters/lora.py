r"""LoRA: a small change alongside the frozen weights of chosen layers.

    x ----------------- W0 ---------------+--> W0 x + weight * delta x
      \- dropout - down - up - (alpha/r) -/    delta = (alpha / r) up down, or any other LayerChange

Paper: Hu et al. 2021, "LoRA: low-rank adaptation of large language models" (section 4.1). In Stable Diffusion W0 is a projection of the
attentions, any linear layer or a convolution, of the U-Net and the text encoder. The model's own modules and weights stay as they are:
the change is added to a layer's output by a forward hook, and removing the hook takes it back, bit for bit.

Left out: DoRA, LoHa, LoKr (each would be a LayerChange of its own), and rsLoRA's scale alpha / sqrt(r), which is an alpha r times sqrt(r).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Generic, TypeVar

import torch
from torch import Tensor

from minidiff.adapters.base import Adapter, Hook
from minidiff.adapters.layer_change import LayerChange
from minidiff.adapters.layers import Layer, choose, layers_of, nearest
from minidiff.adapters.low_rank import LowRank
from minidiff.config import check_choice
from minidiff.pipeline import StableDiffusion

# Sets of layers that the public trainers choose, to be added up: PATTERNS["attention"] + PATTERNS["text_encoder"].
TRANSFORMER = r"^unet\..*\.transformers?\."
PATTERNS = {
    "attention": (r"^unet\..*attention\.to_(q|k|v|out)$",),  # diffusers
    "transformer": (TRANSFORMER,),  # kohya: every linear layer of the transformers, proj_in and proj_out too
    "conv": (TRANSFORMER, r"^unet\..*\.(conv_1|conv_2|skip|time_projection|downsample|upsample)$"),  # kohya with conv_dim, LoCon
    "text_encoder": (r"^text_encoder(_2)?\..*attention\.to_(q|k|v|out)$",),  # diffusers
}
INITS = ("gaussian", "kaiming")
Change = TypeVar("Change", bound=LayerChange)


class LoRA(Adapter, Generic[Change]):
    """Changes by the names of the layers they belong to, such as "unet.down.0.transformers.0.blocks.0.cross_attention.to_k".

    weight: a factor on all of them, which may be changed at any time: 1 as trained, 0 without effect. Several LoRAs on one model add up.
    """

    title = "this LoRA"

    def __init__(self, layers: Mapping[str, Change], weight: float = 1.0):
        super().__init__(layers)
        self.weight = weight

    def pairs(self, sd: StableDiffusion) -> list[tuple[Change, Layer]]:
        """Return each change with the model's layer that it belongs to.

        Raises ValueError with the layers that are absent or of another shape.
        """
        layers, pairs, wrong = layers_of(sd), [], []
        for name, change in self.layers.items():
            if name not in layers:
                wrong.append(f"no layer {name}; {nearest(name, list(layers))}")
                continue
            expected = tuple(layers[name].weight.shape)
            if change.shape != expected:
                wrong.append(f"{name}: a change of shape {change.shape}, for a weight of shape {expected}")
            pairs.append((change, layers[name]))
        if wrong:
            more = [f"and {len(wrong) - 5} more"] if len(wrong) > 5 else []
            header = f"this LoRA does not fit the model: {len(wrong)} of {len(self.layers)} layers"
            raise ValueError("\n  ".join([header, *wrong[:5], *more]))
        return pairs

    def fit(self, sd: StableDiffusion) -> Sequence[Hook]:
        """Return a hook per layer: it gives W0 x + weight delta x. Raises as `pairs` does."""
        pairs = self.pairs(sd)
        for change, layer in pairs:
            change.take(layer)
        return [Hook(layer, partial(self._add, change)) for change, layer in pairs]

    def _add(self, change: Change, layer: Layer, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        # The sum of a layer's half precision and the change's float32 is float32, and is rounded once.
        return (output + self.weight * change(args[0])).to(output.dtype)


def create_lora(
    sd: StableDiffusion,
    patterns: tuple[str, ...],
    *,
    rank: int,
    alpha: float,
    init: str = "gaussian",
    dropout: float = 0.0,
    generator: torch.Generator,
) -> LoRA[LowRank]:
    """Return a new LoRA that changes nothing yet, float32 on the model's device, not attached: up is zero, down is random.

    Args:
        sd: the model that it is for
        patterns: regular expressions searched in the full names of linear layers and convolutions; see PATTERNS
        rank: from 1. A rank beyond a layer's min(in, out) is taken as it is, as in peft: the change then reaches any matrix, and the
            surplus only costs memory
        alpha: the change is scaled by alpha / rank, so alpha = rank (diffusers) is a scale of 1
        init: of down, "gaussian" normal with std 1 / rank (diffusers), "kaiming" uniform within 1 / sqrt(fan in) (the paper's code, kohya)
        dropout: probability, on the input of each change, in training mode
        generator: of the random numbers

    Raises ValueError for numbers out of range, and as `choose` does.
    """
    if rank < 1:
        raise ValueError(f"rank {rank}: expected a whole number from 1, such as 4")
    if not (alpha > 0 and math.isfinite(alpha)):
        raise ValueError(f"alpha {alpha}: expected a number above 0, such as the rank")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout {dropout}: expected a probability from 0 to below 1")
    check_choice("init", init, INITS)
    layers = layers_of(sd)
    changes = {}
    for name in choose(list(layers), patterns):
        weight = layers[name].weight
        down = _first_down((rank, *weight.shape[1:]), init, generator).to(weight.device)
        up = torch.zeros(weight.shape[0], rank, *(1,) * (weight.dim() - 2), device=weight.device)
        changes[name] = LowRank(down, up, float(alpha), dropout)
    return LoRA(changes)


def _first_down(shape: tuple[int, ...], init: str, generator: torch.Generator) -> Tensor:
    if init == "gaussian":
        return torch.randn(shape, generator=generator, device=generator.device) / shape[0]
    # He et al.'s uniform with a = sqrt(5): the bound sqrt(6 / ((1 + 5) fan in)).
    return (2 * torch.rand(shape, generator=generator, device=generator.device) - 1) / math.sqrt(math.prod(shape[1:]))


def merge_lora(sd: StableDiffusion, lora: LoRA) -> Callable[[], None]:
    """Put the change into the model's weights: W0 + weight delta, summed in float32, in the weights' dtype.

    Returns a function that puts the very same base weights back, and keeps them in memory until it is dropped. Several merges are undone
    last first. Raises ValueError for a LoRA that is attached, which would count twice, for one that does not fit, and if a Custom Diffusion
    is attached to one of its layers, which would hide the change.
    """
    if lora.attached:
        raise ValueError("this LoRA is attached, so merging would apply it twice; detach() it first")
    pairs = lora.pairs(sd)
    hidden = [name for name, (_, layer) in zip(lora.layers, pairs) if any(other.changes(layer, "replace") for other in sd.attached)]
    if hidden:
        raise ValueError(
            f"a Custom Diffusion stands in the place of {len(hidden)} of the weights to be changed, {hidden[0]} for one; "
            "detach it first, or attach the LoRA instead of merging it"
        )
    changed = []
    for change, layer in pairs:
        base = layer.weight.data
        with torch.no_grad():
            layer.weight.data = (base.float() + lora.weight * change.delta().to(base.device)).to(base.dtype)
        changed.append((layer, base, layer.weight.data_ptr()))

    def undo() -> None:
        if any(layer.weight.data_ptr() != merged for layer, _, merged in changed):
            raise ValueError("the weights are not those of this merge any more; undo later merges first, before the model is moved or cast")
        for layer, base, _ in changed:
            layer.weight.data = base

    return undo
