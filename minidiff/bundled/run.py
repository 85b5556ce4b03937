"""Train the bundled model in a folder: its stages one after the other, states to resume from, pictures to look at.

folder/recipe.json        the recipe; a second run in the folder must ask for the same
folder/vae.pt             state of the autoencoder's training
folder/latents.pt         the scenes, encoded
folder/diffusion.pt       state of the text encoder's and the U-Net's training
folder/*.csv *-loss.png   the losses of both, as numbers and curves
folder/samples-*.png      eight fixed prompts, drawn with the EMA weights
"""

import copy
import dataclasses
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.bundled.recipe import Recipe
from minidiff.bundled.tasks import AutoencoderTask, DiffusionTask, Latents, Scenes, encode_scenes, make_scenes
from minidiff.config import ModelConfig
from minidiff.files import checksum, ensure_same_run
from minidiff.pictures import grid, save_png
from minidiff.pipeline import StableDiffusion, to_images
from minidiff.scenes.prompts import prompts
from minidiff.scenes.scenes import SIZE
from minidiff.trainers.engine import distributed
from minidiff.trainers.engine.ema import EMA
from minidiff.trainers.engine.log import Log
from minidiff.trainers.engine.loop import Task, Training, train
from minidiff.trainers.engine.settings import Settings
from minidiff.trainers.engine.state import read_state, write_state
from minidiff.two_encoders import text_side
from minidiff.vae import VAE

SAMPLES_EVERY = 500  # steps
Trained = TypeVar("Trained", bound=nn.Module)


@dataclass(frozen=True)
class StageProgress:
    """Step i of `steps` of a stage. loss: None for a stage without one. text: loss, memory and time left."""

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
    save: Callable[[StableDiffusion], None],
    init: StableDiffusion | None = None,
    vae: VAE | None = None,
) -> Generator[StageProgress, None, StableDiffusion]:
    """Train a model in `folder`, or resume what is there. All processes train; only the first writes files and calls `save`.

    The generator's return value is the model. Raises ValueError if the folder holds a run of another recipe.

    Args:
        config: Of the model.
        recipe: Its numbers.
        folder: For all files.
        device: To train on.
        save: Called with the model at the end.
        init: A model to train further, of `config`'s shape: its text encoder and U-Net are trained, its VAE if the recipe says train_vae.
        vae: One to take as it is, of `config`'s shape and scaling factor, or to train further; text encoder and U-Net are trained from
            scratch.
    """
    claim_folder(folder, config, recipe, init, vae)
    recipe, given = resolve_compile(device, recipe), init.vae if init is not None else vae
    vae, latents = yield from make_latents(config, recipe, folder, device, given)
    if given is None or recipe.train_vae:
        config = dataclasses.replace(config, vae=dataclasses.replace(config.vae, scaling_factor=latents.scaling_factor()))
    task = DiffusionTask(config, recipe, latents, device, init)
    training = Training(task, recipe.diffusion(), device, folder / "diffusion.pt")
    for progress in run_logged("diffusion", training, folder):
        yield progress
        if (progress.i % SAMPLES_EVERY == 0 or progress.i == progress.steps) and distributed.rank() == 0:
            save_samples(assemble_model(task, training, vae), folder / f"samples-{progress.i:06d}.png")
    sd = assemble_model(task, training, vae)
    if distributed.rank() == 0:
        save(sd)
    return sd


def resolve_compile(device: torch.device, recipe: Recipe) -> Recipe:
    """Return the recipe with `compile` decided by the device if the recipe leaves it open."""
    return recipe if recipe.compile is not None else dataclasses.replace(recipe, compile=device.type == "cuda" or has_amx(device))


def has_amx(device: torch.device) -> bool:
    """Return whether this is a CPU that multiplies matrices of bfloat16 in tiles."""
    return device.type == "cpu" and torch.cpu._is_amx_tile_supported()  # there is no public way to ask


def autoencoder_settings(recipe: Recipe, device: torch.device) -> Settings:
    """Return the settings of the VAE's training. On a CPU it is not compiled: that gains nothing, and is done for each size it decodes."""
    settings = recipe.autoencoder()
    return dataclasses.replace(settings, compile=settings.compile and device.type != "cpu")


def estimate_seconds(
    config: ModelConfig, recipe: Recipe, device: torch.device, init: StableDiffusion | None = None, vae: VAE | None = None
) -> dict[str, float]:
    """Estimate the seconds of each stage on this device by timing a few steps of each, which takes a few seconds itself.

    Args:
        config: Of the model.
        recipe: Its numbers.
        device: To train on.
        init: A model to train further.
        vae: One to take as it is.
    """
    scenes, composing = time_first(make_scenes(dataclasses.replace(recipe, scenes=100), config))
    vae_task = AutoencoderTask(config, recipe, scenes, device)
    mean, encoding = time_first(encode_scenes(scenes.images, vae_task.vae, device))
    seconds = {"scenes": composing * recipe.scenes / 100}
    if recipe.train_vae or (init is None and vae is None):
        seconds["autoencoder"] = recipe.vae_steps * time_step(vae_task, autoencoder_settings(recipe, device), device)
    seconds["latents"] = encoding * recipe.scenes / 100
    task = DiffusionTask(config, recipe, Latents(mean, scenes.tokens, scenes.mask), device, init)
    return seconds | {"diffusion": recipe.steps * time_step(task, recipe.diffusion(), device)}


def time_first(chunks: Iterator) -> tuple[Any, float]:
    """Return the first of the chunks, and the seconds it took."""
    start = time.monotonic()
    return next(chunks), time.monotonic() - start


def time_step(task: Task, settings: Settings, device: torch.device) -> float:
    """Return the seconds per step: the last four of five, which cover all sizes that the VAE decodes; without compiling."""
    ends = []
    for step in train(task, dataclasses.replace(settings, steps=5, compile=False), device):
        float(step.loss)  # waits for the device
        ends.append(time.monotonic())
    return (ends[-1] - ends[0]) / 4


def make_latents(
    config: ModelConfig, recipe: Recipe, folder: Path, device: torch.device, given: VAE | None
) -> Generator[StageProgress, None, tuple[VAE, Latents]]:
    """Train the VAE, unless one is to be taken as it is, and encode the scenes. The generator's return value is the VAE and the latents.

    Args:
        config: Of the model.
        recipe: Its numbers.
        folder: For all files.
        device: To train on.
        given: A VAE to take as it is, or to train further.
    """
    path, kept = folder / "latents.pt", None if recipe.train_vae else given
    if not path.exists():
        scenes = yield from compose_scenes(config, recipe)
        if kept is None:
            task = AutoencoderTask(config, recipe, scenes, device, given)
            training = Training(task, autoencoder_settings(recipe, device), device, folder / "vae.pt")
            yield from run_logged("autoencoder", training, folder)
        if distributed.rank() == 0:
            parts = []
            for part in encode_scenes(scenes.images, load_vae(config, folder, device, kept), device):
                parts.append(part)
                yield StageProgress("latents", sum(map(len, parts)), recipe.scenes)
            write_state(path, dataclasses.asdict(Latents(torch.cat(parts), scenes.tokens, scenes.mask)))
    distributed.barrier()
    return load_vae(config, folder, device, kept), Latents(**read_state(path))


def load_vae(config: ModelConfig, folder: Path, device: torch.device, kept: VAE | None) -> VAE:
    """Return the VAE that is kept, or the EMA weights of the trained one.

    Args:
        config: Of the model.
        folder: Of the run, with vae.pt.
        device: Where the VAE goes.
        kept: A VAE to copy instead; None reads the trained one.
    """
    if kept is not None:
        return copy.deepcopy(kept).to(device).float()
    vae = VAE(config.vae)
    vae.load_state_dict(read_state(folder / "vae.pt")["ema"]["vae"]["mean"])
    return vae.to(device).requires_grad_(False).eval()


def compose_scenes(config: ModelConfig, recipe: Recipe) -> Generator[StageProgress, None, Scenes]:
    """Compose the recipe's scenes. The generator's return value is all of them."""
    parts = []
    for part in make_scenes(recipe, config):
        parts.append(part)
        yield StageProgress("scenes", sum(len(p.images) for p in parts), recipe.scenes)
    images = np.concatenate([part.images for part in parts])
    return Scenes(images, torch.cat([part.tokens for part in parts]), torch.cat([part.mask for part in parts]))


def run_logged(stage: str, training: Training, folder: Path) -> Iterator[StageProgress]:
    """Take the steps of a training, and write its log and loss curve next to the state."""
    with Log(folder, stage, training.device) as log:
        for step in training.run():
            log.add(step)
            yield StageProgress(stage, step.done, step.steps, step.loss, log.text())


def copy_averaged(module: Trained, ema: EMA) -> Trained:
    """Return a copy of a trained module with its EMA weights."""
    with ema.swapped_in(module):
        return copy.deepcopy(module).requires_grad_(False).eval()


def assemble_model(task: DiffusionTask, training: Training, vae: VAE) -> StableDiffusion:
    """Return the model with the EMA weights of a training."""
    text_encoder = copy_averaged(task.text_encoder, training.ema["text_encoder"])
    unet = copy_averaged(task.unet, training.ema["unet"])
    return StableDiffusion(task.config, text_side(task.config, {"text_encoder": text_encoder}), unet, vae)


def save_samples(sd: StableDiffusion, path: Path) -> None:
    """Draw eight of the fixed prompts, from the same noise every time."""
    *_, last = sd.denoise([prompt.text for prompt in prompts()[:8]], seeds=range(8), steps=20)
    save_png(grid(to_images(sd.decode(last.x_t)), columns=4), path)


def claim_folder(folder: Path, config: ModelConfig, recipe: Recipe, init: StableDiffusion | None, vae: VAE | None) -> None:
    """Claim the folder for this run. Raises ValueError if it holds another, and for a recipe that does not fit the model.

    Args:
        folder: For all files; made if it is missing.
        config: Of the model.
        recipe: Its numbers.
        init: A model to train further.
        vae: One to take as it is.
    """
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
    if distributed.rank() == 0:
        defaults = {**dataclasses.asdict(Recipe()), "vae": False}  # an older run does not name numbers that are newer
        ensure_same_run(folder / "recipe.json", {**dataclasses.asdict(recipe), **given}, defaults=defaults, ignore=("compile",))
    distributed.barrier()
