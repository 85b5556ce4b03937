"""A small Stable Diffusion from scratch: the VAE, then the text encoder and the U-Net together on its latents.

    precomputed scenes -> AutoencoderTask -> precomputed latents -> DiffusionTask -> modules with EMA weights

The order and the losses are those of latent diffusion (Rombach et al. 2022), smaller, with what helps at this size: a VAE whose latents
may be resized like pictures (Kouzelis et al. 2025, "EQ-VAE"), which makes them smoother and easier to predict; the loss of an object's
cells counts more than the background's; late timesteps are drawn more often; and the schedule ends in pure noise (Lin et al. 2023). Both
tasks are trained by the loop of loop.py.

Left out: the adversarial and perceptual losses of the original's VAE.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor, nn

from minidiff.bundled.recipe import Recipe
from minidiff.config import ModelConfig, ScheduleConfig, TextEncoderConfig, TokenizerConfig, UNetConfig, VAEConfig
from minidiff.pictures import to_pixels
from minidiff.pipeline import StableDiffusion
from minidiff.scenes.scenes import SIZE, bpe_merges, sample_scene
from minidiff.schedule import NoiseSchedule
from minidiff.text_encoder import TextEncoder
from minidiff.tokenizer import Tokenizer
from minidiff.trainers.engine.diffusion_loss import NoiseSample, min_snr_weight, squared_error
from minidiff.trainers.engine.loop import randn_per_sample, rng_for, with_seed
from minidiff.trainers.engine.optimizer import optimizers
from minidiff.trainers.engine.prefetch import prefetch
from minidiff.trainers.engine.settings import Settings
from minidiff.transfer import to_device
from minidiff.unet import UNet
from minidiff.vae import VAE

WITHOUT_MERGES = 512 + 2  # vocabulary: the bytes, alone and at a word's end, and the start and end tokens; each merge adds one
CONTEXT_LENGTH = 32  # the longest caption of a scene has 22 tokens


def bundled_config(widths: tuple[int, ...] | None = None) -> ModelConfig:
    """Return the bundled model's config: Stable Diffusion's shape for pictures of 128 x 128, latents of 16 x 16. widths: of the U-Net."""
    merges, widths = bpe_merges(), widths or (64, 128, 160)
    vae = VAEConfig(widths=(16, 32, 64, 96), blocks_per_level=1, latent_channels=8, groups=8)
    return ModelConfig(
        tokenizer=TokenizerConfig(merges=merges, context_length=CONTEXT_LENGTH),
        text_encoder=TextEncoderConfig(WITHOUT_MERGES + len(merges), CONTEXT_LENGTH, width=128, layers=3, heads=4),
        unet=UNetConfig(
            in_channels=vae.latent_channels,
            out_channels=vae.latent_channels,
            widths=widths,
            blocks_per_level=1,
            attention=(True, True, False),
            heads=tuple(width // 32 for width in widths),
            context_width=128,
        ),
        vae=vae,
        schedule=ScheduleConfig(prediction="v", zero_terminal_snr=True, spacing="trailing"),
        image_size=SIZE,
        guidance_scale=4.0,
    )


@dataclass(frozen=True)
class Scenes:
    """Precomputed scenes. mask: share of a latent cell under an object, 0..1."""

    images: UInt8[np.ndarray, "N H W 3"]
    tokens: Int[Tensor, "N L"]
    mask: Float[Tensor, "N 1 h w"]


def make_scenes(recipe: Recipe, config: ModelConfig, chunk: int = 100) -> Iterator[Scenes]:
    """Compose the recipe's scenes, `chunk` per iteration."""
    tokenizer = Tokenizer(config.tokenizer)
    for start in range(0, recipe.scenes, chunk):
        rng = np.random.default_rng([recipe.seed, 1, start])
        scenes = [sample_scene(rng) for _ in range(min(chunk, recipe.scenes - start))]
        mask = torch.from_numpy(np.stack([scene.mask for scene in scenes]))[:, None]
        images = np.stack([scene.image for scene in scenes])
        yield Scenes(images, tokenizer([scene.caption for scene in scenes]), F.avg_pool2d(mask, config.vae.factor))


def reconstruction_loss(
    output: Float[Tensor, "B 3 H W"], pixels: Float[Tensor, "B 3 H W"], weight: Float[Tensor, "B 1 H W"]
) -> Float[Tensor, ""]:
    """Return L1 + 2 MSE + L1 of the differences between neighbouring pixels, which keeps edges sharp; each is a weighted mean of pixels."""
    error = output - pixels
    edges = (weight[:, :, 1:] * error.diff(dim=2).abs()).mean() + (weight[..., 1:] * error.diff(dim=3).abs()).mean()
    return (weight * (error.abs() + 2 * error.square())).mean() + edges


class AutoencoderTask:
    """The VAE's training on composed scenes: reconstruction, of objects above all, and a little KL that keeps the latents near N(0, 1).

    In every second step, latents and target are both shrunk before the latents are decoded (EQ-VAE), to 1/2 and 3/4 in turn.
    """

    def __init__(self, config: ModelConfig, recipe: Recipe, scenes: Scenes, device: torch.device, init: VAE | None = None):
        self.recipe, self.device = recipe, device
        self.images = torch.from_numpy(scenes.images).to(device)  # as bytes: on a GPU no step waits for pictures
        self.weight = (0.4 + recipe.object_weight * scenes.mask).to(device)
        with with_seed(recipe.seed):
            self.vae = VAE(config.vae).to(device)
        if init is not None:
            self.vae.load_state_dict(init.state_dict())
        self.modules: dict[str, nn.Module] = {"vae": self.vae}
        self.networks = (self.vae.encoder, self.vae.decoder)
        shape = config.vae.latent_channels, *scenes.mask.shape[2:]
        self.draws = prefetch(partial(autoencoder_draws, recipe.seed, len(scenes.images), shape), device)

    def optimizers(self, settings: Settings) -> tuple[torch.optim.Optimizer, ...]:
        """Create the optimizers of the VAE's weights."""
        return optimizers([self.vae], settings.learning_rate)

    def loss(self, step: int, sample_ids: range) -> Float[Tensor, ""]:
        """Return the reconstruction loss plus kl_weight times the KL divergence, every other step with resized latents (EQ-VAE)."""
        chosen, noise = (to_device(self.device, part) for part in self.draws(step, sample_ids))
        pixels = to_pixels(self.images[chosen])
        posterior = self.vae.encode(pixels)
        z, target = posterior.mean + (0.5 * posterior.logvar).exp() * noise, pixels
        if step % 2 == 1:
            cells, side = z.shape[-1], z.shape[-1] // 2 if step % 4 == 1 else 3 * z.shape[-1] // 4
            z, target = resize(z.float(), side), resize(pixels, side * pixels.shape[-1] // cells)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        weight = F.interpolate(self.weight[chosen], size=target.shape[-2:])
        return reconstruction_loss(self.vae.decode(z).float(), target, weight) + self.recipe.kl_weight * kl


def autoencoder_draws(
    seed: int, count: int, shape: tuple[int, ...], step: int, sample_ids: range
) -> tuple[Int[Tensor, " B"], Float[Tensor, "B C h w"]]:
    """Draw which of `count` pictures each sample is, and the noise of its latent.

    Args:
        seed: Of the run.
        count: Number of pictures.
        shape: (C, h, w) of a latent.
        step: Number of the step.
        sample_ids: Numbers of its samples.
    """
    rngs = [rng_for(seed, step, sample) for sample in sample_ids]
    return torch.tensor([int(rng.integers(count)) for rng in rngs]), randn_per_sample(rngs, shape)


def resize(x: Float[Tensor, "B C H W"], side: int) -> Float[Tensor, "B C side side"]:
    """Resize with bicubic interpolation, antialiased."""
    return F.interpolate(x, size=(side, side), mode="bicubic", antialias=True, align_corners=False)


@dataclass(frozen=True)
class Latents:
    """Encoded scenes. mean: unscaled mean of the posterior. tokens: of the captions. mask: as in Scenes."""

    mean: Float[Tensor, "N C h w"]
    tokens: Int[Tensor, "N L"]
    mask: Float[Tensor, "N 1 h w"]

    def scaling_factor(self) -> float:
        """Return 1 / standard deviation over all latents, which brings them to unit variance (Rombach et al. 2022, appendix G)."""
        return float(1 / self.mean.double().std())


def encode_scenes(
    images: UInt8[np.ndarray, "N H W 3"], vae: VAE, device: torch.device, chunk: int = 100
) -> Iterator[Float[Tensor, "n C h w"]]:
    """Yield unscaled means of latents, on the CPU, in float32 whatever precision the training used.

    Args:
        images: RGB pictures, 0..255.
        vae: The encoder is used.
        device: Where the VAE is.
        chunk: Pictures per iteration.
    """
    for start in range(0, len(images), chunk):
        with torch.no_grad():
            mean = vae.encode(to_pixels(torch.from_numpy(images[start : start + chunk]).to(device))).mean.cpu()
        yield mean


class DiffusionTask:
    """The training of text encoder and U-Net together, to predict v (or eps) from x_t and the caption (Rombach et al. 2022, eq. 3)."""

    def __init__(self, config: ModelConfig, recipe: Recipe, latents: Latents, device: torch.device, init: StableDiffusion | None = None):
        self.config, self.recipe, self.device = config, recipe, device
        self.schedule = NoiseSchedule(config.schedule)
        self.empty = Tokenizer(config.tokenizer)([""]).to(device)
        # All of them on the device: on a GPU no step waits for data.
        self.x_0 = (latents.mean * config.vae.scaling_factor).to(device)
        self.tokens = latents.tokens.to(device)
        self.weight = (0.4 + recipe.object_weight * latents.mask).to(device)
        with with_seed(recipe.seed):
            self.text_encoder = initialise(TextEncoder(config.text_encoder)).to(device)
            self.unet = initialise(UNet(config.unet)).to(device)
        if init is not None:
            self.text_encoder.load_state_dict(init.text_encoder.state_dict())
            self.unet.load_state_dict(init.unet.state_dict())
        self.modules: dict[str, nn.Module] = {"text_encoder": self.text_encoder, "unet": self.unet}
        self.draws = prefetch(partial(diffusion_draws, recipe, config.schedule.timesteps, tuple(self.x_0.shape)), device)

    def optimizers(self, settings: Settings) -> tuple[torch.optim.Optimizer, ...]:
        """Create the optimizers of the text encoder's and the U-Net's weights."""
        return optimizers(self.modules.values(), settings.learning_rate)

    def loss(self, step: int, sample_ids: range) -> Float[Tensor, ""]:
        """Return the mean squared error of the prediction; an object's cells count more than the background's."""
        chosen, dropped, t, eps = (to_device(self.device, part) for part in self.draws(step, sample_ids))
        context = self.text_encoder(torch.where(dropped[:, None], self.empty, self.tokens[chosen]))
        error = squared_error(self.unet, self.schedule, self.x_0[chosen], context, NoiseSample(t, eps))
        weight = self.weight[chosen]
        if self.recipe.min_snr is not None:
            weight = weight * min_snr_weight(self.schedule, t, self.recipe.min_snr)[:, None, None, None]
        return (weight * error).mean()


def diffusion_draws(
    recipe: Recipe, timesteps: int, shape: tuple[int, ...], step: int, sample_ids: range
) -> tuple[Int[Tensor, " B"], Bool[Tensor, " B"], Int[Tensor, " B"], Float[Tensor, "B C h w"]]:
    """Draw each sample's latent, whether its caption is left empty, t, and eps.

    Args:
        recipe: For seed and caption dropout.
        timesteps: Of the schedule.
        shape: (N, C, h, w) of all latents.
        step: Number of the step.
        sample_ids: Numbers of its samples.
    """
    rngs = [rng_for(recipe.seed, step, sample) for sample in sample_ids]
    chosen = torch.tensor([int(rng.integers(shape[0])) for rng in rngs])
    dropped = torch.tensor([rng.random() < recipe.caption_dropout for rng in rngs])
    return chosen, dropped, sample_timesteps(rngs, timesteps), randn_per_sample(rngs, shape[1:])


def sample_timesteps(rngs: Sequence[np.random.Generator], timesteps: int) -> Int[Tensor, " B"]:
    """Draw timesteps: four in five from sigmoid(N(0.5, 1)), which favours the noisier half where the words decide; one in five uniform."""
    shares = [1 / (1 + np.exp(-0.5 - rng.standard_normal())) if rng.random() < 0.8 else rng.random() for rng in rngs]
    return torch.tensor([min(int(share * timesteps), timesteps - 1) for share in shares])


Part = TypeVar("Part", bound=nn.Module)


def initialise(module: Part) -> Part:
    """Initialise a module: embeddings large enough to be distinct from the first step, every residual branch close to 0."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.1 if name.startswith("position") else 0.5)
        elif name.endswith(("to_out", "conv_2", "proj_out", "linear_2")) and "time_embedding" not in name:
            assert isinstance(part, nn.Linear | nn.Conv2d) and part.bias is not None
            nn.init.normal_(part.weight, std=1e-3)
            nn.init.zeros_(part.bias)
    return module
