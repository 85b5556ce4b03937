"""The numbers of a model that the shapes of its tensors tell, and the same numbers of a config, to be compared with them."""

from collections.abc import Mapping
from itertools import count
from typing import Any

from minidiff.blocks import SIZE_WAVES
from minidiff.config import SIZE_NUMBERS, ModelConfig, TextEncoderConfig
from weights_loader.name_table import PartNames, file_name

Shapes = Mapping[str, tuple[int, ...]]
TEXT_SIZES = ("text encoder width", "text encoder layers", "vocabulary", "context length")


def sizes(shapes: Shapes, names: Mapping[str, PartNames], config: ModelConfig) -> dict[str, Any]:
    """Return what the shapes of a file in LDM names tell of a config. Parts that are not there give None, 0 or ().

    Args:
        shapes: of the tensors in the file.
        names: how the family's files name each part, in the LDM layout.
        config: any config of the family; the names of layers depend on it.
    """
    unet, vae = names["unet"].prefix, names["vae"].prefix
    widths, attention, blocks = _unet_levels(shapes, unet)
    encoder = vae + "encoder.down.{}.block.{}.conv1.weight"
    linear, context_width = None, None
    for name, shape in shapes.items():
        if name.startswith(unet) and name.endswith("attn2.to_k.weight"):
            context_width = _size(shapes, name, 1)
        if name.startswith(unet) and name.endswith("1.proj_in.weight"):
            linear = len(shape) == 2
    added = _size(shapes, f"{unet}label_emb.0.0.weight", 1)
    return {
        **_text_sizes(shapes, names.get("text_encoder"), config.text_encoder, ""),
        **_text_sizes(shapes, names.get("text_encoder_2"), config.text_encoder_2, " 2"),
        "pooled width": None if added is None else added - SIZE_NUMBERS * SIZE_WAVES,
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
    unet, vae = config.unet, config.vae
    text = {}
    for encoder, number in ((config.text_encoder, ""), (config.text_encoder_2, " 2")):
        values = (encoder.width, encoder.layers, encoder.vocab_size, encoder.context_length) if encoder else (None, 0, None, None)
        text |= dict(zip((f"{name}{number}" for name in TEXT_SIZES), values, strict=True))
    return {
        **text,
        "pooled width": unet.pooled_width,
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


def _text_sizes(shapes: Shapes, names: PartNames | None, config: TextEncoderConfig | None, number: str) -> dict[str, int | None]:
    values = None, 0, None, None
    if names is not None and config is not None:
        layers = names.layers(config)
        table, positions, norm = (
            names.prefix + file_name(ours, layers)
            for ours in ("token_embedding.weight", "position_embedding.weight", "blocks.0.norm_1.weight")
        )
        place, layer = norm.rsplit(".0.", 1)
        values = _size(shapes, table, 1), _length(shapes, f"{place}.{{n}}.{layer}"), _size(shapes, table, 0), _size(shapes, positions, 0)
    return dict(zip((f"{name}{number}" for name in TEXT_SIZES), values, strict=True))


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
