"""Which word each part of the picture looked at: the cross-attention maps of a U-Net, recorded while it runs.

A map is softmax(q k^T / sqrt(d)) of one cross-attention layer, averaged over its heads (Hertz et al. 2022, "Prompt-to-prompt", section
3.1; Tang et al. 2022, "What the DAAM"). The recorder computes the weights a second time, beside the fused kernel that makes the picture,
so that recording cannot change the picture.
"""

import threading
from collections.abc import Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from minidiff.attention import Attention, attention_weights
from minidiff.blocks import SpatialTransformer, TransformerBlock
from minidiff.samplers import Step
from minidiff.unet import UNet


@contextmanager
def record_cross_attention(unet: UNet) -> Iterator[dict[str, Float[Tensor, "B H W L"]]]:
    """Fill the dict it gives, while open, with one map per layer, under the name of the layer's transformer in the U-Net.

    Where a transformer has several blocks, ".1", ".2", ... follow the name for all but the first. Clear the dict to record the next call;
    while a layer's map is there, it is kept. What other threads run meanwhile is not recorded.
    """
    maps: dict[str, Tensor] = {}
    hooks, thread = ExitStack(), threading.get_ident()

    def record(name: str, transformer: SpatialTransformer):
        rows = []

        def note_size(module, args):
            if threading.get_ident() == thread:
                rows[:] = [args[0].shape[2]]

        def note_map(name: str, module: Attention, args, output):
            if name not in maps and threading.get_ident() == thread:
                x, context = args
                with torch.no_grad():
                    weights = attention_weights(module.to_q(x), module.to_k(context), module.heads).mean(dim=1)
                maps[name] = rearrange(weights, "B (H W) L -> B H W L", H=rows[0])

        hooks.enter_context(transformer.register_forward_pre_hook(note_size))
        for i, block in enumerate(transformer.blocks):
            assert isinstance(block, TransformerBlock)
            note = partial(note_map, f"{name}.{i}" if i else name)
            hooks.enter_context(block.cross_attention.register_forward_hook(note))

    with hooks:
        for name, module in unet.named_modules():
            if isinstance(module, SpatialTransformer):
                record(name, module)
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
