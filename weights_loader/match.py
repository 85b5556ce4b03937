"""Match the tensors of a file with the parameters of a model: all of them, or one error that names the likely cause."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict

from torch import Tensor, nn

from minidiff.config import ModelConfig
from weights_loader.contents import Contents
from weights_loader.families import differences, family_of_config, family_of_shapes
from weights_loader.name_table import from_file
from weights_loader.report import Report


def match(
    contents: Contents, parts: Mapping[str, nn.Module], config: ModelConfig, ignore: re.Pattern[str] | None = None
) -> tuple[Report, dict[str, dict[str, Tensor]]]:
    """Return the account of all tensors, and each part's state dict in our names: views of the file's tensors.

    Args:
        contents: of the file.
        parts: empty modules.
        config: theirs.
        ignore: a pattern of unknown tensors that are left out.

    Raises ValueError if anything is missing, unexpected or of the wrong shape.
    """
    family = family_of_config(config)
    report, locations = Report(family, config, ignore), {}
    for name, part in parts.items():
        locations[name] = report.add_part(part, family.part_names(name, contents.layouts[name]), contents.parts[name])
    report.add_rest(list(contents.rest))
    if problem := report.problem():
        cause = _likely_cause(contents, report, config)
        raise ValueError(f"{contents.path}: not the weights of {family.name_of(config)}: {problem}\n  likely cause: {cause}")
    states = {}
    for name, part in parts.items():
        tensors, parameters = contents.parts[name], part.state_dict()
        states[name] = {ours: from_file(tensors[there.name], there, parameters[ours]) for ours, there in locations[name].items()}
    return report, states


LARGEST = 2**20  # of any whole number in a config: no width, depth or vocabulary comes near it
MOST_TIMESTEPS = 100_000  # Stable Diffusion has 1000; a schedule has a few numbers for each


def check_extent(contents: Contents, config: ModelConfig) -> None:
    """Raise ValueError for a config that asks for more than the file can hold, before anything is built by it."""
    text, unet, vae = config.text_encoder, config.unet, config.vae
    layers = {
        "text_encoder": text.layers,
        "unet": len(unet.widths) * unet.blocks_per_level * max(1, *unet.attention),
        "vae": len(vae.widths) * vae.blocks_per_level,
    }
    for part, count in layers.items():
        if not 0 < count <= len(contents.parts[part]):
            raise ValueError(
                f"{contents.path}: the config asks for {count} blocks in the {part.replace('_', ' ')}, and there are "
                f"{len(contents.parts[part])} tensors; another file's config, or a damaged one?"
            )
    if odd := next((found for found in _numbers(asdict(config), "") if not 0 <= found[1] <= LARGEST), None):
        raise ValueError(f"{contents.path}: the config asks for {odd[0]} {odd[1]}; expected 0 to {LARGEST}")
    if not (math.isfinite(vae.scaling_factor) and vae.scaling_factor):
        raise ValueError(f"{contents.path}: the config's scaling_factor is {vae.scaling_factor}; expected a number that is not 0")
    if config.schedule.timesteps > MOST_TIMESTEPS:
        raise ValueError(f"{contents.path}: the config asks for {config.schedule.timesteps} timesteps; at most {MOST_TIMESTEPS} are read")


def _numbers(values: object, name: str) -> Iterator[tuple[str, int]]:
    """Yield all whole numbers of nested dicts and tuples, with their names."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield from _numbers(value, f"{name}.{key}".strip("."))
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _numbers(value, name)
    elif type(values) is int:
        yield name, values


def _likely_cause(contents: Contents, report: Report, config: ModelConfig) -> str:
    problems = len(report.missing) + len(report.unexpected) + len(report.wrong_shape)
    if contents.layout == "ldm" and problems > len(report.missing):
        found = family_of_shapes(contents.shapes)
        if found and found != report.family:
            return f"the file is a {found.name}, and another config was asked for; leave config= out"
        if different := differences(contents.family.sizes(contents.shapes), config):
            listed = "; ".join(f"{name} {values}" for name, values in different.items())
            return f"a model of another size ({listed}); pass its own config="
    if len(report.missing) == problems:
        return "weights were left out when the file was saved, or it is one shard of several"
    if len(report.unexpected) == problems:
        return "something else was saved beside the model; ignore=REGEX (--ignore) leaves out what you do not miss"
    return "another kind of model, or a config that is not this file's"
