"""Which word each part of the picture looked at: the attention maps of a U-Net, recorded or changed while it runs.

    layer's q, k --> softmax(q k^T / sqrt(d)) --> change(layer, weights) --> None: the fused kernel's result stays
                                                                         --> other weights, times v --> to_out

A map is softmax(q k^T / sqrt(d)) of one attention layer (Hertz et al. 2022, "Prompt-to-prompt", section 3.1; Tang et al. 2022, "What the
DAAM"). The weights are computed a second time, beside the fused kernel that makes the picture, so that recording cannot change the
picture, and only the rows whose weights are changed take the slow way.
"""

import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.attention import Attention, attention_weights
from minidiff.blocks import SpatialTransformer, TransformerBlock
from minidiff.config import check_choice
from minidiff.samplers import Step
from minidiff.unet import UNet

KINDS = ("cross", "self")


@dataclass(frozen=True)
class Layer:
    """An attention layer at one call of the U-Net.

    name: of its transformer in the U-Net; where a transformer has several blocks, ".1", ".2", ... follow for all but the first.
    kind: of KINDS. size: (H, W) in cells. rows: of the batch; under guidance the prompts' rows are the last half. Self-attention before the
    first cross-attention has one row per picture, since both halves are the same there.
    """

    name: str
    kind: str
    size: tuple[int, int]
    rows: int


Weights = Callable[[slice], Float[Tensor, "r h N L"]]  # the weights of some rows
Change = Callable[[Layer, Weights], Tensor | None]


@contextmanager
def control_attention(unet: UNet, change: Change, kinds: Sequence[str] = KINDS) -> Iterator[None]:
    """Give every attention of these kinds to `change`, while open, which may return other weights for it.

    change(layer, weights) may call weights(rows) for the weights of some rows of the batch. Where it returns None the layer's output stays
    as it is, bit for bit. Where it returns weights (r, h, N, L) they replace those of the last r rows; the other rows stay as they are.
    What other threads run meanwhile is not touched. Raises ValueError for another kind.
    """
    for kind in kinds:
        check_choice("kind of attention", kind, KINDS)
    hooks, thread = ExitStack(), threading.get_ident()

    def connect(attention: Attention, name: str, kind: str, height: list[int]) -> None:
        given: list[Tensor] = []

        def keep_input(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if threading.get_ident() == thread:
                given[:] = args[0], args[-1]  # x, and the context or x again

        def control(to_out: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
            if threading.get_ident() != thread:
                return None
            x, context = given
            H = height[0]
            changed = change(Layer(name, kind, (H, x.shape[1] // H), len(x)), partial(_weights, attention, x, context))
            if changed is None:
                return None
            v = rearrange(attention.to_v(context[-len(changed) :]), "r L (h d) -> r h L d", h=attention.heads)
            return (torch.cat([args[0][: -len(changed)], rearrange(changed @ v, "r h N d -> r N (h d)")]),)

        hooks.enter_context(attention.register_forward_pre_hook(keep_input))
        # In front of the adapters' hooks, which may add to what to_out reads.
        hooks.enter_context(attention.to_out.register_forward_pre_hook(control, prepend=True))

    def connect_transformer(name: str, transformer: SpatialTransformer) -> None:
        height: list[int] = []

        def keep_height(module: nn.Module, args: tuple[Tensor, Tensor]) -> None:
            if threading.get_ident() == thread:
                height[:] = [args[0].shape[2]]

        hooks.enter_context(transformer.register_forward_pre_hook(keep_height))
        for i, block in enumerate(transformer.blocks):
            assert isinstance(block, TransformerBlock)
            by_kind = {"cross": block.cross_attention, "self": block.self_attention}
            for kind in kinds:
                connect(by_kind[kind], f"{name}.{i}" if i else name, kind, height)

    with hooks:
        for name, module in unet.named_modules():
            if isinstance(module, SpatialTransformer):
                connect_transformer(name, module)
        yield


def _weights(attention: Attention, x: Tensor, context: Tensor, rows: slice) -> Float[Tensor, "r h N L"]:
    return attention_weights(attention.to_q(x[rows]), attention.to_k(context[rows]), attention.heads)


@contextmanager
def record_cross_attention(unet: UNet) -> Iterator[dict[str, Float[Tensor, "B H W L"]]]:
    """Fill the dict it gives, while open, with one map per layer, the mean over its heads, under the layer's name (see Layer).

    Clear the dict to record the next call; while a layer's map is there, it is kept. What other threads run meanwhile is not recorded.
    """
    maps: dict[str, Tensor] = {}

    def record(layer: Layer, weights: Weights) -> None:
        if layer.name not in maps:
            with torch.no_grad():
                maps[layer.name] = rearrange(weights(slice(None)).mean(dim=1), "B (H W) L -> B H W L", H=layer.size[0])

    with control_attention(unet, record, ("cross",)):
        yield maps


def with_attention_maps(steps: Generator[Step, Tensor | None, None], unet: UNet) -> Generator[Step, Tensor | None, None]:
    """Take the same steps, each with the maps of its first model call; of guidance's two halves those of the prompt.

        for step in with_attention_maps(sd.denoise("a cat"), sd.unet): step.attention_maps["middle.transformer"]

    Recording covers one step at a time: what the caller runs between two steps is not in the maps.
    """
    sent = None
    while True:
        with record_cross_attention(unet) as maps:
            try:
                step = steps.send(sent)
            except StopIteration:
                return
        # Guidance runs the unconditional half first; the prompt's rows are the last.
        sent = yield replace(step, attention_maps={name: m[-len(step.x_t) :] for name, m in maps.items()})


def word_map(maps: dict[str, Float[Tensor, "B _h _w L"]], positions: list[int], size: tuple[int, int]) -> Float[Tensor, "B H W"]:
    """Return one word's map: the sum over its tokens of the mean over all layers, each enlarged to `size` (H, W).

    positions: of the word's tokens in the context, the start token being at 0. Raises ValueError for none, and for maps that are not there.
    """
    if not maps:
        raise ValueError("no attention maps were recorded; take the steps through with_attention_maps")
    length = next(iter(maps.values())).shape[-1]
    if not positions or not all(0 <= position < length for position in positions):
        raise ValueError(f"positions {positions}: expected at least one of 0..{length - 1}; Tokenizer.words gives each word's")
    layers = [m[..., positions].sum(dim=-1, keepdim=True).permute(0, 3, 1, 2) for m in maps.values()]
    enlarged = [torch.nn.functional.interpolate(layer, size=size, mode="bilinear", align_corners=False) for layer in layers]
    return torch.cat(enlarged, dim=1).mean(dim=1)
