"""A training run in a folder: its stages one after the other, states to go on from, pictures to look at.

    folder/recipe.json        what is being made; a second run in the folder must ask for the same
    folder/vae.pt             state of the autoencoder's training
    folder/latents.pt         the scenes, encoded
    folder/diffusion.pt       state of the text encoder's and the U-Net's
    folder/samples-*.png      what the averaged weights make of eight fixed prompts
"""

import copy
import dataclasses
import json
import os
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from minidiff.config import ModelConfig
from minidiff.pipeline import StableDiffusion, to_images
from minidiff.scenes.scenes import SIZE, prompts
from minidiff.tokenizer import Tokenizer
from minidiff.trainers.from_scratch import AutoencoderTraining, DiffusionTraining, Latents, joined, make_latents
from minidiff.trainers.recipe import Recipe
from minidiff.vae import VAE
from minidiff.viz import grid, save_png

STATE_EVERY = 100  # steps
SAMPLES_EVERY = 500


@dataclass(frozen=True)
class Progress:
    """Step i of `steps` of a stage; loss is None where a stage has none."""

    stage: str
    i: int
    steps: int
    loss: float | None = None


def run_from_scratch(
    config: ModelConfig,
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    save: Callable[[StableDiffusion], None],
    init: StableDiffusion | None = None,
) -> Iterator[Progress]:
    """Trains a model in `folder`, or goes on with what stands there; at the end calls `save` with it.

    init: a model to train on from: its VAE is kept, its text encoder and U-Net go on learning. It must have `config`'s shape.
    Raises ValueError if the folder holds a run of another recipe.
    """
    claim(folder, config, recipe, init)
    if init is None:
        vae = yield from train_vae(config, recipe, folder, device)
    else:
        vae = copy.deepcopy(init.vae).to(device).float()
    latents = yield from encode_scenes(config, recipe, folder, vae, device)
    if init is None:
        config = dataclasses.replace(config, vae=dataclasses.replace(config.vae, scaling_factor=latents.scaling_factor()))
    training = DiffusionTraining(config, recipe, latents, device, init)
    for step in resumable(training, folder / "diffusion.pt"):
        yield Progress("diffusion", step.i, step.steps, step.loss)
        if step.i % SAMPLES_EVERY == 0 or step.i == step.steps:
            save_samples(assembled(config, training, vae), folder / f"samples-{step.i:06d}.png")
    save(assembled(config, training, vae))


def train_vae(config: ModelConfig, recipe: Recipe, folder: Path, device: torch.device) -> Iterator[Progress]:
    training = AutoencoderTraining(config, recipe, device)
    for step in resumable(training, folder / "vae.pt"):
        yield Progress("autoencoder", step.i, step.steps, step.loss)
    return training.result()


def encode_scenes(config: ModelConfig, recipe: Recipe, folder: Path, vae: VAE, device: torch.device) -> Iterator[Progress]:
    path = folder / "latents.pt"
    if path.exists():
        return Latents(**torch.load(path, weights_only=True))
    parts = []
    for part in make_latents(recipe, vae, Tokenizer(config.tokenizer), device):
        parts.append(part)
        yield Progress("latents", sum(len(p.mean) for p in parts), recipe.scenes)
    latents = joined(parts)
    write_state(path, dataclasses.asdict(latents))
    return latents


def resumable(training: AutoencoderTraining | DiffusionTraining, path: Path) -> Iterator:
    """The training's steps, from where its state file stands; the state is written as it goes."""
    if path.exists():
        training.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    for step in training.run():
        if step.i % STATE_EVERY == 0 or step.i == step.steps:
            write_state(path, training.state_dict())
        yield step


def assembled(config: ModelConfig, training: DiffusionTraining, vae: VAE) -> StableDiffusion:
    text_encoder, unet = training.result()
    return StableDiffusion(config, text_encoder, unet, vae, Tokenizer(config.tokenizer))


def save_samples(sd: StableDiffusion, path: Path) -> None:
    """Eight of the fixed prompts, the same noise every time."""
    *_, last = sd.denoise([prompt.text for prompt in prompts()[:8]], seeds=range(8), steps=20)
    save_png(grid(to_images(sd.decode(last.x_t)), columns=4), path)


def claim(folder: Path, config: ModelConfig, recipe: Recipe, init: StableDiffusion | None) -> None:
    """Makes the folder, or makes sure that what stands in it is the same run."""
    if init is not None and init.config != config:
        raise ValueError("the model to train on from has another configuration than the one asked for")
    if config.image_size != SIZE or config.unet.in_channels != config.vae.latent_channels:
        raise ValueError(
            f"a model for {config.image_size} pixels with {config.unet.in_channels} U-Net channels cannot be trained on the scenes, which "
            f"have {SIZE} pixels; give one of the bundled model's shape"
        )
    asked = json.loads(json.dumps({**dataclasses.asdict(recipe), "init": init is not None and checksum(init)}))
    path = folder / "recipe.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asked, indent=1))
    found = json.loads(path.read_text())
    different = [f"{name} {found.get(name)!r}, now {value!r}" for name, value in asked.items() if found.get(name) != value]
    if different:
        raise ValueError(f"{folder} holds another run ({'; '.join(different)}); choose another folder, or ask for the same")


def checksum(sd: StableDiffusion) -> int:
    """CRC-32 of the weights as bytes, to know a model again."""
    crc = 0
    for module in (sd.text_encoder, sd.unet, sd.vae):
        for p in module.parameters():
            crc = zlib.crc32(p.detach().cpu().contiguous().flatten().view(torch.uint8).numpy(), crc)
    return crc


def write_state(path: Path, state: dict) -> None:
    """Whole or not at all: a run that is killed while it writes finds the last state."""
    temporary = path.with_name(path.name + ".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)
