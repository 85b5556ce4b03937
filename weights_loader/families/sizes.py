"""The numbers of a model that the shapes of its tensors tell, and the same numbers of a config, to be compared with them."""

from collections.abc import Mapping
from itertools import count
from typing import Any

from minidiff.config import ModelConfig
from weights_loader.name_table import PartNames, file_name

Shapes = Mapping[str, tuple[int, ...]]


def sizes(shapes: Shapes, names: Mapping[str, PartNames], config: ModelConfig) -> dict[str, Any]:
    """Return what the shapes of a file in LDM names tell of a config. Parts that are not there give None, 0 or ().

    Args:
        shapes: of the tensors in the file.
        names: how the family's files name each part, in the LDM layout.
        config: any config of the family; the names of layers depend on it.
    """
    text, unet, vae = names["text_encoder"], names["unet"].prefix, names["vae"].prefix
    text_names = text.layers(config.text_encoder)
    token_embedding = text.prefix + file_name("token_embedding.weight", text_names)
    positions = text.prefix + file_name("position_embedding.weight", text_names)
    text_layer = text.prefix + file_name("blocks.0.norm_1.weight", text_names).replace(".0.", ".{n}.")
    widths, attention, blocks = _unet_levels(shapes, unet)
    encoder = vae + "encoder.down.{}.block.{}.conv1.weight"
    linear, context_width = None, None
    for name, shape in shapes.items():
        if name.startswith(unet) and name.endswith("attn2.to_k.weight"):
            context_width = _size(shapes, name, 1)
        if name.startswith(unet) and name.endswith("1.proj_in.weight"):
            linear = len(shape) == 2
    return {
        "text encoder width": _size(shapes, token_embedding, 1),
        "text encoder layers": _length(shapes, text_layer),
        "vocabulary": _size(shapes, token_embedding, 0),
        "context length": _size(shapes, positions, 0),
        "U-Net input channels": _size(shapes, f"{unet}input_blocks.0.0.weight", 1),
        "U-Net output channels": _size(shapes, f"{unet}out.2.weight", 0),
        "U-Net widths": widths,
        "U-Net attention": attention,
        "U-Net blocks per level": blocks,
        "context width": context_width,
        "linear projection": linear,
        "VAE widths": tuple(_size(shapes, encoder.format(i, 0), 0) for i in range(_length(shapes, encoder.format("{n}", 0)))),
        "VAE blocks per level": _length(shapes, encoder.format(0, "{n}")),
        "latent channels": _size(shapes, f"{vae}post_quant_conv.weight", 0),
    }


def config_sizes(config: ModelConfig) -> dict[str, Any]:
    """Return the numbers of a config that shapes can tell."""
    text, unet, vae = config.text_encoder, config.unet, config.vae
    return {
        "text encoder width": text.width,
        "text encoder layers": text.layers,
        "vocabulary": text.vocab_size,
        "context length": text.context_length,
        "U-Net input channels": unet.in_channels,
        "U-Net output channels": unet.out_channels,
        "U-Net widths": unet.widths,
        "U-Net attention": unet.attention,
        "U-Net blocks per level": unet.blocks_per_level,
        "context width": unet.context_width,
        "linear projection": unet.linear_projection,
        "VAE widths": vae.widths,
        "VAE blocks per level": vae.blocks_per_level,
        "latent channels": vae.latent_channels,
    }


def _unet_levels(shapes: Shapes, prefix: str) -> tuple[tuple[int | None, ...], tuple[int, ...], int]:
    """Return width and transformer depth of each level, and the blocks of the first, following the way down to where the names end."""
    widths, attention, blocks, new_level = [], [], [], True
    step = 0
    while True:
        step += 1
        block = f"{prefix}input_blocks.{step}"
        if f"{block}.0.op.weight" in shapes:
            new_level = True
        elif (convolution := f"{block}.0.in_layers.2.weight") in shapes:
            if new_level:
                widths.append(_size(shapes, convolution, 0))
                attention.append(_length(shapes, f"{block}.1.transformer_blocks.{{n}}.attn1.to_k.weight"))
                blocks.append(0)
                new_level = False
            blocks[-1] += 1
        else:
            return tuple(widths), tuple(attention), blocks[0] if blocks else 0


def _size(shapes: Shapes, name: str, axis: int) -> int | None:
    shape = shapes.get(name, ())
    return shape[axis] if axis < len(shape) else None


def _length(shapes: Shapes, name: str) -> int:
    """Count the names with 0, 1, 2, ... in place of {n} that are there."""
    return next(i for i in count() if name.format(n=i) not in shapes)
