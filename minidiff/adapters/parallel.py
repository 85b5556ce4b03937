"""The family that LoRA belongs to: small modules alongside the attentions and the feed-forward layers of a frozen U-Net.

    h: what a layer gives, x: what it is given            what is trained                    changes
    adapter                 h + relu(h down) up           down, up                           the output of a layer
    parallel                h + relu(x down) up           down, up                           the output of a layer
    scaled_parallel         h + s relu(x down) up         down, up                           the output of a layer
    multi_head_parallel     head + relu(x down) up        down, up of every head             each head, before to_out
    prefix                  softmax(q [K; P_k]^T) [V; P_v]    P_k, P_v                       each head, before to_out

Paper: He et al. 2021, "Towards a unified view of parameter-efficient transfer learning", table 1. Its h + s Delta h of LoRA is lora.py. As
there, nothing in the model is replaced: forward hooks on an Attention or a FeedForward, taken off again without a trace.

Left out: the network that computes prefix tuning's vectors during training, and the text encoder, whose feed-forward layer is no module of
its own and whose causal attention would hide a prefix.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.adapters.base import Adapter, Hook
from minidiff.adapters.layers import choose, modules_of
from minidiff.attention import Attention
from minidiff.blocks import FeedForward
from minidiff.config import check_choice
from minidiff.pipeline import StableDiffusion

LAYER_PATTERNS = {
    "attention": (r"^unet\..*(self|cross)_attention$",),
    "self_attention": (r"^unet\..*self_attention$",),
    "cross_attention": (r"^unet\..*cross_attention$",),
    "feed_forward": (r"^unet\..*feed_forward$",),
}
KINDS = (Attention, FeedForward)
SCALE = 4.0  # of the scaled parallel adapter: the paper's choice (section 4.6)
PREFIX_STD = 0.02


class AdapterModule(nn.Module):
    """What one layer gets from an adapter of this family."""

    def hooks(self, layer: Attention | FeedForward) -> Sequence[Hook]:
        """Return the hooks that connect this module to its layer, or to projections of it."""
        raise NotImplementedError


class BottleneckAdapter(AdapterModule):
    """A bottleneck alongside a layer, reading what it reads (an attention's x), or behind it (Houlsby et al. 2019), reading its output.

    Either way it is inside the skip around the layer.

    Args:
        width: of the layer's output
        rank: of the bottleneck
        generator: of the random numbers
        scale: s, 1 or, scaled, the paper's 4
        behind: read the layer's output
    """

    def __init__(self, width: int, rank: int, generator: torch.Generator, scale: float = 1.0, behind: bool = False):
        super().__init__()
        self.scale, self.behind = scale, behind
        self.down, self.up = new_down(width, rank, generator), linear(torch.zeros(width, rank))

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """Return what is added to the layer's output: s relu(x down) up."""
        return self.scale * self.up(torch.relu(self.down(x.to(self.down.weight.dtype))))

    def hooks(self, layer: Attention | FeedForward) -> Sequence[Hook]:
        """Return one hook on the layer."""
        return [Hook(layer, self._add)]

    def _add(self, layer: nn.Module, args: tuple[Tensor, ...], h: Tensor) -> Tensor:
        return (h + self(h if self.behind else args[0])).to(h.dtype)


class MultiHeadParallelAdapter(AdapterModule):
    """A bottleneck of `rank` for every head, from the attention's input to the head's channels, where prefix tuning works."""

    def __init__(self, width: int, heads: int, rank: int, generator: torch.Generator):
        super().__init__()
        self.heads = heads
        self.down = new_down(width, heads * rank, generator)
        self.up = nn.Parameter(torch.zeros(heads, rank, width // heads))
        self._x: list[Tensor] = []  # the attention's input, between its start and to_out

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """Return what is added to the heads, which lie next to each other: relu(x down_i) up_i for head i."""
        z = torch.relu(self.down(x.to(self.down.weight.dtype))).unflatten(-1, (self.heads, -1))
        return torch.einsum("bnhr, hrd -> bnhd", z, self.up).flatten(-2)

    def hooks(self, layer: Attention | FeedForward) -> Sequence[Hook]:
        """Return one hook that keeps the attention's input, and one that adds to what to_out reads."""
        assert isinstance(layer, Attention)
        return [Hook(layer, self._keep_input, "input"), Hook(layer.to_out, self._add_to_heads, "input")]

    def _keep_input(self, layer: Attention, args: tuple[Tensor, ...]) -> None:
        self._x = [args[0]]

    def _add_to_heads(self, to_out: nn.Linear, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return ((args[0] + self(self._x.pop())).to(args[0].dtype),)


class Prefix(AdapterModule):
    """Prefix tuning (Li and Liang 2021): keys and values of its own that every query may look at, in addition to those of the context.

    They come after the context's, which makes no difference to a softmax and leaves the words of attention maps where they were. From the
    start they take a part of the attention: this is the one method here that changes something before it has learned. They make the outputs
    of to_k and to_v longer, so they are attached after what adds to these, such as a LoRA.
    """

    def __init__(self, width: int, length: int, generator: torch.Generator):
        super().__init__()
        self.keys, self.values = (nn.Parameter(PREFIX_STD * normal((length, width), generator)) for _ in range(2))

    def hooks(self, layer: Attention | FeedForward) -> Sequence[Hook]:
        """Return a hook on to_k and one on to_v."""
        assert isinstance(layer, Attention)
        pairs = (layer.to_k, self.keys), (layer.to_v, self.values)
        return [Hook(projection, partial(self._append, rows), "extend") for projection, rows in pairs]

    def _append(self, rows: nn.Parameter, projection: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return torch.cat([output, rows.to(output.dtype).expand(len(output), -1, -1)], dim=1)


class AdapterSet(Adapter):
    """Modules by the names of the layers they belong to, such as "unet.middle.transformer.blocks.0.cross_attention"."""

    title = "these adapters"

    def fit(self, sd: StableDiffusion) -> Sequence[Hook]:
        """Return the hooks of all modules. Raises ValueError with the layers that are absent."""
        layers = modules_of(sd, KINDS)
        if absent := [name for name in self.layers if name not in layers]:
            raise ValueError(f"these adapters do not fit the model, which has no {', '.join(absent[:5])}")
        return [hook for name, module in self.layers.items() for hook in module.hooks(layers[name])]


# --- creating ---------------------------------------------------------------------------------------------------------

# A new module for a layer whose output has this width, with this number of heads: (width, heads, rank, scale, generator).
ADAPTER_METHODS: dict[str, Callable[[int, int, int, float, torch.Generator], AdapterModule]] = {
    "adapter": lambda width, heads, rank, scale, generator: BottleneckAdapter(width, rank, generator, behind=True),
    "parallel": lambda width, heads, rank, scale, generator: BottleneckAdapter(width, rank, generator),
    "scaled_parallel": lambda width, heads, rank, scale, generator: BottleneckAdapter(width, rank, generator, scale),
    "multi_head_parallel": lambda width, heads, rank, scale, generator: MultiHeadParallelAdapter(width, heads, rank, generator),
    "prefix": lambda width, heads, rank, scale, generator: Prefix(width, rank, generator),
}
ATTENTION_ONLY = ("multi_head_parallel", "prefix")  # they change heads


def create_adapters(
    sd: StableDiffusion, patterns: tuple[str, ...], *, method: str, rank: int, scale: float | None = None, generator: torch.Generator
) -> AdapterSet:
    """Return new modules, float32 on the model's device, not attached; all but prefixes change nothing yet.

    Args:
        sd: the model that they are for
        patterns: regular expressions searched in the full names of the U-Net's attentions and feed-forward layers; see LAYER_PATTERNS
        method: one of ADAPTER_METHODS
        rank: from 1: the width of the bottleneck, of every head in "multi_head_parallel"; the number of rows in "prefix"
        scale: s of "scaled_parallel", 4 by default
        generator: of the random numbers

    Raises ValueError for numbers out of range, a method that only attentions can have on a feed-forward layer, a layer of the text encoder,
    and as `choose` does.
    """
    check_choice("method", method, ADAPTER_METHODS)
    if rank < 1:
        raise ValueError(f"rank {rank}: expected a whole number from 1, such as 8")
    if scale is not None and method != "scaled_parallel":
        raise ValueError(f"scale {scale} has no meaning for {method!r}; choose 'scaled_parallel'")
    layers = {name: layer for name, layer in modules_of(sd, KINDS).items() if name.startswith("unet.")}
    result = {}
    for name in choose(list(layers), patterns):
        layer = layers[name]
        if isinstance(layer, FeedForward) and method in ATTENTION_ONLY:
            raise ValueError(f"{method!r} changes the heads of an attention, and {name} has none; choose another method or pattern")
        width, heads = (layer.to_out.out_features, layer.heads) if isinstance(layer, Attention) else (layer.proj_out.out_features, 1)
        result[name] = ADAPTER_METHODS[method](width, heads, rank, SCALE if scale is None else scale, generator)
    return AdapterSet(result).to(sd.device)


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "..."]:
    """Return unit normals, on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device)


def new_down(width: int, rank: int, generator: torch.Generator) -> nn.Linear:
    """Return a layer of normals with variance 1 / width, so that its outputs have the size of its inputs."""
    return linear(normal((rank, width), generator) / width**0.5)


def linear(weight: Float[Tensor, "out in"]) -> nn.Linear:
    """Return a layer with this weight, and a bias of zeros."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(torch.zeros(len(weight)))
    return layer
