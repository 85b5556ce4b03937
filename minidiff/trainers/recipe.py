"""The numbers of a training run; importing them costs nothing, so that the command line can show them at once."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

Schedule = Literal["constant", "linear", "cosine", "flat_then_linear"]
Precision = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How the loop (loop.py) trains, whatever it trains. Raises ValueError for what cannot be done.

    batch: samples at once, in each process; a step sees batch * accumulate * processes of them.
    schedule: of the learning rate after `warm_up` steps, see optimizer.learning_rate.
    clip: the largest norm of the whole gradient; None leaves it as it is.
    average: decay of the running mean of the weights; None keeps none. slow_average: of a second, slower one.
    precision: of matrix products and convolutions; what is trained stays in float32. "auto" is bfloat16 on a GPU, float32 elsewhere.
    checkpointing: forget what is inside a block on the way forward and work it out again on the way back: less memory, a third slower.
    compile: run the networks through torch.compile (CUDA graphs on a GPU); it takes a minute before the first step.
    save_every: steps between two saves of the state.
    """

    steps: int
    batch: int
    learning_rate: float
    accumulate: int = 1
    warm_up: int = 0
    schedule: Schedule = "constant"
    clip: float | None = 1.0
    average: float | None = None
    slow_average: float | None = None
    precision: Precision = "auto"
    checkpointing: bool = False
    compile: bool = False
    seed: int = 0
    save_every: int = 100

    def __post_init__(self):
        for name in ("steps", "batch", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: training needs at least 1")
        for name in ("warm_up", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)}: it cannot be below 0")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate {self.learning_rate}: nothing is learnt at it; give a number above 0, such as 1e-4")
        if self.clip is not None and not 0 < self.clip:
            raise ValueError(f"clip {self.clip}: the gradient's largest norm must be above 0; None leaves gradients as they are")
        for name in ("average", "slow_average"):
            if (decay := getattr(self, name)) is not None and not 0 <= decay < 1:
                raise ValueError(f"{name} {decay} is outside 0..1 (1 left out); None keeps no average")
        for name, choices in (("schedule", get_args(Schedule)), ("precision", get_args(Precision))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} {getattr(self, name)!r} unknown; choose {', '.join(choices)}")
        if self.compile and self.checkpointing:
            raise ValueError("compile and checkpointing do not go together; choose one")


@dataclass(frozen=True)
class Recipe:
    """How a model of the scenes is made. Raises ValueError for what cannot be followed.

    widths: of the U-Net's levels, multiples of 32; None is (64, 128, 160), or those of the model to train on from.
    train_vae: a VAE that is given is trained on, instead of taken as it is.
    scenes: how many are composed ahead, for the VAE and for the U-Net to learn from.
    schedule: of the text encoder's and the U-Net's learning rate; the VAE's falls in any case.
    min_snr: gamma of the min-SNR weights of the U-Net's loss (diffusion_loss.py); None leaves all timesteps their own.
    slow_average: decay of a second running mean of the text encoder's and the U-Net's weights; which of the two draws better, pictures say.
    compile: changes the result by rounding only; None compiles where it gains: on a CUDA device, and on CPUs with AMX the text encoder and
        the U-Net. There one step of 64 took 0.63 s instead of 1.1, on two cores; CPUs with AVX512-BF16 alone, and the VAE, gain nothing.
    """

    seed: int = 0
    widths: tuple[int, ...] | None = None
    vae_steps: int = 1000
    vae_batch: int = 32
    vae_learning_rate: float = 4e-3
    kl_weight: float = 4e-3
    train_vae: bool = False
    scenes: int = 40_000
    steps: int = 8000
    batch: int = 64
    learning_rate: float = 4e-3
    schedule: Schedule = "flat_then_linear"
    object_weight: float = 1.6  # the loss of a latent cell is weighted 0.4 + object_weight * (its share of object)
    caption_dropout: float = 0.1  # captions left empty, for classifier-free guidance (Ho and Salimans 2022)
    min_snr: float | None = None
    average: float = 0.9995
    slow_average: float | None = 0.9999
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
        """The loop's settings for the VAE."""
        return self._settings(steps=self.vae_steps, batch=self.vae_batch, learning_rate=self.vae_learning_rate, schedule="flat_then_linear")

    def diffusion(self) -> Settings:
        """The loop's settings for the text encoder and the U-Net."""
        return self._settings(
            steps=self.steps, batch=self.batch, learning_rate=self.learning_rate, schedule=self.schedule, slow_average=self.slow_average
        )

    def _settings(
        self, *, steps: int, batch: int, learning_rate: float, schedule: Schedule, slow_average: float | None = None
    ) -> Settings:
        # bfloat16 on CPUs too: it is faster at these batches, and was measured to lose nothing.
        return Settings(
            steps=steps, batch=batch, learning_rate=learning_rate, warm_up=60, schedule=schedule, clip=None,
            average=self.average, slow_average=slow_average, precision="bfloat16", seed=self.seed, compile=bool(self.compile),
        )  # fmt: skip


RECIPES = {
    "bundled": Recipe(),
    # A narrower model whose learning rate never fell: the lesson on training shows it between its own run and the bundled model.
    "half": Recipe(widths=(32, 64, 96), steps=800, schedule="constant"),
}
