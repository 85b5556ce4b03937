"""The names that files give to the layers, and the names they have here: one function for each part and dialect.

    ours       down.0.transformers.1.blocks.0.cross_attention.to_k.weight
    ldm        model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight
    diffusers  down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight                    (in unet/)

A name is the place of a block in the model followed by a layer inside the block. This page has a short table for each kind of block,
and for the places a few loops, because the dialects count blocks differently. Each function takes a part's config and gives
{our layer: its layer in the file}. Prefixes belong to a family (families/), and name_table.py applies the rules to a real module.

    ldm        the original code's single file (CompVis/stable-diffusion; Stability-AI/stablediffusion for 2.x)
    diffusers  one folder per part, and for the text encoder the names of the transformers library
"""

from minidiff.config import TextEncoderConfig, UNetConfig, VAEConfig

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
# diffusers kept the original's names for the transformer and its blocks.
TRANSFORMER = {"norm": "norm", "proj_in": "proj_in", "proj_out": "proj_out"}
TRANSFORMER_BLOCK = {
    "norm_1": "norm1",
    "self_attention.to_q": "attn1.to_q",
    "self_attention.to_k": "attn1.to_k",
    "self_attention.to_v": "attn1.to_v",
    "self_attention.to_out": "attn1.to_out.0",  # 1 is dropout
    "norm_2": "norm2",
    "cross_attention.to_q": "attn2.to_q",
    "cross_attention.to_k": "attn2.to_k",
    "cross_attention.to_v": "attn2.to_v",
    "cross_attention.to_out": "attn2.to_out.0",
    "norm_3": "norm3",
    "feed_forward.proj_in": "ff.net.0.proj",
    "feed_forward.proj_out": "ff.net.2",  # 1 is dropout
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
    """Put the names of a block before those of its layers."""
    return {f"{ours}.{layer}": f"{theirs}.{their_layer}" for layer, their_layer in inside.items()}


def _transformer(ours: str, theirs: str, depth: int) -> dict[str, str]:
    """Name the layers of a transformer with that many blocks."""
    names = _block(ours, theirs, TRANSFORMER)
    for n in range(depth):
        names |= _block(f"{ours}.blocks.{n}", f"{theirs}.transformer_blocks.{n}", TRANSFORMER_BLOCK)
    return names


# ------------------------------------------------------------------------------- places of the blocks: ours -> theirs


def unet_ldm(config: UNetConfig) -> dict[str, str]:
    """Name the U-Net's layers as the original does, which counts every step down, and every step up, in one row, whatever its level."""
    names = {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",  # 1 is SiLU
        "added_embedding.linear_1": "label_emb.0.0",  # of SDXL
        "added_embedding.linear_2": "label_emb.0.2",
        "conv_in": "input_blocks.0.0",
        "norm_out": "out.0",
        "conv_out": "out.2",  # 1 is SiLU
    }
    levels, steps = len(config.widths), config.blocks_per_level + 1  # a level's blocks and its downsampling; on the way up one block more
    for i in range(levels):
        for j in range(config.blocks_per_level):
            step = f"input_blocks.{1 + i * steps + j}"  # 0 is conv_in
            names |= _block(f"down.{i}.blocks.{j}", f"{step}.0", RESBLOCK_LDM)
            names |= _transformer(f"down.{i}.transformers.{j}", f"{step}.1", config.attention[i])
        names[f"down.{i}.downsample"] = f"input_blocks.{(i + 1) * steps}.0.op"
    names |= _block("middle.block_1", "middle_block.0", RESBLOCK_LDM)
    names |= _transformer("middle.transformer", "middle_block.1", max(config.attention[-1], 1))
    names |= _block("middle.block_2", "middle_block.2", RESBLOCK_LDM)
    for i in range(levels):
        for j in range(steps):
            step = f"output_blocks.{i * steps + j}"
            names |= _block(f"up.{i}.blocks.{j}", f"{step}.0", RESBLOCK_LDM)
            names |= _transformer(f"up.{i}.transformers.{j}", f"{step}.1", config.attention[levels - 1 - i])
        # Upsampling belongs to the last step of its level, behind the ResBlock and, if there is one, the transformer.
        behind = 2 if config.attention[levels - 1 - i] else 1
        names[f"up.{i}.upsample"] = f"output_blocks.{i * steps + steps - 1}.{behind}.conv"
    return names


def unet_diffusers(config: UNetConfig) -> dict[str, str]:
    """Name the U-Net's layers as diffusers does, which counts as we do: up_blocks.0 is the deepest."""
    names = {
        "time_embedding.linear_1": "time_embedding.linear_1",
        "time_embedding.linear_2": "time_embedding.linear_2",
        "added_embedding.linear_1": "add_embedding.linear_1",  # of SDXL
        "added_embedding.linear_2": "add_embedding.linear_2",
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    }
    for i in range(len(config.widths)):
        for way, sampling, depths in (("down", "downsample", config.attention), ("up", "upsample", config.attention[::-1])):
            for j in range(config.blocks_per_level + 1):
                names |= _block(f"{way}.{i}.blocks.{j}", f"{way}_blocks.{i}.resnets.{j}", RESBLOCK_DIFFUSERS)
                names |= _transformer(f"{way}.{i}.transformers.{j}", f"{way}_blocks.{i}.attentions.{j}", depths[i])
            names[f"{way}.{i}.{sampling}"] = f"{way}_blocks.{i}.{sampling}rs.0.conv"
    names |= _block("middle.block_1", "mid_block.resnets.0", RESBLOCK_DIFFUSERS)
    names |= _transformer("middle.transformer", "mid_block.attentions.0", max(config.attention[-1], 1))
    names |= _block("middle.block_2", "mid_block.resnets.1", RESBLOCK_DIFFUSERS)
    return names


def vae_ldm(config: VAEConfig) -> dict[str, str]:
    """Name the VAE's layers as the original does.

    It counts the decoder's levels from the highest resolution, though it runs the lowest first.
    """
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


def vae_diffusers(config: VAEConfig) -> dict[str, str]:
    """Name the VAE's layers as diffusers does."""
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


def text_clip(config: TextEncoderConfig) -> dict[str, str]:
    """Name the text encoder's layers as transformers does, whose class the original of Stable Diffusion 1 uses."""
    names = {
        "token_embedding": "embeddings.token_embedding",
        "position_embedding": "embeddings.position_embedding",
        "norm_out": "final_layer_norm",
    }
    for i in range(config.layers):
        names |= _block(f"blocks.{i}", f"encoder.layers.{i}", TEXT_BLOCK_CLIP)
    return names


def text_clip_projection(config: TextEncoderConfig) -> dict[str, str]:
    """Name the layers of a text encoder with a projection as transformers does, which has it beside the text model."""
    return {ours: f"text_model.{theirs}" for ours, theirs in text_clip(config).items()} | {"projection": "text_projection"}


def text_open_clip(config: TextEncoderConfig) -> dict[str, str]:
    """Name the text encoder's layers as OpenCLIP does, whose class the original of Stable Diffusion 2 uses."""
    names = {
        "token_embedding": "token_embedding",
        "position_embedding.weight": "positional_embedding",  # a bare parameter there
        "norm_out": "ln_final",
        "projection.weight": "text_projection",  # a bare parameter too, and applied from the right: x @ text_projection
    }
    for i in range(config.layers):
        names |= _block(f"blocks.{i}", f"transformer.resblocks.{i}", TEXT_BLOCK_OPEN_CLIP)
    return names


# ------------------------------------------------------------------------------------------ matrices or convolutions


def unet_convolutions(config: UNetConfig) -> str | None:
    """Return a pattern of the U-Net's matrices that files hold as 1x1 convolutions: the same in both dialects."""
    return None if config.linear_projection else r"transformers?(\.\d+)?\.proj_(in|out)\.weight$"


def vae_convolutions_ldm(config: VAEConfig) -> str:
    """Return a pattern of the VAE's matrices that files in the original's names hold as 1x1 convolutions."""
    return r"attention\.to_\w+\.weight$"


# ------------------------------------------------------------------------------------------------------------ aliases

# Other names in use: (pattern, the name that the rules above give). They are applied in this order, before anything is looked up.
Aliases = tuple[tuple[str, str], ...]

CLIP_LDM_ALIASES: Aliases = (
    # Some files of SD 1.x left out the wrapper around transformers' model, ...
    (r"^cond_stage_model\.text_model\.", "cond_stage_model.transformer.text_model."),
    # ... and transformers 5 its own inner module.
    (r"^cond_stage_model\.transformer\.(embeddings|encoder|final_layer_norm)\.", r"cond_stage_model.transformer.text_model.\1."),
)
VAE_DIFFUSERS_ALIASES: Aliases = (
    # diffusers before 0.17 had its own attention in the VAE.
    (r"(mid_block\.attentions\.0)\.query\.", r"\1.to_q."),
    (r"(mid_block\.attentions\.0)\.key\.", r"\1.to_k."),
    (r"(mid_block\.attentions\.0)\.value\.", r"\1.to_v."),
    (r"(mid_block\.attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
)
TEXT_DIFFUSERS_ALIASES: Aliases = ((r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),)  # transformers 5
