"""Match the tensors of a file with the parameters of a model: all of them, or one error that names the likely cause."""

import re
from collections.abc import Mapping

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
