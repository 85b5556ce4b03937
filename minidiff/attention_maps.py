"""Which word each part of the picture looked at: the cross-attention maps of a U-Net, recorded while it runs.

A map is softmax(q k^T / sqrt(d)) of one cross-attention layer, averaged over its heads (Hertz et al. 2022, "Prompt-to-prompt", section
3.1; Tang et al. 2022, "What the DAAM"). The recorder works out the weights a second time beside the fused kernel that makes the
picture, so that recording cannot change the picture.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from minidiff.attention import Attention, attention_weights
from minidiff.blocks import SpatialTransformer
from minidiff.unet import UNet


@contextmanager
def record_cross_attention(unet: UNet) -> Iterator[dict[str, Float[Tensor, "B H W L"]]]:
    """While open, fills the dict it gives with one map a layer, under the layer's name in the U-Net.

    Clear the dict to record the next call; while a layer's map is there, it is kept.
    """
    maps: dict[str, Tensor] = {}
    handles = []

    def record(name: str, transformer: SpatialTransformer):
        rows = []

        def note_size(module, args):
            rows[:] = [args[0].shape[2]]

        @torch.no_grad()
        def note_map(module: Attention, args, output):
            if name not in maps:
                x, context = args
                weights = attention_weights(module.to_q(x), module.to_k(context), module.heads).mean(dim=1)
                maps[name] = rearrange(weights, "B (H W) L -> B H W L", H=rows[0])

        handles.append(transformer.register_forward_pre_hook(note_size))
        handles.append(transformer.blocks[0].cross_attention.register_forward_hook(note_map))

    for name, module in unet.named_modules():
        if isinstance(module, SpatialTransformer):
            record(name, module)
    try:
        yield maps
    finally:
        for handle in handles:
            handle.remove()


def word_map(maps: dict[str, Float[Tensor, "B _h _w L"]], positions: list[int], size: tuple[int, int]) -> Float[Tensor, "B H W"]:
    """One word's map: the sum over the tokens it took, the mean over all layers, each enlarged to `size` (H, W).

    positions: of the word's tokens in the context, the start token being at 0. Raises ValueError for none, and for maps that are not there.
    """
    if not maps:
        raise ValueError("no attention maps were recorded; ask for them with attention_maps=True")
    length = next(iter(maps.values())).shape[-1]
    if not positions or not all(0 <= position < length for position in positions):
        raise ValueError(f"positions {positions}: expected at least one of 0..{length - 1}; Tokenizer.words gives each word's")
    layers = [m[..., positions].sum(dim=-1, keepdim=True).permute(0, 3, 1, 2) for m in maps.values()]
    enlarged = [torch.nn.functional.interpolate(layer, size=size, mode="bilinear", align_corners=False) for layer in layers]
    return torch.cat(enlarged, dim=1).mean(dim=1)
