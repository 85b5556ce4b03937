"""A LoRA that has learned something, for the tests of adapters."""

import torch

from minidiff.adapters.lora import create_lora

ALL = (r"^(unet|text_encoder)\.",)
KEYS = (r"cross_attention\.to_k$",)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def random_lora(sd, patterns=ALL, rank=3, alpha=2.0, seed=0, size=0.1):
    lora = create_lora(sd, patterns, rank=rank, alpha=alpha, init="kaiming", generator=generator(seed))
    with torch.no_grad():
        for low in lora.layers.values():
            low.up.weight.copy_(size * torch.randn(low.up.weight.shape, generator=generator(seed + 1)))
    return lora
