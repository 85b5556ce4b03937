"""What the tests of editing share: a small picture, a mask of whole cells, and the last step of a loop."""

from collections.abc import Generator

import torch
from torch import Tensor

from minidiff.samplers import Step

SIDE = 32  # pixels of the small model's pictures: 8 latent cells of 4


def picture(seed=0, height=SIDE, width=SIDE) -> Tensor:
    """Bytes as pixels, so that a picture written and read again is the same."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (1, 3, height, width), generator=generator).float() / 127.5 - 1


def left_half(height=SIDE, width=SIDE) -> Tensor:
    mask = torch.zeros(1, 1, height, width)
    mask[..., : width // 2] = 1
    return mask


def last(trajectory: Generator[Step, Tensor | None, None]) -> Tensor:
    *_, step = trajectory
    return step.x_t
