"""`generate --settings picture.png`: the flags that a picture was made with, under those that are given beside it.

    picture.png -> its text (png_settings.py) -> --steps=30 --sampler=euler ... -> the command's arguments, and given flags over them

A value belongs to the flag that RENAMED names, or else to the flag of its own name, "Target size" to --target-size.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

from minidiff.cli.flags import collect, flag_name
from minidiff.cli.model import print_notes
from minidiff.cli.names import is_model

WORK_SIZE = "Work size"  # of an edit of the part around a mask, in place of the picture's own
RENAMED = {"CFG scale": "guidance-scale", "Batch size": "batch", "Eta DDIM": "eta", "Denoising strength": "strength", WORK_SIZE: "size"}
SAID_OTHERWISE = ("Schedule type", "Version", "Model hash", "RNG", "Batch pos")  # with the sampler, or of no meaning here
OURS = "RNG"  # "CPU": noise is drawn as here. Web interfaces leave it out where it is drawn on the GPU


def call_with_settings(function: Callable[..., None], name: str, args: list[str]) -> None:
    """Call a function of the command line with its arguments, over the settings of the picture that --settings names, if it does.

    Args:
        function: its first argument is the prompts, positional; it has an argument `settings`
        name: of the command
        args: the command line

    Raises ValueError for a picture without settings, and for a model or sampler in them that is not here.
    """
    (prompts,), given = collect(function, name, args)
    picture: Path | None = given["settings"]
    if picture is not None:
        chosen = {flag_name(arg) for arg in args if arg.startswith("--")}
        found_prompts, flags = picture_flags(picture, function, chosen)
        _, made = collect(function, name, flags)
        prompts = prompts or (() if given.get("prompts_file") else found_prompts)
        given = {key: _merged(key, value, made[key], chosen) for key, value in given.items()}
    function(prompts, **given)


def _merged(key: str, given: Any, made: Any, chosen: set[str]) -> Any:
    if is_dataclass(given) and not isinstance(given, type):
        return replace(made, **{field.name: getattr(given, field.name) for field in fields(given) if _flag(field.name) in chosen})
    return given if key == "settings" or _flag(key) in chosen else made


def _flag(name: str) -> str:
    return name.replace("_", "-")


def picture_flags(picture: Path, function: Callable[..., None], chosen: set[str]) -> tuple[tuple[str, ...], list[str]]:
    """Return the prompts of a picture, and its settings as flags of the function; print what has no flag here.

    Args:
        picture: a PNG of this program or a web interface
        function: its arguments are the flags that there are
        chosen: flags that were given beside it
    """
    from minidiff.png_settings import parse, read_parameters

    if not picture.is_file():
        raise FileNotFoundError(f"--settings {picture}: no such file")
    found = parse(read_parameters(picture)[0])
    if found is None:
        raise ValueError(f"--settings {picture}: no settings in it; give a PNG as generate or a web interface wrote it")
    known, flags, left = set(flags_of(function)), [], []
    for name, value in found.values.items():
        stem, _, number = name.rpartition(" ")
        flag = RENAMED.get(name, flag_name(name))
        flag = flag_name(stem) if flag not in known and number.isdecimal() else flag  # "LoRA 2" is the second --lora
        if name == "Size" and WORK_SIZE in found.values:
            continue
        if name == "Sampler":
            flags += [] if "sampler" in chosen else [f"--sampler={sampler_of(picture, value, found.values.get('Schedule type'))}"]
        elif flag in known:
            flags += [f"--{flag}"] if value == "True" else [f"--{flag}={value}"]
        elif name not in SAID_OTHERWISE:
            left.append(f"{name}: {value}")
    if "model" not in chosen and not is_model(model := found.values.get("Model", "tiny")):
        raise ValueError(f"--settings {picture}: made with the model {model!r}, which is no file here; give --model too")
    if left:
        print_notes([f"{picture}: not taken over: {', '.join(left)}"])
    if found.values.get(OURS) != "CPU":
        print_notes([f"{picture}: its noise was not drawn on a CPU, so the same seed gives another picture"])
    flags = [flag for flag in flags if not (flag.startswith("--model=") and "model" in chosen)]
    return found.prompts, [*flags, *([f"--negative-prompt={found.negative_prompt}"] if found.negative_prompt else [])]


def flags_of(function: Callable[..., None]) -> Iterator[str]:
    """Yield the names of a command's flags, without dashes, and of its positional argument."""
    for name, parameter in signature(function).parameters.items():
        default: Any = parameter.default
        yield from [_flag(field.name) for field in fields(default)] if is_dataclass(default) else [_flag(name)]


def sampler_of(picture: Path, web_name: str, schedule: str | None) -> str:
    """Return the sampler that a web interface calls by a name and a schedule type. Raises ValueError for one that is not here."""
    from minidiff.samplers import SAMPLERS

    by_name: Mapping[tuple[str, str | None], str] = {
        (row.web_name, row.web_schedule or row.own_spacing): name for name, row in SAMPLERS.items()
    }
    older = web_name.removesuffix(" Karras"), "Karras" if web_name.endswith(" Karras") else schedule
    loose = next((name for name, row in SAMPLERS.items() if row.web_name == web_name and schedule in (None, "Automatic", "Uniform")), None)
    found = by_name.get((web_name, schedule)) or by_name.get(older) or loose or (web_name if web_name in SAMPLERS else None)
    if found is None:
        what = f"{web_name!r} with the schedule type {schedule!r}" if schedule else repr(web_name)
        raise ValueError(f"--settings {picture}: made with the sampler {what}, which is not here; give --sampler too")
    return found
