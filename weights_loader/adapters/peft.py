"""LoRA as diffusers and peft store it, today and before.

    unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k    .lora_A.weight, .lora_B.weight

A layer has its name in a diffusers model. Alphas are in peft's config: as JSON in the metadata of diffusers' files ("unet.r": 4, ...), in
adapter_config.json beside peft's own; where nothing is said, alpha is the rank.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from minidiff.adapters.layers import PARTS
from minidiff.files import parse_json
from minidiff.pipeline import StableDiffusion
from weights_loader.adapters.kohya import commonest
from weights_loader.adapters.lora_file import Dialect, Factors, Placed, finite, named_halves, parse_factors
from weights_loader.detect import kind
from weights_loader.read import Checkpoint

METADATA = "lora_adapter_metadata"  # where diffusers keeps peft's config
CONFIG = "adapter_config.json"  # where peft does
DEFAULT_ALPHA = 8  # peft's lora_alpha where its config does not say one
ALIASES = (
    (r"^base_model\.model\.", ""),  # peft's wrapper
    (r"\.processor\.to_out$", ".to_out.0"),  # diffusers before 0.20 kept a LoRA in the attention's processor, ...
    (r"\.processor\.to_([qkv])$", r".to_\1"),
    (r"self_attn\.to_out$", "self_attn.out_proj"),  # ... and called the text encoder's layers like the U-Net's
    (r"self_attn\.to_([qkv])$", r"self_attn.\1_proj"),
    (r"^(text_encoder\.)?encoder\.layers\.", r"\1text_model.encoder.layers."),  # transformers 5
)


def matches(names: Sequence[str]) -> bool:
    """Return whether this is a LoRA: every one that is not in another dialect is taken for this one, and said what is wrong with it."""
    return kind(list(names)) == "lora"


def parse(checkpoint: Checkpoint) -> dict[str, Factors]:
    """Return the changes by the layer's name in the file, older names mended. Raises as `parse_factors` and `read_config` do."""
    return parse_factors(checkpoint.tensors, ALIASES, partial(_alpha, read_config(checkpoint)))


def read_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return peft's config, of the metadata or of the file beside the checkpoint, or {}. Raises ValueError for damaged JSON."""
    beside = checkpoint.path.with_name(CONFIG)
    if METADATA in checkpoint.metadata:
        where, text = f"metadata {METADATA}", checkpoint.metadata[METADATA]
    elif checkpoint.path.name.startswith("adapter_model.") and beside.is_file():
        where, text = CONFIG, beside.read_text(encoding="utf-8")
    else:
        return {}
    config = parse_json(text, where)
    if not isinstance(config, dict):
        raise ValueError(f"{where}: {config!r}; expected an object")
    return config


def _alpha(config: Mapping[str, Any], layer: str, rank: int) -> float:
    part = next((part for part in PARTS if layer.startswith(f"{part}.")), None)
    if part:
        config = {key.removeprefix(f"{part}."): value for key, value in config.items() if key.startswith(f"{part}.")}
    if not config:
        return float(rank)
    alpha, patterns = config.get("lora_alpha", DEFAULT_ALPHA), config.get("alpha_pattern") or {}
    # To peft a key is a regular expression for the end of the name, and the first that matches counts. Programs write plain names.
    if not isinstance(patterns, dict) or not all(re.fullmatch(r"\^?[\w.]+", pattern) for pattern in patterns):
        raise ValueError(f"peft's config has alpha_pattern {patterns!r}; only plain names of layers are read")
    own = next((patterns[pattern] for pattern in patterns if f".{layer}".endswith("." + pattern.removeprefix("^"))), alpha)
    alpha = finite(layer, own)
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha  # there the scale is alpha / sqrt(rank)


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


PEFT = Dialect("diffusers", matches, parse, layer_name, pack)
