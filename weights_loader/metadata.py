"""Write the model's config as text into the metadata of a safetensors file, and read it.

Tensors tell widths and depths, but not the number of heads, the normalisation groups, the noise schedule or the words that the
tokenizer knows. Files of the public models leave that to readers who know the family; ours state it, so that one file is enough.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from minidiff.config import ModelConfig
from minidiff.files import parse_json
from weights_loader.brief import brief

KEY = "minidiff.config"
SETTINGS_KEY = "minidiff.settings"  # what a file was made with
FORMAT = {"format": "pt"}  # diffusers and transformers ask for it

C = TypeVar("C")


def config_to_json(config: ModelConfig) -> str:
    """Return every number of the config, as a JSON object of the same nesting.

    What Stable Diffusion 1 and 2 do not need is written as before it came: attention is true or false, and of what only SDXL has, all that
    is at its default is left out.
    """
    values = asdict(config)
    if max(values["unet"]["attention"]) <= 1:
        values["unet"]["attention"] = [bool(depth) for depth in values["unet"]["attention"]]
    for fields, name in ((values["unet"], "pooled_width"), (values["text_encoder"], "penultimate"), (values["text_encoder"], "projection")):
        if not fields[name]:
            del fields[name]
    if config.text_encoder_2 is None:
        del values["text_encoder_2"], values["tokenizer_2"]
    if config.zero_negative:
        del values["zero_negative"]
    return json.dumps(values, ensure_ascii=False, separators=(",", ":"))


def config_from_json(text: str) -> ModelConfig:
    """Read what `config_to_json` wrote. A missing field has its default; an unknown field or a wrong value raises ValueError."""
    values = parse_json(text, f"metadata {KEY}", "; was the file written by another program?")
    unet = values.get("unet") if isinstance(values, dict) else None
    if isinstance(unet, dict) and isinstance(depths := unet.get("attention"), list):  # true and false stand for 1 and 0
        unet["attention"] = [int(depth) if isinstance(depth, bool) else depth for depth in depths]
    return build(ModelConfig, values, KEY)


def settings_to_metadata(settings: Mapping[str, object]) -> dict[str, str]:
    """Return what a file was made with, as metadata in JSON. Raises ValueError for what JSON has no place for."""
    if not settings:
        return {}
    try:
        return {SETTINGS_KEY: json.dumps(settings, ensure_ascii=False, sort_keys=True)}
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings: {error}; give text, numbers, lists and dicts") from error


def build(cls: type[C], values: object, where: str) -> C:
    """Build a config dataclass from the value of the metadata's key `where`. Raises ValueError for a wrong field or value."""
    hints = get_type_hints(cls)
    if not isinstance(values, dict):
        raise ValueError(f"metadata {where}: {brief(values)}; expected an object with {', '.join(hints)}")
    if unknown := [name for name in values if name not in hints]:
        raise ValueError(f"metadata {where}: field {brief(unknown[0])} unknown to this version; it knows {', '.join(hints)}")
    return cls(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _value(hint: Any, value: object, where: str) -> object:
    kinds = get_args(hint) if isinstance(hint, UnionType) else (hint,)
    choices = [kind for kind in kinds if isinstance(kind, type) and is_dataclass(kind)]
    if choices and (value is not None or hint is choices[0]):
        return build(choices[0], value, where)
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, int) and hint is float:
        value = float(value)
    if not _fits(hint, value):
        raise ValueError(f"metadata {where}: {brief(value)}; expected {getattr(hint, '__name__', hint)}")
    return value


def _fits(hint: Any, value: object) -> bool:
    """Return whether a value has the type: one of the few kinds of types that occur in the configs."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(hint, UnionType):
        return any(_fits(choice, value) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(get_args(hint)[0], item) for item in value)
    return type(value) is hint
