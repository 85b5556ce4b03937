"""What a diffusers folder holds of its text encoder without using it, in LDM names, under which everything unused is kept and written back.

text_model.encoder.layers.11....    blocks beyond the config's: clip skip by the config, or Stable Diffusion 2's last one
text_projection.weight              what CLIP compares texts and pictures with
"""

import re
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from minidiff.config import ModelConfig
from minidiff.text_encoder import TextEncoder
from weights_loader.empty_parts import NoInit
from weights_loader.families import part_names
from weights_loader.name_table import name_table

BLOCK = re.compile(r"text_model\.encoder\.layers\.(\d+)\.")
MOST_BLOCKS = 1000


def to_ldm_names(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Return the kept tensors of a checkpoint under LDM names; those that have one already stay.

    Raises ValueError for a block without one of its weights.
    """
    blocks = [int(match[1]) for name in tensors if (match := BLOCK.match(name))]
    if not blocks and "text_projection.weight" not in tensors:
        return dict(tensors)
    last = max(blocks, default=0)
    if last > MOST_BLOCKS:
        raise ValueError(f"a text encoder with a block of number {last}; {MOST_BLOCKS} would be many")
    with torch.device("meta"), NoInit():
        whole = TextEncoder(replace(config.text_encoder, layers=max(last + 1, config.text_encoder.layers)))
    theirs, ldm = (name_table(whole, part_names(config, "text_encoder", layout)) for layout in ("diffusers", "ldm"))
    result, stacked = {}, dict[str, list[Tensor]]()
    for ours, location in theirs.items():
        if location.name not in tensors:
            continue
        place = ldm[ours]
        if place.qkv_index is None:
            result[place.name] = tensors[location.name]
        else:
            stacked.setdefault(place.name, []).append(tensors[location.name])
    if short := next((name for name, thirds in stacked.items() if len(thirds) < 3), None):
        raise ValueError(f"the unused {short} has {len(stacked[short])} of its query, key and value")
    result |= {name: torch.cat(thirds) for name, thirds in stacked.items()}
    prefix = part_names(config, "text_encoder", "ldm").prefix
    for name, tensor in tensors.items():
        if name == "text_projection.weight":  # OpenCLIP has it as a bare matrix, the other way round
            open_clip = not prefix.endswith("text_model.")
            result[f"{prefix}text_projection" if open_clip else f"{prefix.removesuffix('text_model.')}{name}"] = (
                tensor.T if open_clip else tensor
            )
        elif not BLOCK.match(name):
            result[name] = tensor
    return result
