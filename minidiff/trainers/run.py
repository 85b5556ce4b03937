"""A training run in a folder: its stages one after the other, states to go on from, pictures to look at.

    folder/recipe.json        what is being made; a second run in the folder must ask for the same
    folder/vae.pt             state of the autoencoder's training
    folder/latents.pt         the scenes, encoded
    folder/diffusion.pt       state of the text encoder's and the U-Net's
    folder/*.csv *-loss.png   the losses of both, as numbers and as curves
    folder/samples-*.png      what the averaged weights make of eight fixed prompts
"""

import copy
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.config import ModelConfig
from minidiff.pipeline import StableDiffusion, to_images
from minidiff.scenes.scenes import SIZE, prompts
from minidiff.tokenizer import Tokenizer
from minidiff.trainers import processes
from minidiff.trainers.from_scratch import AutoencoderTask, DiffusionTask, Latents, Scenes, encoded, make_scenes
from minidiff.trainers.log import Log
from minidiff.trainers.loop import Task, Training, train
from minidiff.trainers.recipe import Recipe, Settings
from minidiff.trainers.state import check_same, checksum, read_state, write_state, write_text
from minidiff.vae import VAE
from minidiff.viz import grid, save_png

SAMPLES_EVERY = 500  # steps


@dataclass(frozen=True)
class Progress:
    """Step i of `steps` of a stage; loss is None where a stage has none. text: loss, memory and time left, in words."""

    stage: str
    i: int
    steps: int
    loss: Float[Tensor, ""] | None = None
    text: str = ""


def run_from_scratch(
    config: ModelConfig,
    recipe: Recipe,
    folder: Path,
    device: torch.device,
    save: Callable[[StableDiffusion, str], None],
    init: StableDiffusion | None = None,
    vae: VAE | None = None,
) -> Iterator[Progress]:
    """Trains a model in `folder`, or goes on with what stands there; at the end calls `save` with it, as "model", and with the one of the
    slower average, if there is one, as "model-slow".

    init: a model to train on from: its VAE is kept, its text encoder and U-Net go on learning. It must have `config`'s shape.
    vae: one to take as it is, of `config`'s shape and scaling factor, for a text encoder and a U-Net from nothing.
    With the recipe's train_vae the VAE of either is trained on first, and has a scaling factor of its own in the end.
    Of several processes all train, and the first alone writes and calls `save`. Raises ValueError if the folder holds a run of another
    recipe.
    """
    claim(folder, config, recipe, init, vae)
    recipe, given = compiling_on(device, recipe), init.vae if init is not None else vae
    vae, latents = yield from vae_and_latents(config, recipe, folder, device, given)
    if given is None or recipe.train_vae:
        config = dataclasses.replace(config, vae=dataclasses.replace(config.vae, scaling_factor=latents.scaling_factor()))
    training = Training(DiffusionTask(config, recipe, latents, device, init), recipe.diffusion(), device, folder / "diffusion.pt")
    for progress in logged("diffusion", training, folder):
        yield progress
        if (progress.i % SAMPLES_EVERY == 0 or progress.i == progress.steps) and processes.number() == 0:
            save_samples(assembled(config, training, vae), folder / f"samples-{progress.i:06d}.png")
    if processes.number() == 0:
        save(assembled(config, training, vae), "model")
        if training.slow_averages:
            save(assembled(config, training, vae, slow=True), "model-slow")


def compiling_on(device: torch.device, recipe: Recipe) -> Recipe:
    """The recipe, with what it leaves to the device decided."""
    return recipe if recipe.compile is not None else dataclasses.replace(recipe, compile=device.type == "cuda" or has_amx(device))


def has_amx(device: torch.device) -> bool:
    """Return whether this is a CPU that multiplies matrices of bfloat16 in tiles."""
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()  # there is no public way to ask


def autoencoder_settings(recipe: Recipe, device: torch.device) -> Settings:
    """Return the loop's settings for the VAE, which compiling makes no faster on a CPU; it would be done for each size that is decoded."""
    settings = recipe.autoencoder()
    return dataclasses.replace(settings, compile=settings.compile and device.type != "cpu")


def foretold(
    config: ModelConfig, recipe: Recipe, device: torch.device, init: StableDiffusion | None = None, vae: VAE | None = None
) -> dict[str, float]:
    """Seconds that each stage will take on this device, from the time of its first steps; itself it takes a few."""
    scenes, composing = timed(make_scenes(dataclasses.replace(recipe, scenes=100), config))
    vae_task = AutoencoderTask(config, recipe, scenes, device)
    mean, encoding = timed(encoded(scenes.images, vae_task.vae, device))
    seconds = {"scenes": composing * recipe.scenes / 100}
    if recipe.train_vae or (init is None and vae is None):
        seconds["autoencoder"] = recipe.vae_steps * seconds_a_step(vae_task, autoencoder_settings(recipe, device), device)
    seconds["latents"] = encoding * recipe.scenes / 100
    task = DiffusionTask(config, recipe, Latents(mean, scenes.tokens, scenes.mask), device, init)
    return seconds | {"diffusion": recipe.steps * seconds_a_step(task, recipe.diffusion(), device)}


def timed(chunks: Iterator) -> tuple[Any, float]:
    """The first of the chunks, and the seconds it took."""
    start = time.monotonic()
    return next(chunks), time.monotonic() - start


def seconds_a_step(task: Task, settings: Settings, device: torch.device) -> float:
    """Of five steps, the later four, which are one round of the sizes that the VAE decodes; without compiling."""
    ends = []
    for step in train(task, dataclasses.replace(settings, steps=5, compile=False), device):
        float(step.loss)  # waits for the device
        ends.append(time.monotonic())
    return (ends[-1] - ends[0]) / 4


def vae_and_latents(
    config: ModelConfig, recipe: Recipe, folder: Path, device: torch.device, given: VAE | None
) -> Iterator[Progress]:
    """The VAE, trained or the one given, and the scenes through it."""
    path, kept = folder / "latents.pt", None if recipe.train_vae else given
    if not path.exists():
        scenes = yield from compose_scenes(config, recipe)
        if kept is None:
            task = AutoencoderTask(config, recipe, scenes, device, given)
            yield from logged("autoencoder", Training(task, autoencoder_settings(recipe, device), device, folder / "vae.pt"), folder)
        if processes.number() == 0:
            parts = []
            for part in encoded(scenes.images, finished_vae(config, folder, device, kept), device):
                parts.append(part)
                yield Progress("latents", sum(map(len, parts)), recipe.scenes)
            write_state(path, dataclasses.asdict(Latents(torch.cat(parts), scenes.tokens, scenes.mask)))
    processes.wait_for_all()
    return finished_vae(config, folder, device, kept), Latents(**read_state(path))


def finished_vae(config: ModelConfig, folder: Path, device: torch.device, kept: VAE | None) -> VAE:
    """The one kept, or the averaged weights of the one that was trained."""
    if kept is not None:
        return copy.deepcopy(kept).to(device).float()
    vae = VAE(config.vae)
    vae.load_state_dict(read_state(folder / "vae.pt")["averages"]["vae"]["mean"])
    return vae.to(device).requires_grad_(False).eval()


def compose_scenes(config: ModelConfig, recipe: Recipe) -> Iterator[Progress]:
    parts = []
    for part in make_scenes(recipe, config):
        parts.append(part)
        yield Progress("scenes", sum(len(p.images) for p in parts), recipe.scenes)
    images = np.concatenate([part.images for part in parts])
    return Scenes(images, torch.cat([part.tokens for part in parts]), torch.cat([part.mask for part in parts]))


def logged(stage: str, training: Training, folder: Path) -> Iterator[Progress]:
    """The training's steps, with their curve drawn beside the state."""
    with Log(folder, stage, training.device) as log:
        for step in training.run():
            log.add(step)
            yield Progress(stage, step.i, step.steps, step.loss, log.text())


def averaged(training: Training, name: str, slow: bool = False) -> nn.Module:
    """A copy of a module, with the averaged weights, or those of the slower average."""
    module, averages = training.task.modules[name], training.slow_averages if slow else training.averages
    with averages[name].put_in(module):
        return copy.deepcopy(module).requires_grad_(False).eval()


def assembled(config: ModelConfig, training: Training, vae: VAE, slow: bool = False) -> StableDiffusion:
    text_encoder, unet = (averaged(training, name, slow) for name in ("text_encoder", "unet"))
    return StableDiffusion(config, text_encoder, unet, vae, Tokenizer(config.tokenizer))


def save_samples(sd: StableDiffusion, path: Path) -> None:
    """Eight of the fixed prompts, the same noise every time."""
    *_, last = sd.denoise([prompt.text for prompt in prompts()[:8]], seeds=range(8), steps=20)
    save_png(grid(to_images(sd.decode(last.x_t)), columns=4), path)


def claim(folder: Path, config: ModelConfig, recipe: Recipe, init: StableDiffusion | None, vae: VAE | None) -> None:
    """Makes the folder, or makes sure that what stands in it is the same run."""
    if init is not None and init.config != config:
        raise ValueError("the model to train on from has another configuration than the one asked for")
    if init is not None and vae is not None:
        raise ValueError("a model to train on from keeps its own VAE; give one of the two, not both")
    if recipe.widths not in (None, config.unet.widths):
        raise ValueError(f"widths {recipe.widths} asked for a U-Net of {config.unet.widths}; leave them out where there is a model already")
    if config.image_size != SIZE or config.unet.in_channels != config.vae.latent_channels:
        raise ValueError(
            f"a model for {config.image_size} pixels with {config.unet.in_channels} U-Net channels cannot be trained on the scenes, which "
            f"have {SIZE} pixels; give one of the bundled model's shape"
        )
    given = {"init": init is not None and checksum(init.text_encoder, init.unet, init.vae), "vae": vae is not None and checksum(vae)}
    asked = json.loads(json.dumps({**dataclasses.asdict(recipe), **given}))
    path = folder / "recipe.json"
    if not path.exists() and processes.number() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(asked, indent=1))
    processes.wait_for_all()
    # A number that an older run does not name had its default. Whether it is compiled may change on the way.
    found = json.loads(json.dumps(dataclasses.asdict(Recipe()))) | {"vae": False} | json.loads(path.read_text())
    check_same(folder, found | {"compile": None}, asked | {"compile": None})
