"""ControlNet files, in and out: for Stable Diffusion 1, 2 and XL, and for any other model whose U-Net has the same shapes.

    original      control_model.zero_convs.0.0.weight, with the prefix or without; alone, or beside a whole model, which is left out
    diffusers     controlnet_down_blocks.0.weight; a folder with a config.json, or one file
    difference    a key `difference`: the tensors of the U-Net are (control - base), and one that is missing is the base's
    control-LoRA  a key `lora_controlnet`: W + up @ down, where the file has such a pair; what is missing is the base's

For the last two the base is the model in use. Other programs' relatives of ControlNet are refused by name.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minidiff.config import check_choice
from minidiff.controlnet import ControlNet, ControlNetConfig, controlnet_config, encoder_weights
from minidiff.pipeline import StableDiffusion
from weights_loader.brief import brief
from weights_loader.contents import unwrap
from weights_loader.detect import describe
from weights_loader.dialects import unet_convolutions, unet_diffusers, unet_ldm
from weights_loader.empty_parts import NoInit
from weights_loader.families import family_of_config, made_for_another
from weights_loader.folder.settings import read_json
from weights_loader.folder.writing import added_json, write_json
from weights_loader.metadata import FORMAT, settings_to_metadata
from weights_loader.name_table import PartNames, TensorLocation, from_file, to_file
from weights_loader.read import Checkpoint, read
from weights_loader.report import Report
from weights_loader.write import new_folder, write_safetensors

KEY = "minidiff.controlnet"  # in the metadata: what tensors cannot tell
PREFIX = "control_model."
# What every ControlNet has, in either naming.
MARKS = r"(^|\.)(input_hint_block\.0\.|controlnet_cond_embedding\.conv_in\.)"
# Tensors that say of a file that it is added to the base.
ADDED = {"difference": "a difference from its base", "lora_controlnet": "a control-LoRA"}
FOLDER = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors", "diffusion_pytorch_model.bin")
# (pattern of a tensor's name, what a file with such a name is). The first that is found decides.
REFUSED = (
    (r"control_add_embedding\.|(^|\.)task_embedding$", "a ControlNet union (ProMax), which takes several kinds of hints by number"),
    (r"^lllite_", "a ControlNet-LLLite, which changes the input of attention layers"),
    (r"(^|\.)body\.0\.(block1|resnets|in_conv)\b", "a T2I-Adapter, which adds features to the way down"),
    (r"^ctrl_|control_to_base|base_to_(ctrl|control)|enc_zero_convs", "a ControlNet-XS, whose layers and the U-Net's are interleaved"),
    (r"^ip_adapter\.|^image_proj\b", "an IP-Adapter, which adds attention to a picture"),
)


# --- names ------------------------------------------------------------------------------------------------------------


def controlnet_ldm(config: ControlNetConfig) -> dict[str, str]:
    """Name the layers as the original does; SiLU counts in the hint block."""
    convs, skips = 2 * len(config.hint_widths) - 1, len(config.unet.skip_widths)
    names = unet_ldm(config.unet)
    names |= {f"hint_block.convs.{k}": f"input_hint_block.{2 * k}" for k in range(convs)}
    names["hint_block.conv_out"] = f"input_hint_block.{2 * convs}"
    names |= {f"zero_convs.{k}": f"zero_convs.{k}.0" for k in range(skips)}
    names[f"zero_convs.{skips}"] = "middle_block_out.0"
    return names


def controlnet_diffusers(config: ControlNetConfig) -> dict[str, str]:
    """Name the layers as diffusers does."""
    convs, skips = 2 * len(config.hint_widths) - 1, len(config.unet.skip_widths)
    names = unet_diffusers(config.unet)
    names |= {f"hint_block.convs.{k}": f"controlnet_cond_embedding.blocks.{k - 1}" for k in range(1, convs)}
    names["hint_block.convs.0"] = "controlnet_cond_embedding.conv_in"
    names["hint_block.conv_out"] = "controlnet_cond_embedding.conv_out"
    names |= {f"zero_convs.{k}": f"controlnet_down_blocks.{k}" for k in range(skips)}
    names[f"zero_convs.{skips}"] = "controlnet_mid_block"
    return names


def _convolutions(config: ControlNetConfig) -> str | None:
    return unet_convolutions(config.unet)


NAMES = {
    "original": PartNames(controlnet_ldm, convolutions=_convolutions),
    "diffusers": PartNames(controlnet_diffusers, convolutions=_convolutions),
}


# --- reading ----------------------------------------------------------------------------------------------------------


def is_controlnet(names: Sequence[str]) -> bool:
    """Return whether a file with tensors of these names holds a ControlNet, or one of the relatives that are refused by name."""
    return any(re.search(pattern, name) for pattern in (MARKS, *(pattern for pattern, _ in REFUSED)) for name in names)


def read_controlnet(path: str | Path, sd: StableDiffusion, dtype: torch.dtype | None = None) -> ControlNet:
    """Read a ControlNet for a model, without gradients, on its device.

    Args:
        path: a file in one of the forms above, or a folder of diffusers.
        sd: the model that it is to steer; the base of a difference file or a control-LoRA.
        dtype: of the weights; None is that of the model's U-Net.

    Raises FileNotFoundError for what is not there, ValueError for another kind of file, for a ControlNet of another family, and for tensors
    that are missing, unknown or of the wrong shape.
    """
    path = Path(path)
    checkpoint = unwrap(read(path))
    try:
        tensors, layout = parse(checkpoint)
        config = _config(checkpoint, tensors, layout, sd)
        _check_family(tensors, sd)
        with torch.device("meta"), NoInit():
            net = ControlNet(config)
        names = NAMES[layout]
        if any(name in tensors for name in ADDED):
            tensors = _added_to_base(tensors, net, names, sd)
        locations = _account(tensors, net, names, sd)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    empty = net.state_dict()
    state = {ours: from_file(tensors[there.name], there, empty[ours]) for ours, there in locations.items()}
    net.load_state_dict({ours: tensor.to(sd.device, dtype or sd.dtype) for ours, tensor in state.items()}, assign=True)
    return net.eval().requires_grad_(False)


def parse(checkpoint: Checkpoint) -> tuple[dict[str, Tensor], str]:
    """Return the ControlNet's tensors without the prefix, and "original" or "diffusers". Raises ValueError for a file of another kind."""
    names = list(checkpoint.tensors)
    for pattern, what in REFUSED:
        if any(re.search(pattern, name) for name in names):
            raise ValueError(f"{what}; not supported, give a ControlNet for Stable Diffusion 1.x, 2.x or XL")
    if not is_controlnet(names):
        raise ValueError(f"given as a ControlNet, but it is {describe(names)}")
    own = {name.removeprefix(PREFIX): tensor for name, tensor in checkpoint.tensors.items() if name.startswith(PREFIX)}
    tensors = own | {name: checkpoint.tensors[name] for name in ADDED if name in checkpoint.tensors} if own else dict(checkpoint.tensors)
    return tensors, "diffusers" if any(name.startswith("controlnet_") for name in tensors) else "original"


def _config(checkpoint: Checkpoint, tensors: Mapping[str, Tensor], layout: str, sd: StableDiffusion) -> ControlNetConfig:
    """Return the config: the hint block's widths by its tensors, the U-Net's from the model, the rest from metadata or config.json."""
    stated: dict[str, Any] = {}
    beside = checkpoint.path.with_name("config.json")
    if KEY in checkpoint.metadata:
        stated = json.loads(checkpoint.metadata[KEY])
        if not isinstance(stated, dict):
            raise ValueError(f"metadata {KEY}: {brief(stated)}; expected an object with channel_order and pooled")
    elif layout == "diffusers" and beside.is_file():
        stated = _stated_by_diffusers(read_json(beside), sd)
    elif "shuffle" in checkpoint.path.stem.lower():
        stated["pooled"] = True
        warnings.warn(f"{checkpoint.path}: a shuffle ControlNet by its name: its residuals are averaged over space", stacklevel=3)
    own = controlnet_config(sd.config)
    pattern = r"input_hint_block\.\d+\.weight" if layout == "original" else r"controlnet_cond_embedding\.(conv_in|blocks\.\d+)\.weight"
    hint = [tensor.shape[0] for name, tensor in sorted(tensors.items(), key=_by_number) if re.fullmatch(pattern, name)]
    hint = hint[:-1] if layout == "original" else hint  # whose last layer is the zero convolution
    widths = tuple(hint[::2])
    if 2 ** (len(widths) - 1) != sd.config.vae.factor:
        raise ValueError(
            f"a ControlNet for latents of {2 ** (len(widths) - 1)} pixels a cell; this model's have {sd.config.vae.factor}; "
            "give one made for it"
        )
    order, pooled = stated.get("channel_order", "rgb"), stated.get("pooled", False)
    check_choice("channel_order", order, ("rgb", "bgr"))
    if not isinstance(pooled, bool):
        raise ValueError(f"pooled {pooled!r}: expected true or false")
    return replace(own, hint_widths=widths, channel_order=order, pooled=pooled)


def _by_number(item: tuple[str, Tensor]) -> int:
    """Sort conv_in, which has no number, to the front."""
    return next((int(part) for part in item[0].split(".") if part.isdecimal()), -1)


def _stated_by_diffusers(values: Mapping[str, Any], sd: StableDiffusion) -> dict[str, Any]:
    """Read diffusers' config.json. Raises ValueError for another class, and for settings that this model's U-Net does not have."""
    kind = values.get("_class_name", "ControlNetModel")
    if kind != "ControlNetModel":
        raise ValueError(f"a {kind}, not supported; give a ControlNetModel")
    known = {**family_of_config(sd.config).settings["unet"], "_class_name": "ControlNetModel", "conditioning_channels": 3}
    for name, only in known.items():
        if values.get(name, only) != only:
            raise ValueError(f"config.json: {name} is {brief(values[name])}, which is not supported; Stable Diffusion's have {only!r}")
    heads = values.get("num_attention_heads") or values.get("attention_head_dim")  # their number, in spite of the name
    heads = (heads,) * len(sd.config.unet.heads) if isinstance(heads, int) else tuple(heads) if isinstance(heads, list) else heads
    if heads and heads != sd.config.unet.heads and values.get("cross_attention_dim") == sd.config.unet.context_width:
        raise ValueError(f"config.json: attention heads {heads}; this model's U-Net has {sd.config.unet.heads}")
    return {
        "channel_order": values.get("controlnet_conditioning_channel_order", "rgb"),
        "pooled": values.get("global_pool_conditions", False),
    }


def _check_family(tensors: Mapping[str, Tensor], sd: StableDiffusion) -> None:
    """Raise ValueError, naming both families, for a ControlNet of another family than the model's."""
    found = next((tensor.shape[1] for name, tensor in tensors.items() if re.search(r"attn2\.to_k\.(weight|down)$", name)), None)
    if another := made_for_another(sd.config, found, tensors):
        raise ValueError(f"a ControlNet {another}; give a ControlNet of the model's family, or another --model")
    depth = sd.config.unet.blocks_per_level * sum(sd.config.unet.attention) + max(1, sd.config.unet.attention[-1])
    found = {match[0] for name in tensors if (match := re.match(r".*\.transformer_blocks\.\d+\.", name))}
    if not any(name in tensors for name in ADDED) and len(found) < depth:
        raise ValueError(
            f"a ControlNet of {len(found)} transformer blocks where the model has {depth}, as diffusers' small and mid ones; not supported"
        )


def _added_to_base(tensors: Mapping[str, Tensor], net: ControlNet, names: PartNames, sd: StableDiffusion) -> dict[str, Tensor]:
    """Return the whole tensors of a difference file or a control-LoRA: those of the U-Net in use, and what the file adds to them.

    Args:
        tensors: of the file.
        net: an empty ControlNet on the meta device; only it knows names and shapes.
        names: of the file's layers.
        sd: the base.
    """
    net.load_state_dict(encoder_weights(sd.unet, net.config), assign=True, strict=False)
    result = {name: tensor.cpu() for name, tensor in to_file(net, names).items() if not tensor.is_meta}
    pairs = {name.rpartition(".")[0] for name in tensors if name.endswith((".up", ".down"))}
    for layer in sorted(pairs):
        up, down, weight = tensors.get(f"{layer}.up"), tensors.get(f"{layer}.down"), result.get(f"{layer}.weight")
        if up is None or down is None or weight is None or up.flatten(1).shape[1] != down.shape[0]:
            raise ValueError(
                f"{layer}: up {_shape(up)}, down {_shape(down)} and the model's weight {_shape(weight)} do not belong together"
            )
        change = up.float().flatten(1) @ down.float().flatten(1)
        if change.numel() != weight.numel():
            raise ValueError(f"{layer}: up @ down is {_shape(change)}; the model's weight is {_shape(weight)}")
        result[f"{layer}.weight"] = weight.float() + change.reshape(weight.shape)
    for name, tensor in tensors.items():
        if "difference" in tensors and name in result and result[name].numel() == tensor.numel():
            result[name] = result[name].float() + tensor.float().reshape(result[name].shape)
        elif name not in ADDED and not name.endswith((".up", ".down")):
            result[name] = tensor
    return result


def _shape(tensor: Tensor | None) -> tuple[int, ...] | str:
    return "missing" if tensor is None else tuple(tensor.shape)


def _account(tensors: Mapping[str, Tensor], net: ControlNet, names: PartNames, sd: StableDiffusion) -> dict[str, TensorLocation]:
    """Return where the file keeps each parameter. Raises ValueError unless it holds exactly the ControlNet's tensors."""
    family = family_of_config(sd.config)
    report = Report(family, sd.config)
    locations = report.add_part(net, names, tensors)
    if problem := report.problem():
        raise ValueError(f"not a ControlNet for {family.name_of(sd.config)}: {problem}")
    return locations


# --- writing ----------------------------------------------------------------------------------------------------------


def write_controlnet(
    path: str | Path, net: ControlNet, sd: StableDiffusion, names: str = "original", settings: dict[str, object] | None = None
) -> None:
    """Write a ControlNet in the dtype it has: all of it, or nothing.

    Args:
        path: of a .safetensors file for "original", of a new folder for "diffusers".
        net: the ControlNet.
        sd: the model that it steers.
        names: "original" or "diffusers".
        settings: what it was made with, as JSON in the metadata.

    Raises ValueError for unknown names and for a path that does not fit them.
    """
    path = Path(path)
    check_choice("names", names, NAMES)
    if (path.suffix == ".safetensors") != (names == "original"):
        expected = "a file that ends in .safetensors" if names == "original" else "a folder, without a suffix"
        raise ValueError(f"{path}: a ControlNet in the names of {names} is {expected}")
    stated = {"channel_order": net.config.channel_order, "pooled": net.config.pooled}
    metadata = FORMAT | {KEY: json.dumps(stated)} | settings_to_metadata(settings or {})
    tensors = to_file(net, NAMES[names])
    if names == "original":
        write_safetensors(path, {PREFIX + name: tensor for name, tensor in tensors.items()}, metadata)
        return
    with new_folder(path) as folder:
        write_json(folder / "config.json", _diffusers_json(net.config))
        write_safetensors(folder / "diffusion_pytorch_model.safetensors", tensors, metadata)


def _diffusers_json(config: ControlNetConfig) -> dict[str, Any]:
    unet = config.unet
    return {
        "_class_name": "ControlNetModel",
        "in_channels": unet.in_channels,
        "conditioning_channels": 3,
        "block_out_channels": unet.widths,
        "layers_per_block": unet.blocks_per_level,
        "down_block_types": ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in unet.attention],
        "cross_attention_dim": unet.context_width,
        "attention_head_dim": unet.heads,  # their number, see folder/reading.py
        "use_linear_projection": unet.linear_projection,
        "norm_num_groups": unet.groups,
        "conditioning_embedding_out_channels": config.hint_widths,
        **added_json(unet),
        "controlnet_conditioning_channel_order": config.channel_order,
        "global_pool_conditions": config.pooled,
    }
