"""The model's config as text, in the metadata of a safetensors file.

Tensors tell widths and depths, but not the number of heads, the normalisation groups, the noise schedule or the words that the
tokenizer knows. Files of the public models leave that to whoever knows the family; ours say it, so that one file is enough.
"""

import json
from dataclasses import asdict, fields, is_dataclass
from types import UnionType
from typing import Literal, get_args, get_origin, get_type_hints

from minidiff.config import ModelConfig

KEY = "minidiff.config"
SETTINGS_KEY = "minidiff.settings"  # what a file was made with
FORMAT = {"format": "pt"}  # diffusers and transformers ask for it
PREDICTION_KEY = "modelspec.prediction_type"  # of Stability AI's ModelSpec, which several programs write
PREDICTIONS = {"epsilon": "eps", "v": "v"}


def config_to_json(config: ModelConfig) -> str:
    """Every number of the config, as a JSON object of the same nesting."""
    return json.dumps(asdict(config), ensure_ascii=False, separators=(",", ":"))


def config_from_json(text: str) -> ModelConfig:
    """The other way. A field that is not there has its default; raises ValueError for an unknown field or a wrong value."""
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"metadata {KEY}: no JSON ({error}); was the file written by another program?") from error
    return build(ModelConfig, values, KEY)


def prediction_from_metadata(metadata: dict[str, str]) -> Literal["eps", "v"] | None:
    """What the U-Net predicts, where a file of another program says it."""
    return PREDICTIONS.get(metadata.get(PREDICTION_KEY, ""))


def settings_to_metadata(settings: dict[str, object]) -> dict[str, str]:
    """What a file was made with, under names of the caller's, as JSON. Raises ValueError for what JSON has no place for."""
    if not settings:
        return {}
    try:
        return {SETTINGS_KEY: json.dumps(settings, ensure_ascii=False, sort_keys=True)}
    except (TypeError, ValueError) as error:
        raise ValueError(f"settings: {error}; give text, numbers, lists and dicts") from error


def build(cls: type, values: object, where: str) -> object:
    """A config dataclass from what stands under the metadata's key `where`. Raises ValueError for what is no such thing."""
    if not isinstance(values, dict):
        raise ValueError(f"metadata {where}: {values!r}; expected an object with {', '.join(field.name for field in fields(cls))}")
    hints = get_type_hints(cls)
    if unknown := [name for name in values if name not in hints]:
        raise ValueError(f"metadata {where}: field {unknown[0]!r} unknown to this version; it knows {', '.join(hints)}")
    return cls(**{name: _value(hints[name], value, f"{where}.{name}") for name, value in values.items()})


def _value(hint: object, value: object, where: str) -> object:
    if is_dataclass(hint):
        return build(hint, value, where)
    if isinstance(value, list):
        value = tuple(value)
    if isinstance(value, int) and hint is float:
        value = float(value)
    if not _fits(hint, value):
        raise ValueError(f"metadata {where}: {value!r}; expected {getattr(hint, '__name__', hint)}")
    return value


def _fits(hint: object, value: object) -> bool:
    """Whether a value has the type: the few kinds of types that occur in the configs."""
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if isinstance(hint, UnionType):
        return any(_fits(choice, value) for choice in get_args(hint))
    if get_origin(hint) is tuple:
        return isinstance(value, tuple) and all(_fits(get_args(hint)[0], item) for item in value)
    if hint is int and isinstance(value, bool):
        return True  # UNetConfig.attention was true or false before it counted blocks, which is the same to 0 and 1
    return type(value) is hint
