"""LoRA as diffusers and peft store it, today and before.

    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k    .lora_A.weight, .lora_B.weight

A layer has its name in a diffusers model. Alphas are in peft's config: as JSON in the metadata of diffusers' files ("unet.r": 4, ...), in
adapter_config.json beside peft's own; where nothing is said, alpha is the rank.
"""

import json
import math
import reprlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import regex
from torch import Tensor

from minidiff.adapters.layers import PARTS
from minidiff.files import parse_json
from minidiff.pipeline import StableDiffusion
from weights_loader.adapters.kohya import commonest
from weights_loader.adapters.lora_file import Dialect, Factors, Placed, finite, named_halves, parse_factors, tensors_of
from weights_loader.brief import brief
from weights_loader.detect import kind
from weights_loader.read import Checkpoint

METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's config
CONFIG = "adapter_config.json"  # where peft does
MATCHING_SECONDS = 0.5  # for a pattern and a name; a hostile pattern would take for ever
DEFAULT_ALPHA = 8  # peft's lora_alpha where its config does not say one
# How a LoRA began, where that is no matter of the LoRA alone: with these, training did not start from the base's own weights. (EVA, which
# starts from the activations of its training data, leaves the base as it is.)
REFUSED_STARTS = {
    "pissa": "PiSSA, which takes the LoRA's first value out of the base",
    "olora": "OLoRA, which takes the LoRA's first value out of the base",
    "corda": "CorDA, which takes the LoRA's first value out of the base",
    "lora_ga": "LoRA-GA, which takes the LoRA's first value out of the base",
    "loftq": "LoftQ, which belongs to a quantised base",
}
# Settings of peft that change what a LoRA computes, and their default, the only value that is read. The tensors show the others.
SETTINGS: Mapping[str, object] = {
    "peft_type": "LORA",
    "fan_in_fan_out": False,
    "bias": "none",
    "use_dora": False,
    "use_qalora": False,
    "lora_bias": False,
    **dict.fromkeys(("layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "modules_to_save")),
    **dict.fromkeys(("use_bdlora", "arrow_config", "kasa_config", "monteclora_config", "velora_config")),
}
ALIASES = (
    (r"^base_model\.model\.", ""),  # peft's wrapper
    (r"\.processor\.to_out$", ".to_out.0"),  # diffusers before 0.20 kept a LoRA in the attention's processor, ...
    (r"\.processor\.to_([qkv])$", r".to_\1"),
    (r"self_attn\.to_out$", "self_attn.out_proj"),  # ... and called the text encoder's layers like the U-Net's
    (r"self_attn\.to_([qkv])$", r"self_attn.\1_proj"),
    (r"^(text_encoder(?:_2)?\.)?encoder\.layers\.", r"\1text_model.encoder.layers."),  # transformers 5
)


def matches(names: Sequence[str]) -> bool:
    """Return whether this is a LoRA: every one that is not in another dialect is taken for this one, and said what is wrong with it."""
    return kind(list(names)) == "lora"


def parse(checkpoint: Checkpoint) -> dict[str, Factors]:
    """Return the changes by the layer's name in the file, older names mended. Raises as `parse_factors` and `read_config` do."""
    return parse_factors(tensors_of(checkpoint), ALIASES, partial(_alpha, read_config(checkpoint)))


def read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return peft's config, of the metadata or of the file beside the checkpoint, or {}.

    Raises ValueError for damaged JSON, and for a setting that changes the result and is not supported.
    """
    beside = checkpoint.path.with_name(CONFIG)
    if METADATA in checkpoint.metadata:
        where, text = f"metadata {METADATA}", checkpoint.metadata[METADATA]
    elif checkpoint.path.name.startswith("adapter_model.") and beside.is_file():
        where, text = CONFIG, beside.read_text(encoding="utf-8")
    else:
        return {}
    config = parse_json(text, where)
    if not isinstance(config, dict):
        raise ValueError(f"{where}: {reprlib.repr(config)}; expected an object")
    for part in ("", *(f"{part}." for part in PARTS)):
        _check({key.removeprefix(part): value for key, value in config.items() if key.startswith(part)}, f"{where}: {part}")
    return config


def _check(config: Mapping[str, Any], where: str) -> None:
    start = str(config.get("init_lora_weights", True)).lower()
    if name := next((name for name in REFUSED_STARTS if start.startswith(name)), None):
        raise ValueError(
            f"{where}init_lora_weights is {brief(start)}: {REFUSED_STARTS[name]}; not supported. peft's save_pretrained makes a LoRA of "
            "the plain base with path_initial_model_for_weight_conversion="
        )
    for name, default in SETTINGS.items():
        if (value := config.get(name, default)) not in (default, None, []):
            raise ValueError(f"{where}{name} is {reprlib.repr(value)}, which is not supported; expected {default!r}")


def _alpha(config: Mapping[str, Any], layer: str, rank: int) -> float:
    part = next((part for part in PARTS if layer.startswith(f"{part}.")), None)
    if part:
        config = {key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.")}
    if not config:
        return float(rank)
    alpha, patterns = config.get("lora_alpha", DEFAULT_ALPHA), config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise ValueError(f"peft's config has alpha_pattern {reprlib.repr(patterns)}; expected layers and their alphas")
    name = layer.removeprefix(f"{part}.")
    own = next((value for pattern, value in patterns.items() if _matches(pattern, name)), alpha)
    alpha = finite(layer, own)
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha  # there the scale is alpha / sqrt(rank)


def _matches(pattern: str, layer: str) -> bool:
    """Return whether a key of alpha_pattern means this layer: to peft it is a regular expression for the end of the name, after a dot."""
    try:
        return regex.match(rf"(.*\.)?({pattern})$", layer, timeout=MATCHING_SECONDS) is not None
    except (regex.error, TimeoutError) as error:
        why = f"it takes longer than {MATCHING_SECONDS:g} s" if isinstance(error, TimeoutError) else error
        raise ValueError(f"peft's config has the alpha_pattern {brief(pattern)}, which cannot be matched ({why})") from None


def layer_name(part: str, theirs: str) -> str:
    """Return a layer's name in the file."""
    return f"{part}.{theirs}"


def pack(changes: Placed, sd: StableDiffusion) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors, and peft's config as metadata."""
    return named_halves(changes, "lora_A", "lora_B"), {METADATA: json.dumps(_config(changes), sort_keys=True)}


def _config(changes: Placed) -> dict[str, object]:
    """Return peft's config of each part: the commonest rank and alpha, and the layers that differ.

    A layer is named from inside the part, and the text encoder's without `text_model.`, which transformers 5 does not have: peft compares
    the end of the name.
    """
    result = {}
    for part in PARTS:
        layers = {
            location.name.removeprefix(f"{part}.").removeprefix("text_model."): one
            for location, one in changes.items()
            if location.name.startswith(f"{part}.")
        }
        if not layers:
            continue
        rank, alpha = commonest(layers.values())
        result |= {
            f"{part}.peft_type": "LORA",
            f"{part}.r": rank,
            f"{part}.lora_alpha": alpha,
            f"{part}.rank_pattern": {name: one.rank for name, one in layers.items() if one.rank != rank},
            f"{part}.alpha_pattern": {name: float(one.alpha) for name, one in layers.items() if one.alpha != alpha},
            f"{part}.target_modules": list(layers),
        }
    return result


# Of the programs that read these names, only diffusers itself, from 0.34 on, looks for alphas in the metadata.
PEFT = Dialect("diffusers", matches, parse, layer_name, pack, tells_alpha=False)
