"""Made-up LoRAs and Custom Diffusions for a small model, for the tests of their files."""

import re

import torch

from minidiff.adapters.custom_diffusion import CustomDiffusion, compress
from minidiff.adapters.lora import LoRA
from minidiff.adapters.low_rank import LowRank
from minidiff.adapters.tokens import NewTokens, words_width
from weights_loader.adapters.lora import layer_locations
from weights_loader.adapters.peft import PEFT

KEYS_AND_VALUES = r"cross_attention\.to_[kv]$"
ALL = r"cross_attention\.to_\w+$"


def random_lora(sd, pattern="", ranks=(2, 3, 4), alphas=(0.1, 1.0, 2.5)):
    """Of every layer with the pattern in its name; ranks and alphas in turn, by default so that no two neighbours are scaled alike."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for name in layer_locations(sd, PEFT):
        if re.search(pattern, name):
            weight, rank = weight_of(sd, name), ranks[len(layers) % len(ranks)]
            down = 0.2 * torch.randn(rank, *weight.shape[1:], generator=generator)
            up = torch.randn(weight.shape[0], rank, *(1,) * (weight.dim() - 2), generator=generator)
            layers[name] = LowRank(down, up, alphas[len(layers) // 2 % len(alphas)])
    return LoRA(layers)


def weight_of(sd, name):
    part, layer = name.split(".", 1)
    return sd.parts[part].get_submodule(layer).weight


def random_delta(sd, pattern=KEYS_AND_VALUES, words=1):
    """New weights (and biases) in cross-attention, and two new words; words: vectors each, 0 for no words."""
    generator = torch.Generator().manual_seed(0)
    layers = {f"unet.{name}": layer for name, layer in sd.unet.named_modules() if re.search(pattern, name)}
    weights = {name: one.weight.detach() + 0.3 * torch.randn(one.weight.shape, generator=generator) for name, one in layers.items()}
    biases = {name: torch.randn(one.bias.shape, generator=generator) for name, one in layers.items() if one.bias is not None}
    rows = {f"<new{i}>": torch.randn(words, words_width(sd), generator=generator) for i in (1, 2)}
    return CustomDiffusion(weights, NewTokens(rows) if words else None, biases)


def compressed(delta, sd, rank=2):
    return compress(delta.deltas(sd), rank=rank)
