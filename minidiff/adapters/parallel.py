"""The family that LoRA belongs to: small modules beside the attentions and the feed-forward layers of a frozen U-Net.

    h: what a layer gives, x: what it is given            what is trained                    changes
    adapter                 h + relu(h down) up           down, up                           the output of a layer
    parallel                h + relu(x down) up           down, up                           the output of a layer
    scaled_parallel         h + s relu(x down) up         down, up                           the output of a layer
    multi_head_parallel     head + relu(x down) up        down, up of every head             each head, before to_out
    prefix                  softmax(q [K; P_k]^T) [V; P_v]    P_k, P_v                       each head, before to_out

Paper: He et al. 2021, "Towards a unified view of parameter-efficient transfer learning", table 1. Its h + s Delta h of LoRA is lora.py. As
there, nothing in the model is replaced: forward hooks on an Attention or a FeedForward, taken off again without a trace.

Left out: the network that prefix tuning makes its vectors with while training, and the text encoder, whose feed-forward layer is no
module of its own and whose causal attention would hide a prefix.
"""

from functools import partial

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minidiff.adapters.lora import choose, layers_of
from minidiff.attention import Attention
from minidiff.blocks import FeedForward
from minidiff.pipeline import StableDiffusion

METHODS = ("adapter", "parallel", "scaled_parallel", "multi_head_parallel", "prefix")
PATTERNS = {
    "attention": (r"^unet\..*(self|cross)_attention$",),
    "self_attention": (r"^unet\..*self_attention$",),
    "cross_attention": (r"^unet\..*cross_attention$",),
    "feed_forward": (r"^unet\..*feed_forward$",),
}
SCALE = 4.0  # of the scaled parallel adapter: the paper's choice (section 4.6)
PREFIX_STD = 0.02


class Adapter(nn.Module):
    """A bottleneck behind a layer (Houlsby et al. 2019), inside the skip around it. width: of the layer's output."""

    def __init__(self, width: int, rank: int, generator: torch.Generator):
        super().__init__()
        self.down, self.up = new_down(width, rank, generator), new_up(rank, width)

    def forward(self, h: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """What is added to the layer's output h: relu(h down) up."""
        return self.up(torch.relu(self.down(h.to(self.down.weight.dtype))))

    def hook(self, layer: nn.Module) -> list[RemovableHandle]:
        return [layer.register_forward_hook(self._add)]

    def _add(self, layer: nn.Module, args: tuple[Tensor, ...], h: Tensor) -> Tensor:
        return (h + self(h)).to(h.dtype)


class ParallelAdapter(nn.Module):
    """A bottleneck beside a layer: reads what the layer reads, an attention's x. `scale` s is 1 or, scaled, the paper's 4."""

    def __init__(self, width: int, rank: int, generator: torch.Generator, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.down, self.up = new_down(width, rank, generator), new_up(rank, width)

    def forward(self, x: Float[Tensor, "*N D"]) -> Float[Tensor, "*N D"]:
        """What is added to the layer's output: s relu(x down) up."""
        return self.scale * self.up(torch.relu(self.down(x.to(self.down.weight.dtype))))

    def hook(self, layer: nn.Module) -> list[RemovableHandle]:
        return [layer.register_forward_hook(self._add)]

    def _add(self, layer: nn.Module, args: tuple[Tensor, ...], h: Tensor) -> Tensor:
        return (h + self(args[0])).to(h.dtype)


class MultiHeadParallelAdapter(nn.Module):
    """A bottleneck of `rank` for every head, from the attention's input to the head's channels, where prefix tuning works."""

    def __init__(self, width: int, heads: int, rank: int, generator: torch.Generator):
        super().__init__()
        self.heads = heads
        self.down = new_down(width, heads * rank, generator)
        self.up = nn.Parameter(torch.zeros(heads, rank, width // heads))
        self._given: list[Tensor] = []  # the attention's input, between its start and to_out

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        """What is added to the heads, which stand side by side: relu(x down_i) up_i for head i."""
        z = torch.relu(self.down(x.to(self.down.weight.dtype))).unflatten(-1, (self.heads, -1))
        return torch.einsum("bnhr, hrd -> bnhd", z, self.up).flatten(-2)

    def hook(self, layer: Attention) -> list[RemovableHandle]:
        return [layer.register_forward_pre_hook(self._note), layer.to_out.register_forward_pre_hook(self._change)]

    def _note(self, layer: Attention, args: tuple[Tensor, ...]):
        self._given = [args[0]]

    def _change(self, to_out: nn.Linear, args: tuple[Tensor, ...]) -> tuple[Tensor]:
        return ((args[0] + self(self._given.pop())).to(args[0].dtype),)


class Prefix(nn.Module):
    """Prefix tuning (Li and Liang 2021): keys and values of its own that every query may look at, beside those of the context.

    They stand behind the context's, which is the same to a softmax and leaves the words of attention maps where they were. From the start
    they take a share of the attention: the one method here that changes something before it has learned. They make to_k's and to_v's
    outputs longer, so they are attached after what adds to these, a LoRA for one.
    """

    def __init__(self, width: int, length: int, generator: torch.Generator):
        super().__init__()
        self.keys, self.values = (nn.Parameter(PREFIX_STD * normal((length, width), generator)) for _ in range(2))

    def hook(self, layer: Attention) -> list[RemovableHandle]:
        pairs = (layer.to_k, self.keys), (layer.to_v, self.values)
        return [projection.register_forward_hook(partial(_append, rows)) for projection, rows in pairs]


def _append(rows: nn.Parameter, projection: nn.Linear, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return torch.cat([output, rows.to(output.dtype).expand(len(output), -1, -1)], dim=1)


Small = Adapter | ParallelAdapter | MultiHeadParallelAdapter | Prefix


class Adapters(nn.Module):
    """Small modules by the names of the layers they belong to, as "unet.middle.transformer.blocks.0.cross_attention"."""

    def __init__(self, layers: dict[str, Small]):
        super().__init__()
        # The names of submodules may not have dots.
        self.by_name = nn.ModuleDict({name.replace(".", "/"): small for name, small in layers.items()})
        self._handles = []

    @property
    def layers(self) -> dict[str, Small]:
        return {name.replace("/", "."): small for name, small in self.by_name.items()}

    def attach(self, sd: StableDiffusion):
        """Move to the model's device; from now on its layers give what they give with the small modules, in the dtype that they had.

        Raises ValueError if they are attached already, or a layer is absent.
        """
        if self._handles:
            raise ValueError("these adapters are attached already; detach() them first")
        layers = layers_of(sd, (Attention, FeedForward))
        if absent := [name for name in self.layers if name not in layers]:
            raise ValueError(f"these adapters do not fit the model, which has no {', '.join(absent[:5])}")
        self.to(sd.device)
        self._handles = [handle for name, small in self.layers.items() for handle in small.hook(layers[name])]

    def detach(self):
        """The model is as it was before `attach`; without effect on adapters that are not attached."""
        for handle in self._handles:
            handle.remove()
        self._handles = []


def create_adapters(
    sd: StableDiffusion, patterns: tuple[str, ...], *, method: str, rank: int, scale: float | None = None, generator: torch.Generator
) -> Adapters:
    """New small modules, float32 on the model's device, not attached; all but prefixes change nothing yet.

    patterns: regular expressions searched in the full names of the U-Net's attentions and feed-forward layers; see PATTERNS. method: one of
    METHODS. rank: the bottleneck's width, of every head in "multi_head_parallel", the number of rows in "prefix". scale: s of
    "scaled_parallel", 4 by default. Raises ValueError for numbers out of range, a method that only attentions can have on a feed-forward
    layer, a layer of the text encoder, and as `choose` does.
    """
    if method not in METHODS:
        raise ValueError(f"method {method!r} unknown; choose {', '.join(METHODS)}")
    if rank < 1:
        raise ValueError(f"rank {rank}: expected a whole number from 1, such as 8")
    if scale is not None and method != "scaled_parallel":
        raise ValueError(f"scale {scale} has no meaning for {method!r}; choose 'scaled_parallel'")
    layers = {name: m for name, m in layers_of(sd, (Attention, FeedForward)).items() if name.startswith("unet.")}
    result = {}
    for name in choose(list(layers), patterns):
        layer = layers[name]
        if isinstance(layer, FeedForward) and method in ("multi_head_parallel", "prefix"):
            raise ValueError(f"{method!r} changes the heads of an attention, and {name} has none; choose another method or pattern")
        result[name] = _new(layer, method, rank, SCALE if scale is None else scale, generator)
    return Adapters(result).to(sd.device)


def _new(layer: Attention | FeedForward, method: str, rank: int, scale: float, generator: torch.Generator) -> Small:
    width = layer.to_out.out_features if isinstance(layer, Attention) else layer.proj_out.out_features
    if method == "adapter":
        return Adapter(width, rank, generator)
    if method == "parallel":
        return ParallelAdapter(width, rank, generator)
    if method == "scaled_parallel":
        return ParallelAdapter(width, rank, generator, scale)
    if method == "multi_head_parallel":
        return MultiHeadParallelAdapter(width, layer.heads, rank, generator)
    return Prefix(width, rank, generator)


def normal(shape: tuple[int, ...], generator: torch.Generator) -> Float[Tensor, "..."]:
    """Unit normals, on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device)


def new_down(width: int, rank: int, generator: torch.Generator) -> nn.Linear:
    """Normal with variance 1 / width, so that its outputs have the size of its inputs; the bias is zero."""
    layer = nn.Linear(width, rank, device="meta")
    layer.weight, layer.bias = nn.Parameter(normal((rank, width), generator) / width**0.5), nn.Parameter(torch.zeros(rank))
    return layer


def new_up(rank: int, width: int) -> nn.Linear:
    """All zero: the change starts at nothing."""
    layer = nn.Linear(rank, width, device="meta")
    layer.weight, layer.bias = nn.Parameter(torch.zeros(width, rank)), nn.Parameter(torch.zeros(width))
    return layer
