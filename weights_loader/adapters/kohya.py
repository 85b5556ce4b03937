"""LoRA as kohya's scripts and the web interfaces store it.

    lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k    .lora_down.weight, .lora_up.weight, .alpha

A layer has the name of a diffusers model with underscores in place of dots, which cannot be undone by itself: it is looked up among the
names that the model really has. Each layer has its alpha; without one it is the rank.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from minidiff.adapters.low_rank import LowRank
from minidiff.pipeline import StableDiffusion
from weights_loader.adapters.lora_file import Dialect, Factors, Placed, named_halves, parse_factors, tensors_of
from weights_loader.detect import kind
from weights_loader.read import Checkpoint

PREFIXES = {"unet": "lora_unet_", "text_encoder": "lora_te_", "text_encoder_2": "lora_te2_"}
ALIASES = ((r"^lora_te1_", "lora_te_"),)  # of two text encoders the first is called so


def matches(names: Sequence[str]) -> bool:
    """Return whether a layer is named in this way."""
    return kind(list(names)) == "lora" and any(name.startswith("lora_") for name in names)


def parse(checkpoint: Checkpoint) -> dict[str, Factors]:
    """Return the changes by the layer's name in the file. Raises as `parse_factors` does."""
    return parse_factors(tensors_of(checkpoint), ALIASES, lambda layer, rank: float(rank))


def layer_name(part: str, theirs: str) -> str:
    """Return a layer's name in the file."""
    return PREFIXES[part] + theirs.replace(".", "_")


def pack(changes: Placed, sd: StableDiffusion) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors, and what web interfaces show and sort by as metadata."""
    tensors, layers = named_halves(changes, "lora_down", "lora_up"), changes.values()
    # Where ranks differ and each alpha is its rank, as after an extraction, alphas are left out: every program takes the rank then. Written
    # out, diffusers would take the commonest of them for all attention layers.
    if len({one.rank for one in layers}) == 1 or any(one.alpha != one.rank for one in layers):
        for location, one in changes.items():
            alpha = torch.tensor(float(one.alpha), dtype=torch.float64)
            tensors[f"{location.name}.alpha"] = alpha.float() if alpha.float() == alpha else alpha
    rank, alpha = commonest(layers)
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(alpha)}
    if "text_encoder_2" in sd.parts:
        tensors = {re.sub("^lora_te_", "lora_te1_", name): tensor for name, tensor in tensors.items()}
    version = {768: "sd_v1", 1024: "sd_v2", 2048: "sdxl_base_v1-0"}.get(sd.config.unet.context_width)
    return tensors, metadata | ({"ss_base_model_version": version} if version else {})


def commonest(changes: Collection[LowRank]) -> tuple[int, float]:
    """Return the rank and the alpha that most layers have."""
    ranks, alphas = Counter(one.rank for one in changes), Counter(float(one.alpha) for one in changes)
    return ranks.most_common(1)[0][0], alphas.most_common(1)[0][0]


KOHYA = Dialect("kohya", matches, parse, layer_name, pack)
