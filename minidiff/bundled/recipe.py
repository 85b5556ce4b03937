"""The numbers of the recipe that makes the bundled model. Importing them is cheap, so that the command line can show them at once."""

import math
from dataclasses import dataclass

from minidiff.trainers.engine.settings import Schedule, Settings


@dataclass(frozen=True)
class Recipe:
    """How long the bundled model is trained, and how.

    Raises ValueError for what cannot be followed. Each line is the help of a flag of `minidiff train from-scratch`.

    Args:
        seed: of everything that is random
        widths: of the U-Net's three levels, multiples of 32; 64 128 160 by default, or those of the model to train on from
        vae_steps: steps of the VAE
        vae_batch: pictures at once
        vae_learning_rate: of the VAE; it stays for a quarter of the steps, then falls
        kl_weight: what the latents' distance from unit normals counts in the VAE's loss
        train_vae: train the VAE of --vae or --init further, instead of taking it as it is
        scenes: how many are composed before training, for the VAE and for the U-Net to learn from
        steps: of the text encoder and the U-Net
        batch: latents at once
        learning_rate: of the text encoder and the U-Net
        schedule: of that rate, after it has risen
        object_weight: what a latent cell of an object counts, beyond the 0.4 of the background
        caption_dropout: share of captions that are left empty, for guidance
        min_snr: gamma of the min-SNR weights of the U-Net's loss, such as 5
        ema_decay: decay of the running mean of the weights, which is the result
        compile: run the networks through torch.compile, which changes the result by rounding only; by default where it is faster: on a CUDA
            device, and the text encoder and the U-Net on CPUs with AMX
    """

    seed: int = 0
    widths: tuple[int, ...] | None = None
    vae_steps: int = 2400
    vae_batch: int = 16
    vae_learning_rate: float = 4e-3
    kl_weight: float = 4e-3
    train_vae: bool = False
    scenes: int = 30_000
    steps: int = 14_000
    batch: int = 64
    learning_rate: float = 4e-3
    schedule: Schedule = "linear_after_hold"
    object_weight: float = 1.6  # the loss of a latent cell is weighted 0.4 + object_weight * (its share of object)
    caption_dropout: float = 0.1  # captions left empty, for classifier-free guidance (Ho and Salimans 2022)
    min_snr: float | None = None
    ema_decay: float = 0.9995
    compile: bool | None = None

    def __post_init__(self):
        if self.widths is not None and (len(self.widths) != 3 or any(width < 1 or width % 32 for width in self.widths)):
            raise ValueError(f"widths {self.widths}: the U-Net has three levels, each a multiple of 32 wide")
        if self.scenes < 1:
            raise ValueError(f"scenes {self.scenes}: a recipe needs at least 1")
        for name in ("kl_weight", "object_weight"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} {getattr(self, name)}: a recipe needs a finite number, not below 0")
        if not 0 <= self.caption_dropout <= 1:
            raise ValueError(f"caption_dropout {self.caption_dropout} is outside 0..1")
        if self.min_snr is not None and not 0 < self.min_snr < math.inf:
            raise ValueError(f"min_snr {self.min_snr}: gamma must be a finite number above 0; None leaves the timesteps as they are")
        self.autoencoder()
        self.diffusion()

    def autoencoder(self) -> Settings:
        """Return the settings of the VAE's training."""
        return self._settings(
            steps=self.vae_steps, batch=self.vae_batch, learning_rate=self.vae_learning_rate, schedule="linear_after_hold"
        )

    def diffusion(self) -> Settings:
        """Return the settings of the text encoder's and the U-Net's training."""
        return self._settings(steps=self.steps, batch=self.batch, learning_rate=self.learning_rate, schedule=self.schedule)

    def _settings(self, *, steps: int, batch: int, learning_rate: float, schedule: Schedule) -> Settings:
        # bfloat16 on CPUs too: it is faster at these batches, and was measured to lose nothing.
        return Settings(
            steps=steps,
            batch=batch,
            learning_rate=learning_rate,
            warmup_steps=60,
            schedule=schedule,
            max_grad_norm=None,
            ema_decay=self.ema_decay,
            precision="bfloat16",
            seed=self.seed,
            compile=bool(self.compile),
        )


RECIPES = {
    "bundled": Recipe(),
    # A narrower model whose learning rate never fell: the lesson on training shows it between its own run and the bundled model.
    "half": Recipe(widths=(32, 64, 96), steps=800, schedule="constant"),
}
