"""Apply a dialect's names to a module: where a file keeps each of our parameters, and in which shape.

`name_table` renames the parameters of a real module, so that it is complete by construction: a parameter without a name is an error
here, not at a user's.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weights_loader.dialects import Aliases

LAYOUTS = ("ldm", "diffusers")
EMA_PREFIX = "model_ema."


@dataclass(frozen=True)
class PartNames:
    """How files of one layout name the weights of one part of a model.

    Args:
        layers: takes the part's config and gives {our layer: its layer in the file}; a function of dialects.py.
        prefix: stands before every layer in the file.
        root: stands before everything in the file that belongs to the part, computed with or not; None is the prefix.
        convolutions: takes the part's config and gives a pattern of our matrices that files hold as 1x1 convolutions, or None.
        aliases: other names in use, as (pattern, the name that is meant).
    """

    layers: Callable[[Any], dict[str, str]]
    prefix: str = ""
    root: str | None = None
    convolutions: Callable[[Any], str | None] = lambda config: None
    aliases: Aliases = ()

    def belongs(self, name: str) -> bool:
        """Return whether a tensor in a file belongs to this part."""
        return name.startswith(self.prefix if self.root is None else self.root)


@dataclass(frozen=True)
class TensorLocation:
    """Where a file keeps one of our parameters.

    qkv_index: 0, 1 or 2 for the query, key or value third of the rows of a stacked matrix; None if the tensor is not shared.
    convolution: the file has a 1x1 convolution (C_out, C_in, 1, 1) where we have the same map as a matrix (C_out, C_in).
    transposed: the file has the matrix (C_in, C_out), to be applied from the right.
    """

    name: str
    qkv_index: int | None = None
    convolution: bool = False
    transposed: bool = False


def name_table(part: nn.Module, names: PartNames) -> dict[str, TensorLocation]:
    """Return {our parameter's name: its location in a file} for every parameter of a module, in its order.

    The module may be on the meta device. Only OpenCLIP's stacked attention has several parameters in one tensor.
    """
    layers = names.layers(part.config)
    convolutions = names.convolutions(part.config)
    result = {}
    for ours in part.state_dict():
        theirs = file_name(ours, layers)
        qkv_index = ("to_q", "to_k", "to_v").index(ours.split(".")[-2]) if "in_proj_" in theirs else None
        convolution = convolutions is not None and re.search(convolutions, ours) is not None
        result[ours] = TensorLocation(names.prefix + theirs, qkv_index, convolution, transposed=theirs == "text_projection")
    return result


def file_name(ours: str, layers: dict[str, str]) -> str:
    """Return a parameter's name in a file, without the prefix. Most rules name a layer, some a single parameter of one."""
    if ours in layers:
        return layers[ours]
    layer, kind = ours.rsplit(".", 1)
    assert layer in layers, f"no rule for {ours}"
    return f"{layers[layer]}.{kind}"


def file_shapes(part: nn.Module, names: PartNames) -> dict[str, tuple[int, ...]]:
    """Return {name in the file: shape} of everything that a file should hold for the part."""
    return {name: tuple(tensor.shape) for name, tensor in to_file(part, names).items()}


def from_file(tensor: Tensor, location: TensorLocation, ours: Tensor) -> Tensor:
    """Return the file's tensor in the shape of our parameter, which may be on the meta device: a view, never a copy.

    Where we have a matrix, the file may have a 1x1 convolution or a matrix, whatever the location says: programs have written either.
    """
    if location.transposed and tensor.dim() == 2:
        return tensor.mT
    if location.qkv_index is not None:
        tensor = tensor.chunk(3)[location.qkv_index]
    if ours.dim() == 2 and tensor.shape[2:] == (1, 1):
        tensor = tensor[:, :, 0, 0]
    return tensor


def to_file(part: nn.Module, names: PartNames) -> dict[str, Tensor]:
    """Return {name in the file: tensor} of all parameters of a module, in the file's shapes: the inverse of `from_file`."""
    parameters, result = part.state_dict(), {}
    for ours, location in name_table(part, names).items():
        tensor = parameters[ours].mT if location.transposed else parameters[ours]
        if location.convolution:
            tensor = tensor[:, :, None, None]
        if location.qkv_index:
            tensor = torch.cat([result[location.name], tensor])
        result[location.name] = tensor
    return result


def canonical_name(name: str, aliases: Aliases) -> str:
    """Return the name that the rules give to what a file may call otherwise."""
    for pattern, replacement in aliases:
        name = re.sub(pattern, replacement, name)
    return name


def ema_name(ldm_name: str) -> str:
    """Return where the original's training keeps the moving average of a U-Net weight: the path without `model.` and without any dot."""
    return EMA_PREFIX + ldm_name.removeprefix("model.").replace(".", "")
