"""The numbers of a training run from nothing; importing them costs nothing, so that the command line can show them at once."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """How the bundled model is made. scenes: how many are composed and encoded ahead for the U-Net to learn from."""

    seed: int = 0
    vae_steps: int = 1000
    vae_batch: int = 32
    vae_learning_rate: float = 4e-3
    kl_weight: float = 2e-4
    scenes: int = 30_000
    steps: int = 3950
    batch: int = 64
    learning_rate: float = 4e-3
    object_weight: float = 1.6  # the loss of a latent cell is weighted 0.4 + object_weight * (its share of object)
    caption_dropout: float = 0.1  # captions left empty, for classifier-free guidance (Ho and Salimans 2022)
    average: float = 0.9995

    def __post_init__(self):
        for name in ("vae_steps", "vae_batch", "scenes", "steps", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: a recipe needs at least 1")
        for name in ("vae_learning_rate", "learning_rate", "kl_weight", "object_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)}: a recipe needs a finite number, not below 0")
        for name in ("caption_dropout", "average"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} {getattr(self, name)} is outside 0..1")
