"""What a file is: by the names and shapes of its tensors, and for one question by asking the model.

names   -> a whole model, or a LoRA, a VAE, an SDXL, ...       foreign
shapes  -> widths and depths -> SD 1.x, SD 2.x, or neither      sizes, family_config
weights -> does it predict the noise or the velocity?           noise_correlation
"""

import re
from dataclasses import replace
from itertools import count

import torch
from torch import Tensor

from minidiff.config import SD1, SD2, ModelConfig
from minidiff.text_encoder import TextEncoder
from minidiff.tokenizer import Tokenizer
from minidiff.unet import UNet
from weights_loader.dialects import CLIP_PREFIX, OPEN_CLIP_PREFIX, UNET_PREFIX, VAE_PREFIX

Shapes = dict[str, tuple[int, ...]]
OPEN_CLIP_LAYERS = 24  # of ViT-H, in the files; Stable Diffusion 2.x runs all but the last

# ------------------------------------------------------------------------------------------------- what it is not

# Small files that change a model: (kind, pattern of a tensor's name, what a file with such a name is). Names like these may stray into a
# model's file too, so they count only where there is no U-Net.
CHANGES = (
    (
        "lora",
        r"lora_(unet|te|down|up|mid|magnitude)|[._]lora(_linear_layer)?\.|\.lora_[AB]\.|\.hada_w|\.lokr_w|^(unet|text_encoder):\d+:",
        "a LoRA: changes to a model, not a model itself; give it as lora=FILE (--lora) beside one",
    ),
    (
        "custom_diffusion",
        r"custom_diffusion|^modifier_token",
        "a Custom Diffusion file: changes to a model, not a model; give it as custom_diffusion=FILE (--custom-diffusion) beside one",
    ),
    (
        "embedding",
        r"^string_to_param|^emb_params$|^clip_[lg]$|^<[^<>]+>$",
        "a Textual Inversion embedding: a learned word, not a model; give it as embeddings=FILE (--embedding) beside one",
    ),
)
WHAT = {kind: what for kind, _, what in CHANGES}
CROSS_ATTENTION = r"attn2\.|^modifier_token\.|^embed$"  # of a Custom Diffusion file in a whole model's names
# Tensors of every U-Net, in either naming.
UNET_ITSELF = r"(^|\.)(input_blocks\.0\.0|time_embed\.0|conv_in|time_embedding\.linear_1)\.weight$"

# The same for other models. The first that is found decides.
FOREIGN = (
    (r"^control_model\.|controlnet_cond_embedding\.", "a ControlNet, which steers a model and is none; it is not supported"),
    (r"^conditioner\.embedders\.|^add_embedding\.linear_", "a Stable Diffusion XL, which is not supported; choose a 1.x or 2.x"),
    (r"joint_blocks\.|double_blocks\.|single_transformer_blocks\.", "a diffusion transformer (Stable Diffusion 3, Flux), not supported"),
)

# The same for the parts of a model. They stand inside a whole model too, so they count only where its U-Net is missing.
PARTS = (
    (r"^unet[./]|^text_encoder[./]", "a whole model in diffusers names in one file; save it as a diffusers folder"),
    (
        r"^(first_stage_model\.)?(en|de)coder\.(down|up|mid)(_blocks?)?\.",
        "a VAE alone; load a whole model and give this as vae=FILE (--vae)",
    ),
    (r"^(down_blocks|mid_block|up_blocks)\.", "the U-Net of a diffusers model alone; give the folder with model_index.json"),
    (r"^(text_model\.)?(encoder\.layers|embeddings)\.|^cond_stage_model\.", "a text encoder alone; give the whole model"),
)
FEW = 3  # tensors; any part of a model has more


def kind(names: list[str]) -> str | None:
    """Which change to a model a file is, by the names of its tensors: "lora", "embedding", "custom_diffusion", or none of them."""
    if any(re.search(UNET_ITSELF, name) for name in names):
        return None
    found = next((kind for kind, pattern, _ in CHANGES if any(re.search(pattern, name) for name in names)), None)
    if found is None and all(re.search(CROSS_ATTENTION, name) for name in names):
        return "custom_diffusion"
    return found


def foreign(names: list[str]) -> str | None:
    """What a file is, if its names show that it is not a Stable Diffusion in LDM names."""
    if change := kind(names):
        return WHAT[change]
    if len(names) <= FEW and not any(re.search(pattern, name) for pattern, _ in FOREIGN for name in names):
        return f"a file of {len(names)} tensors, the first '{names[0]}': perhaps an embedding, not a model"
    rules = FOREIGN if any(name.startswith(UNET_PREFIX) for name in names) else FOREIGN + PARTS
    return next((what for pattern, what in rules if any(re.search(pattern, name) for name in names)), None)


def describe(names: list[str]) -> str:
    """What a file is, for whoever gave it as something else."""
    if any(name.startswith(UNET_PREFIX) for name in names) and foreign(names) is None:
        return "a whole model; give it as the model (--model)"
    return foreign(names) or f"of no known kind; its first tensor is '{names[0]}'"


# ---------------------------------------------------------------------------------------------- what it is: by shapes


def sizes(shapes: Shapes) -> dict[str, object]:
    """What the shapes of a file in LDM names tell of a config; `config_sizes` gives the same of a config.

    Parts that are not there give None, 0 or ().
    """
    open_clip = f"{OPEN_CLIP_PREFIX}token_embedding.weight" in shapes
    text = OPEN_CLIP_PREFIX if open_clip else CLIP_PREFIX
    token_embedding = "token_embedding.weight" if open_clip else "embeddings.token_embedding.weight"
    positions = "positional_embedding" if open_clip else "embeddings.position_embedding.weight"
    layer = "transformer.resblocks.{}.ln_1.weight" if open_clip else "encoder.layers.{}.layer_norm1.weight"
    widths, attention, blocks = _unet_levels(shapes)
    vae = VAE_PREFIX + "encoder.down.{}.block.{}.conv1.weight"
    linear, context_width = None, None
    for name, shape in shapes.items():
        if name.startswith(UNET_PREFIX) and name.endswith("attn2.to_k.weight"):
            context_width = _size(shapes, name, 1)
        if name.startswith(UNET_PREFIX) and name.endswith("1.proj_in.weight"):
            linear = len(shape) == 2
    layers = _length(shapes, text + layer)
    return {
        "text encoder width": _size(shapes, text + token_embedding, 1),
        "text encoder layers": layers - 1 if open_clip and layers == OPEN_CLIP_LAYERS else layers,
        "vocabulary": _size(shapes, text + token_embedding, 0),
        "context length": _size(shapes, text + positions, 0),
        "U-Net input channels": _size(shapes, f"{UNET_PREFIX}input_blocks.0.0.weight", 1),
        "U-Net output channels": _size(shapes, f"{UNET_PREFIX}out.2.weight", 0),
        "U-Net widths": widths,
        "U-Net attention": attention,
        "U-Net blocks per level": blocks,
        "context width": context_width,
        "linear projection": linear,
        "VAE widths": tuple(_size(shapes, vae.format(i, 0), 0) for i in range(_length(shapes, vae.format("{}", 0)))),
        "VAE blocks per level": _length(shapes, vae.format(0, "{}")),
        "latent channels": _size(shapes, f"{VAE_PREFIX}post_quant_conv.weight", 0),
    }


def config_sizes(config: ModelConfig) -> dict[str, object]:
    """The numbers of a config that shapes can tell."""
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


def _unet_levels(shapes: Shapes) -> tuple[tuple[int | None, ...], tuple[bool, ...], int]:
    """Width and attention of each level, and the blocks of the first: a walk down to where the names end."""
    widths, attention, blocks, new_level = [], [], [], True
    for step in count(1):
        block = f"{UNET_PREFIX}input_blocks.{step}"
        if f"{block}.0.op.weight" in shapes:
            new_level = True
        elif (convolution := f"{block}.0.in_layers.2.weight") in shapes:
            if new_level:
                widths.append(_size(shapes, convolution, 0))
                attention.append(f"{block}.1.norm.weight" in shapes)
                blocks.append(0)
                new_level = False
            blocks[-1] += 1
        else:
            return tuple(widths), tuple(attention), blocks[0] if blocks else 0


def _size(shapes: Shapes, name: str, axis: int) -> int | None:
    shape = shapes.get(name, ())
    return shape[axis] if axis < len(shape) else None


def _length(shapes: Shapes, name: str) -> int:
    """How many of the names with 0, 1, 2, ... in place of {} are there."""
    return next(i for i in count() if name.format(i) not in shapes)


# ------------------------------------------------------------------------------------------------ what it is: family

FAMILIES = {"Stable Diffusion 1.x": SD1, "Stable Diffusion 2.x": SD2}
# The same model with other numbers here is still of the family: a personalised one has more words, an inpainting one more inputs.
VARIES = ("vocabulary", "U-Net input channels", "linear projection")
NEAR = 2  # numbers that a single missing tensor can change
INPUTS = {4: "", 9: " inpainting"}
OTHER_INPUTS = {5: "depth-to-image", 7: "the upscaler", 8: "InstructPix2Pix"}


def family(numbers: dict[str, object]) -> str | None:
    """The family that `sizes` or `config_sizes` belong to."""
    return next((name for name, config in FAMILIES.items() if not differences(numbers, config)), None)


def differences(numbers: dict[str, object], config: ModelConfig) -> dict[str, str]:
    """Where the numbers are not those of a config, and both values; what varies within a family is no difference."""
    known = config_sizes(config)
    return {key: f"{numbers[key]}, not {known[key]}" for key in known if key not in VARIES and numbers[key] != known[key]}


def family_config(shapes: Shapes) -> ModelConfig:
    """The config of a public model, by the shapes of its tensors in LDM names.

    The prediction is its family's default. A model with almost all numbers of a family is taken as one with missing weights, so that the
    account of its tensors can name them. Raises ValueError, with the numbers found, for any other.
    """
    found = sizes(shapes)

    def apart(base: ModelConfig) -> int:
        # A VAE taken from a file in diffusers names shows no sizes under LDM names.
        return sum(bool(found["VAE widths"]) or not key.startswith(("VAE", "latent")) for key in differences(found, base))

    name, base = min(FAMILIES.items(), key=lambda item: apart(item[1]))
    if apart(base) > NEAR:
        numbers = ", ".join(f"{key} {value}" for key, value in found.items() if value)
        raise ValueError(
            "a model of no known family: heads, normalisation groups and schedule cannot be read off the tensors, and the file's metadata "
            f"does not name them; pass config=ModelConfig(...). Found {numbers}"
        )
    inputs = found["U-Net input channels"] or base.unet.in_channels
    if inputs not in INPUTS:
        kind = OTHER_INPUTS.get(inputs, "another task")
        raise ValueError(f"a {name} whose U-Net takes {inputs} channels, made for {kind}; supported are 4 and, for inpainting, 9")
    return replace(
        base,
        text_encoder=replace(base.text_encoder, vocab_size=found["vocabulary"] or base.text_encoder.vocab_size),
        unet=replace(base.unet, in_channels=inputs, linear_projection=bool(found["linear projection"])),
    )


def family_name(config: ModelConfig) -> str:
    """In words, as for `minidiff inspect`."""
    name = family(config_sizes(config))
    return name + INPUTS.get(config.unet.in_channels, "") if name else "a Stable Diffusion of its own size"


# ------------------------------------------------------------------------------------------------------- eps or v

EPS_CORRELATION = 0.5  # an eps-model is near 1 here, a v-model near 0


@torch.no_grad()
def noise_correlation(unet: UNet, text_encoder: TextEncoder, tokenizer: Tokenizer, timesteps: int) -> float:
    """How much the U-Net's answer looks like its input, at the highest noise level and with an empty prompt; -1..1.

    There x_t is almost only noise. An eps-model has to name the noise, so it gives its input back; a v-model has to give
    v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0, almost -x_0, of which the input says next to nothing. One call on 16 x 16 latents.
    """
    weight = unet.conv_in.weight
    c_in, c_out = unet.config.in_channels, unet.config.out_channels
    x = torch.randn((1, c_in, 16, 16), generator=torch.Generator().manual_seed(0))
    if c_in > c_out:  # inpainting: everything is masked, and nothing of a picture is shown
        x[:, c_out], x[:, c_out + 1 :] = 1.0, 0.0
    x = x.to(weight)
    t = torch.tensor([timesteps - 1], device=weight.device)
    answer = unet(x, t, text_encoder(tokenizer([""]).to(weight.device)))
    return _correlation(x[:, :c_out].float(), answer.float())


def _correlation(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    return float((a * b).sum() / (a.norm() * b.norm()).clamp(min=1e-12))
