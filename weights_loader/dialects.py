"""The names that files give to the weights, and the names they have here.

    ours       down.0.transformers.1.blocks.0.cross_attention.to_k.weight
    ldm        model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight
    diffusers  down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight                    (in unet/)

A name is the place of a block in the model and, inside the block, a layer. Both are renamed by the rules of this page: a few loops
for the places, which differ in how they count, and a short table for each kind of block. `table` applies them to the names of a real
module, so that it is complete by construction; a parameter without a rule is an error here, not at a user's.

    ldm        the original code's single file (CompVis/stable-diffusion; Stability-AI/stablediffusion for 2.x)
    diffusers  one folder a part, and for the text encoder the names of the transformers library
"""

import re
from dataclasses import dataclass

import torch
from torch import Tensor

from minidiff.config import TextEncoderConfig, UNetConfig, VAEConfig
from minidiff.text_encoder import TextEncoder
from minidiff.unet import UNet
from minidiff.vae import VAE

LAYOUTS = ("ldm", "diffusers")
Part = UNet | VAE | TextEncoder

# What the names of a part begin with in an LDM file.
UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
CLIP_PREFIX = "cond_stage_model.transformer.text_model."  # SD 1.x
OPEN_CLIP_PREFIX = "cond_stage_model.model."  # SD 2.x


@dataclass(frozen=True)
class Place:
    """Where a file keeps one of our parameters.

    third: which third of the rows of a stacked query, key and value matrix; None where the tensor is not shared.
    convolution: the file has a 1x1 convolution (C_out, C_in, 1, 1) where we have the same map as a matrix (C_out, C_in).
    """

    name: str
    third: int | None = None
    convolution: bool = False


# ------------------------------------------------------------------------------------- inside a block: ours -> theirs

# The original numbers the layers of a sequence. SiLU and dropout have no weights, but count.
RESBLOCK_LDM = {
    "norm_1": "in_layers.0",
    "conv_1": "in_layers.2",  # 1 is SiLU
    "time_projection": "emb_layers.1",  # 0 is SiLU
    "norm_2": "out_layers.0",
    "conv_2": "out_layers.3",  # 1 is SiLU, 2 dropout
    "skip": "skip_connection",
}
RESBLOCK_DIFFUSERS = {
    "norm_1": "norm1",
    "conv_1": "conv1",
    "time_projection": "time_emb_proj",
    "norm_2": "norm2",
    "conv_2": "conv2",
    "skip": "conv_shortcut",
}
# The original's VAE was taken from another project (taming-transformers), with that one's names.
VAE_RESBLOCK_LDM = {"norm_1": "norm1", "conv_1": "conv1", "norm_2": "norm2", "conv_2": "conv2", "skip": "nin_shortcut"}
VAE_ATTENTION_LDM = {
    "norm": "norm",
    "attention.to_q": "q",
    "attention.to_k": "k",
    "attention.to_v": "v",
    "attention.to_out": "proj_out",
}
VAE_ATTENTION_DIFFUSERS = {
    "norm": "group_norm",
    "attention.to_q": "to_q",
    "attention.to_k": "to_k",
    "attention.to_v": "to_v",
    "attention.to_out": "to_out.0",  # 1 is dropout
}
# diffusers kept the original's transformer. It is a list of blocks, of which Stable Diffusion 1 and 2 have one.
TRANSFORMER = {
    "norm": "norm",
    "proj_in": "proj_in",
    "blocks.0.norm_1": "transformer_blocks.0.norm1",
    "blocks.0.self_attention.to_q": "transformer_blocks.0.attn1.to_q",
    "blocks.0.self_attention.to_k": "transformer_blocks.0.attn1.to_k",
    "blocks.0.self_attention.to_v": "transformer_blocks.0.attn1.to_v",
    "blocks.0.self_attention.to_out": "transformer_blocks.0.attn1.to_out.0",  # 1 is dropout
    "blocks.0.norm_2": "transformer_blocks.0.norm2",
    "blocks.0.cross_attention.to_q": "transformer_blocks.0.attn2.to_q",
    "blocks.0.cross_attention.to_k": "transformer_blocks.0.attn2.to_k",
    "blocks.0.cross_attention.to_v": "transformer_blocks.0.attn2.to_v",
    "blocks.0.cross_attention.to_out": "transformer_blocks.0.attn2.to_out.0",
    "blocks.0.norm_3": "transformer_blocks.0.norm3",
    "blocks.0.feed_forward.proj_in": "transformer_blocks.0.ff.net.0.proj",
    "blocks.0.feed_forward.proj_out": "transformer_blocks.0.ff.net.2",  # 1 is dropout
    "proj_out": "proj_out",
}
TEXT_BLOCK_CLIP = {
    "norm_1": "layer_norm1",
    "attention.to_q": "self_attn.q_proj",
    "attention.to_k": "self_attn.k_proj",
    "attention.to_v": "self_attn.v_proj",
    "attention.to_out": "self_attn.out_proj",
    "norm_2": "layer_norm2",
    "linear_1": "mlp.fc1",
    "linear_2": "mlp.fc2",
}
# OpenCLIP uses PyTorch's own attention, which stacks the rows of query, key and value in one tensor.
TEXT_BLOCK_OPEN_CLIP = {
    "norm_1": "ln_1",
    "attention.to_q.weight": "attn.in_proj_weight",
    "attention.to_k.weight": "attn.in_proj_weight",
    "attention.to_v.weight": "attn.in_proj_weight",
    "attention.to_q.bias": "attn.in_proj_bias",
    "attention.to_k.bias": "attn.in_proj_bias",
    "attention.to_v.bias": "attn.in_proj_bias",
    "attention.to_out": "attn.out_proj",
    "norm_2": "ln_2",
    "linear_1": "mlp.c_fc",
    "linear_2": "mlp.c_proj",
}


def _block(ours: str, theirs: str, inside: dict[str, str]) -> dict[str, str]:
    return {f"{ours}.{layer}": f"{theirs}.{their_layer}" for layer, their_layer in inside.items()}


# ------------------------------------------------------------------------------- places of the blocks: ours -> theirs


def _unet_ldm(config: UNetConfig) -> dict[str, str]:
    """The original counts every step on the way down, and every step on the way up, in one row, whatever its level."""
    names = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",  # 1 is SiLU
        "conv_in": "input_blocks.0.0",
        "norm_out": "out.0",
        "conv_out": "out.2",  # 1 is SiLU
    }
    levels, steps = len(config.widths), config.blocks_per_level + 1  # a level's blocks and its downsampling; on the way up one block more
    for i in range(levels):
        for j in range(config.blocks_per_level):
            step = f"input_blocks.{1 + i * steps + j}"  # 0 is conv_in
            names |= _block(f"down.{i}.blocks.{j}", f"{step}.0", RESBLOCK_LDM)
            names |= _block(f"down.{i}.transformers.{j}", f"{step}.1", TRANSFORMER)
        names[f"down.{i}.downsample"] = f"input_blocks.{(i + 1) * steps}.0.op"
    names |= _block("middle.block_1", "middle_block.0", RESBLOCK_LDM)
    names |= _block("middle.transformer", "middle_block.1", TRANSFORMER)
    names |= _block("middle.block_2", "middle_block.2", RESBLOCK_LDM)
    for i in range(levels):
        for j in range(steps):
            step = f"output_blocks.{i * steps + j}"
            names |= _block(f"up.{i}.blocks.{j}", f"{step}.0", RESBLOCK_LDM)
            names |= _block(f"up.{i}.transformers.{j}", f"{step}.1", TRANSFORMER)
        # Upsampling belongs to the last step of its level, behind the ResBlock and, if there is one, the transformer.
        behind = 2 if config.attention[levels - 1 - i] else 1
        names[f"up.{i}.upsample"] = f"output_blocks.{i * steps + steps - 1}.{behind}.conv"
    return names


def _unet_diffusers(config: UNetConfig) -> dict[str, str]:
    """diffusers counts as we do; up_blocks.0 is the deepest."""
    names = {
        "time_embedding.linear_1": "time_embedding.linear_1",
        "time_embedding.linear_2": "time_embedding.linear_2",
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    }
    for i in range(len(config.widths)):
        for way, sampling in (("down", "downsample"), ("up", "upsample")):
            for j in range(config.blocks_per_level + 1):
                names |= _block(f"{way}.{i}.blocks.{j}", f"{way}_blocks.{i}.resnets.{j}", RESBLOCK_DIFFUSERS)
                names |= _block(f"{way}.{i}.transformers.{j}", f"{way}_blocks.{i}.attentions.{j}", TRANSFORMER)
            names[f"{way}.{i}.{sampling}"] = f"{way}_blocks.{i}.{sampling}rs.0.conv"
    names |= _block("middle.block_1", "mid_block.resnets.0", RESBLOCK_DIFFUSERS)
    names |= _block("middle.transformer", "mid_block.attentions.0", TRANSFORMER)
    names |= _block("middle.block_2", "mid_block.resnets.1", RESBLOCK_DIFFUSERS)
    return names


def _vae_ldm(config: VAEConfig) -> dict[str, str]:
    """The original counts the decoder's levels from the highest resolution, though it runs them the other way round."""
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half in ("encoder", "decoder"):
        names |= {f"{half}.{layer}": f"{half}.{layer}" for layer in ("conv_in", "norm_out", "conv_out")}
        names |= _block(f"{half}.middle.block_1", f"{half}.mid.block_1", VAE_RESBLOCK_LDM)
        names |= _block(f"{half}.middle.attention", f"{half}.mid.attn_1", VAE_ATTENTION_LDM)
        names |= _block(f"{half}.middle.block_2", f"{half}.mid.block_2", VAE_RESBLOCK_LDM)
    levels = len(config.widths)
    for i in range(levels):
        for j in range(config.blocks_per_level + 1):
            names |= _block(f"encoder.down.{i}.blocks.{j}", f"encoder.down.{i}.block.{j}", VAE_RESBLOCK_LDM)
            names |= _block(f"decoder.up.{i}.blocks.{j}", f"decoder.up.{levels - 1 - i}.block.{j}", VAE_RESBLOCK_LDM)
        names[f"encoder.down.{i}.downsample"] = f"encoder.down.{i}.downsample.conv"
        names[f"decoder.up.{i}.upsample"] = f"decoder.up.{levels - 1 - i}.upsample.conv"
    return names


def _vae_diffusers(config: VAEConfig) -> dict[str, str]:
    names = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for half, way, sampling in (("encoder", "down", "downsample"), ("decoder", "up", "upsample")):
        names |= {f"{half}.conv_in": f"{half}.conv_in", f"{half}.norm_out": f"{half}.conv_norm_out", f"{half}.conv_out": f"{half}.conv_out"}
        names |= _block(f"{half}.middle.block_1", f"{half}.mid_block.resnets.0", RESBLOCK_DIFFUSERS)
        names |= _block(f"{half}.middle.attention", f"{half}.mid_block.attentions.0", VAE_ATTENTION_DIFFUSERS)
        names |= _block(f"{half}.middle.block_2", f"{half}.mid_block.resnets.1", RESBLOCK_DIFFUSERS)
        for i in range(len(config.widths)):
            for j in range(config.blocks_per_level + 1):
                names |= _block(f"{half}.{way}.{i}.blocks.{j}", f"{half}.{way}_blocks.{i}.resnets.{j}", RESBLOCK_DIFFUSERS)
            names[f"{half}.{way}.{i}.{sampling}"] = f"{half}.{way}_blocks.{i}.{sampling}rs.0.conv"
    return names


def _text_clip(config: TextEncoderConfig) -> dict[str, str]:
    names = {
        "token_embedding": "embeddings.token_embedding",
        "position_embedding": "embeddings.position_embedding",
        "norm_out": "final_layer_norm",
    }
    for i in range(config.layers):
        names |= _block(f"blocks.{i}", f"encoder.layers.{i}", TEXT_BLOCK_CLIP)
    return names


def _text_open_clip(config: TextEncoderConfig) -> dict[str, str]:
    names = {
        "token_embedding": "token_embedding",
        "position_embedding.weight": "positional_embedding",  # a bare parameter there
        "norm_out": "ln_final",
    }
    for i in range(config.layers):
        names |= _block(f"blocks.{i}", f"transformer.resblocks.{i}", TEXT_BLOCK_OPEN_CLIP)
    return names


def _rules(part: Part, layout: str) -> tuple[str, dict[str, str]]:
    """What every name of a part begins with in a file, and how its layers are called behind that."""
    config = part.config
    match part, layout:
        case UNet(), "ldm":
            return UNET_PREFIX, _unet_ldm(config)
        case UNet(), "diffusers":
            return "", _unet_diffusers(config)
        case VAE(), "ldm":
            return VAE_PREFIX, _vae_ldm(config)
        case VAE(), "diffusers":
            return "", _vae_diffusers(config)
        case TextEncoder(), "diffusers":
            return "text_model.", _text_clip(config)
        case TextEncoder(), "ldm" if config.activation == "gelu":  # SD 2.x: OpenCLIP's model; the text encoder with the exact GELU
            return OPEN_CLIP_PREFIX, _text_open_clip(config)
        case TextEncoder(), "ldm":
            return CLIP_PREFIX, _text_clip(config)
    raise ValueError(f"layout {layout!r} unknown; choose {' or '.join(LAYOUTS)}")


# ------------------------------------------------------------------------------------------------- applying the rules


def table(part: Part, layout: str) -> dict[str, Place]:
    """{our parameter's name: its place in a file}, for every parameter of the module, in its order.

    The module may be on the meta device. Only OpenCLIP's stacked attention has several parameters in one place.
    Raises ValueError for an unknown layout.
    """
    prefix, names = _rules(part, layout)
    result = {}
    for ours in part.state_dict():
        layer, kind = ours.rsplit(".", 1)
        if ours in names:
            theirs = names[ours]
        else:
            assert layer in names, f"no rule for {ours} in the {layout} layout"
            theirs = f"{names[layer]}.{kind}"
        third = ("to_q", "to_k", "to_v").index(layer.rsplit(".", 1)[1]) if "in_proj_" in theirs else None
        result[ours] = Place(prefix + theirs, third, _is_convolution(part, layout, ours))
    return result


def _is_convolution(part: Part, layout: str, ours: str) -> bool:
    """Whether the file has a 1x1 convolution where we have a matrix."""
    if isinstance(part, UNet):
        return not part.config.linear_projection and re.search(r"transformers?(\.\d+)?\.proj_(in|out)\.weight$", ours) is not None
    return isinstance(part, VAE) and layout == "ldm" and re.search(r"attention\.to_\w+\.weight$", ours) is not None


def file_shapes(part: Part, layout: str) -> dict[str, tuple[int, ...]]:
    """{name in the file: shape} of everything that a file in this layout should hold for the part."""
    parameters = part.state_dict()
    result = {}
    for ours, place in table(part, layout).items():
        first, *rest = parameters[ours].shape
        result[place.name] = (first if place.third is None else 3 * first, *rest, *((1, 1) if place.convolution else ()))
    return result


def from_file(tensor: Tensor, place: Place, ours: Tensor) -> Tensor:
    """The file's tensor in the shape of our parameter, which may be on the meta device: a view, never a copy.

    Where we have a matrix, the file may have a 1x1 convolution or a matrix, whatever the place says: programs have written either.
    """
    if place.third is not None:
        tensor = tensor.chunk(3)[place.third]
    if ours.dim() == 2 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    return tensor


def to_file(part: Part, layout: str) -> dict[str, Tensor]:
    """{name in the file: tensor} of all parameters of a module, in the file's shapes: `from_file` the other way."""
    parameters, result = part.state_dict(), {}
    for ours, place in table(part, layout).items():
        tensor = parameters[ours]
        if place.convolution:
            tensor = tensor[:, :, None, None]
        if place.third:
            tensor = torch.cat([result[place.name], tensor])
        result[place.name] = tensor
    return result


# --------------------------------------------------------------------------------------- other spellings met in files

# (pattern, the spelling of the tables above): rewritten before anything is looked up, in this order.
LDM_SPELLINGS = (
    # Some files of SD 1.x left out the wrapper around transformers' model, ...
    (r"^cond_stage_model\.text_model\.", "cond_stage_model.transformer.text_model."),
    # ... and transformers 5 its own inner module.
    (r"^cond_stage_model\.transformer\.(embeddings|encoder|final_layer_norm)\.", r"cond_stage_model.transformer.text_model.\1."),
)
VAE_SPELLINGS = (
    # diffusers before 0.17 had its own attention in the VAE.
    (r"(mid_block\.attentions\.0)\.query\.", r"\1.to_q."),
    (r"(mid_block\.attentions\.0)\.key\.", r"\1.to_k."),
    (r"(mid_block\.attentions\.0)\.value\.", r"\1.to_v."),
    (r"(mid_block\.attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
)
TEXT_ENCODER_SPELLINGS = ((r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),)  # transformers 5


def respell(name: str, spellings: tuple[tuple[str, str], ...]) -> str:
    """A file's name in the spelling of the tables."""
    for pattern, replacement in spellings:
        name = re.sub(pattern, replacement, name)
    return name


def ema_name(ldm_name: str) -> str:
    """Where the original's training keeps the moving average of a U-Net weight: the path without `model.` and without any dot."""
    return "model_ema." + ldm_name.removeprefix("model.").replace(".", "")
