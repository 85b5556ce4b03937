"""A small Stable Diffusion from nothing: the VAE, then the text encoder and the U-Net together on its latents.

    scenes -> AutoencoderTraining -> latents made ahead -> DiffusionTraining -> modules with averaged weights

The order and the losses are those of latent diffusion (Rombach et al. 2022), smaller, with what helps at this size: the loss of an
object's cells counts more than the background's, late timesteps are drawn more often, and the schedule ends in pure noise
(Lin et al. 2023). What a step sees depends on the seed and the step's number alone, so a run that is stopped and taken up again
from `state_dict` makes the very same weights.

Left out: the adversarial and perceptual losses of the original's VAE.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from minidiff.config import ModelConfig, ScheduleConfig, TextEncoderConfig, TokenizerConfig, UNetConfig, VAEConfig
from minidiff.pipeline import StableDiffusion
from minidiff.scenes.scenes import bpe_merges, sample_scene
from minidiff.schedule import NoiseSchedule
from minidiff.text_encoder import TextEncoder
from minidiff.tokenizer import Tokenizer
from minidiff.trainers.recipe import Recipe
from minidiff.trainers.optimizer import ExponentialAverage, learning_rate, optimizers
from minidiff.unet import UNet
from minidiff.vae import VAE

WITHOUT_MERGES = 512 + 2  # vocabulary: the bytes, alone and at a word's end, and the start and end tokens; each merge adds one
CONTEXT_LENGTH = 32  # the longest caption of a scene has 20 tokens


def bundled_config() -> ModelConfig:
    """The bundled model's numbers: Stable Diffusion's shape for 64 x 64 pictures, 16 x 16 latents."""
    merges = bpe_merges()
    return ModelConfig(
        tokenizer=TokenizerConfig(merges=merges, context_length=CONTEXT_LENGTH),
        text_encoder=TextEncoderConfig(WITHOUT_MERGES + len(merges), CONTEXT_LENGTH, width=128, layers=3, heads=4),
        unet=UNetConfig(widths=(64, 128, 160), blocks_per_level=1, attention=(True, True, False), heads=(2, 4, 5), context_width=128),
        vae=VAEConfig(widths=(24, 48, 96), blocks_per_level=1, groups=8),
        schedule=ScheduleConfig(prediction="v", zero_terminal_snr=True, spacing="trailing"),
        image_size=64,
        guidance_scale=4.0,
    )


@dataclass(frozen=True)
class TrainStep:
    """One step done: its number from 1, of how many, and its loss."""

    i: int
    steps: int
    loss: float


def pixels_of(images: UInt8[np.ndarray, "B H W 3"]) -> Float[Tensor, "B 3 H W"]:
    """Pictures of bytes as floats in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def reconstruction_loss(output: Float[Tensor, "B 3 H W"], pixels: Float[Tensor, "B 3 H W"]) -> Float[Tensor, ""]:
    """L1 + 2 MSE + L1 of the differences between neighbours, which keeps edges sharp."""
    error = output - pixels
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return error.abs().mean() + 2 * error.square().mean() + edges


class AutoencoderTraining:
    """Trains the VAE on composed scenes: reconstruction, and a little KL that keeps the latents near N(0, 1)."""

    def __init__(self, config: ModelConfig, recipe: Recipe, device: torch.device):
        self.config, self.recipe, self.device, self.i = config, recipe, device, 0
        with seeded(recipe.seed):
            self.vae = VAE(config.vae).to(device)
        self.optimizers = optimizers([self.vae], recipe.vae_learning_rate)
        self.average = ExponentialAverage(self.vae, recipe.average)

    def run(self) -> Iterator[TrainStep]:
        """Takes the steps that are left, one an iteration."""
        recipe = self.recipe
        while self.i < recipe.vae_steps:
            rng = np.random.default_rng([recipe.seed, 0, self.i])
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            pixels = pixels_of(np.stack([sample_scene(rng).image for _ in range(recipe.vae_batch)])).to(self.device)
            with mixed_precision(self.device):
                posterior = self.vae.encode(pixels)
                output = self.vae.decode(posterior.sample(generator))
            loss = reconstruction_loss(output.float(), pixels)
            kl = posterior.kl().mean() / posterior.mean[0].numel()
            rate = learning_rate(self.i, recipe.vae_steps, recipe.vae_learning_rate)
            take_step(loss + recipe.kl_weight * kl, self.optimizers, rate)
            self.average.update(self.vae)
            self.i += 1
            yield TrainStep(self.i, recipe.vae_steps, loss.item())

    def result(self) -> VAE:
        """A VAE with the averaged weights."""
        return averaged(self.vae, self.average)

    def state_dict(self) -> dict:
        return training_state(self, {"vae": self.vae}, {"vae": self.average})

    def load_state_dict(self, state: dict):
        load_training_state(self, state, {"vae": self.vae}, {"vae": self.average})


@dataclass(frozen=True)
class Latents:
    """Scenes made ahead. mean: unscaled means of the posterior; tokens of their captions; mask: share of object in a latent cell, 0..1."""

    mean: Float[Tensor, "N C h w"]
    tokens: Tensor
    mask: Float[Tensor, "N 1 h w"]

    def scaling_factor(self) -> float:
        """1 / standard deviation over all latents, which brings them to unit variance (Rombach et al. 2022, appendix G)."""
        return float(1 / self.mean.double().std())


def make_latents(recipe: Recipe, vae: VAE, tokenizer: Tokenizer, device: torch.device, chunk: int = 100) -> Iterator[Latents]:
    """The recipe's scenes through the encoder, `chunk` an iteration; in float32, whatever the training ran in."""
    for start in range(0, recipe.scenes, chunk):
        rng = np.random.default_rng([recipe.seed, 1, start])
        scenes = [sample_scene(rng) for _ in range(min(chunk, recipe.scenes - start))]
        pixels = pixels_of(np.stack([scene.image for scene in scenes])).to(device)
        with torch.no_grad():
            mean = vae.encode(pixels).mean.cpu()
        masks = torch.from_numpy(np.stack([scene.mask for scene in scenes])).float()[:, None]
        cells = F.avg_pool2d(masks, vae.config.factor)
        yield Latents(mean, tokenizer([scene.caption for scene in scenes]), cells)


def joined(parts: list[Latents]) -> Latents:
    return Latents(*(torch.cat([getattr(part, name) for part in parts]) for name in ("mean", "tokens", "mask")))


class DiffusionTraining:
    """Trains text encoder and U-Net together to predict v (or eps) from x_t and the caption (Rombach et al. 2022, eq. 3)."""

    def __init__(self, config: ModelConfig, recipe: Recipe, latents: Latents, device: torch.device, init: StableDiffusion | None = None):
        self.config, self.recipe, self.latents, self.device, self.i = config, recipe, latents, device, 0
        self.schedule = NoiseSchedule(config.schedule)
        self.empty = Tokenizer(config.tokenizer)([""])
        with seeded(recipe.seed):
            self.text_encoder = initialised(TextEncoder(config.text_encoder)).to(device)
            self.unet = initialised(UNet(config.unet)).to(device)
        if init is not None:
            self.text_encoder.load_state_dict(init.text_encoder.state_dict())
            self.unet.load_state_dict(init.unet.state_dict())
        self.optimizers = optimizers([self.text_encoder, self.unet], recipe.learning_rate)
        self.averages = {name: ExponentialAverage(module, recipe.average) for name, module in self._modules().items()}

    def _modules(self) -> dict[str, nn.Module]:
        return {"text_encoder": self.text_encoder, "unet": self.unet}

    def run(self) -> Iterator[TrainStep]:
        """Takes the steps that are left, one an iteration."""
        while self.i < self.recipe.steps:
            loss = self._loss(np.random.default_rng([self.recipe.seed, 2, self.i]))
            take_step(loss, self.optimizers, learning_rate(self.i, self.recipe.steps, self.recipe.learning_rate))
            for name, module in self._modules().items():
                self.averages[name].update(module)
            self.i += 1
            yield TrainStep(self.i, self.recipe.steps, loss.item())

    def _loss(self, rng: np.random.Generator) -> Float[Tensor, ""]:
        recipe, device = self.recipe, self.device
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        chosen = torch.from_numpy(rng.integers(len(self.latents.mean), size=recipe.batch))
        x_0 = (self.latents.mean[chosen] * self.config.vae.scaling_factor).to(device)
        tokens = self.latents.tokens[chosen].clone()
        tokens[torch.rand(recipe.batch, generator=generator) < recipe.caption_dropout] = self.empty
        t = sample_timesteps(recipe.batch, self.config.schedule.timesteps, generator).to(device)
        eps = torch.randn(x_0.shape, generator=generator).to(device)
        with mixed_precision(device):
            prediction = self.unet(self.schedule.q_sample(x_0, t, eps), t, self.text_encoder(tokens.to(device)))
        error = (prediction.float() - self.schedule.target(x_0, t, eps)).square()
        weight = 0.4 + recipe.object_weight * self.latents.mask[chosen].to(device)
        return (weight * error).mean()

    def result(self) -> tuple[TextEncoder, UNet]:
        """Text encoder and U-Net with the averaged weights."""
        return averaged(self.text_encoder, self.averages["text_encoder"]), averaged(self.unet, self.averages["unet"])

    def state_dict(self) -> dict:
        return training_state(self, self._modules(), self.averages)

    def load_state_dict(self, state: dict):
        load_training_state(self, state, self._modules(), self.averages)


def sample_timesteps(count: int, timesteps: int, generator: torch.Generator) -> Tensor:
    """Four in five from sigmoid(N(0.5, 1)), which favours the later, noisier half where the words decide; one in five uniform."""
    uniform = torch.rand(count, generator=generator)
    late = torch.sigmoid(torch.randn(count, generator=generator) + 0.5)
    share = torch.where(torch.rand(count, generator=generator) < 0.8, late, uniform)
    return (share * timesteps).long().clamp(max=timesteps - 1)


def initialised(module: nn.Module) -> nn.Module:
    """Embeddings large enough to be told apart from the first step, and every residual branch close to 0 at the start."""
    for name, part in module.named_modules():
        if isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=0.1 if name.startswith("position") else 0.5)
        elif name.endswith(("to_out", "conv_2", "proj_out", "linear_2")) and "time_embedding" not in name:
            nn.init.normal_(part.weight, std=1e-3)
            nn.init.zeros_(part.bias)
    return module


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """PyTorch's initialisers draw from the global generator: seed it for them, and give it back as it was."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        yield


def mixed_precision(device: torch.device) -> torch.autocast:
    """bfloat16 for the matrix products and convolutions; weights, their averages and the loss stay in float32."""
    return torch.autocast(device.type, torch.bfloat16)


def take_step(loss: Float[Tensor, ""], optimizers: tuple[torch.optim.Optimizer, ...], rate: float):
    loss.backward()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def averaged(module: nn.Module, average: ExponentialAverage) -> nn.Module:
    """A copy of the module, with the averaged weights."""
    module = copy.deepcopy(module)
    module.load_state_dict(average.mean)
    return module.eval()


def training_state(training, modules: dict[str, nn.Module], averages: dict[str, ExponentialAverage]) -> dict:
    """All that a run needs to go on: tensors, numbers, lists and dicts only, so that it can be read back without running code."""
    return {
        "i": training.i,
        "modules": {name: module.state_dict() for name, module in modules.items()},
        "optimizers": [optimizer.state_dict() for optimizer in training.optimizers],
        "averages": {name: average.state_dict() for name, average in averages.items()},
    }


def load_training_state(training, state: dict, modules: dict[str, nn.Module], averages: dict[str, ExponentialAverage]):
    training.i = state["i"]
    for name, module in modules.items():
        module.load_state_dict(state["modules"][name])
        averages[name].load_state_dict(state["averages"][name])
    for optimizer, saved in zip(training.optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
