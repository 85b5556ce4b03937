"""Take training steps of the bundled model's U-Net and text encoder in this process: the last stage of `minidiff bench gpu`.

The recipe, the loop and the precision are those of `minidiff train from-scratch`; latents and captions are random, since composing scenes
and training the VAE come before it.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from minidiff.bench.contender import serve
from minidiff.bench.pipelines import start_worker
from minidiff.bench.worker_protocol import answer_with
from minidiff.bundled.recipe import RECIPES
from minidiff.bundled.tasks import DiffusionTask, Latents, bundled_config
from minidiff.trainers.engine.loop import Training
from minidiff.trainers.engine.settings import Settings

LATENTS = 1024  # to draw batches from


def rate_jobs(device: str, batch: int | None = None) -> dict[str, dict]:
    """Return the contenders' jobs by name: the loop as it is and, on a GPU, compiled. batch: None is the recipe's."""
    job = {"library": "minidiff", "dtype": "bfloat16", "untimed": False, "device": device, "batch": batch or RECIPES["bundled"].batch}
    ways = ("eager",) if torch.device(device).type == "cpu" else ("eager", "compiled")
    return {"minidiff" if how == "eager" else f"minidiff {how}": job | {"how": how} for how in ways}


def prepare(job: dict) -> Callable[[dict], dict]:
    """Prepare a training step, and the loss to compare, in the contender's process."""
    peak, device, dtype = start_worker(job)
    recipe, config = replace(RECIPES["bundled"], batch=job["batch"], steps=10**6), bundled_config()
    settings = replace(recipe.diffusion(), compile=job["how"] == "compiled", save_every=10**6)
    task = DiffusionTask(config, recipe, random_latents(), device)
    steps = Training(task, settings, device).run()

    def loss() -> Tensor:
        with torch.no_grad():
            return first_loss(task, settings, device, dtype)

    return answer_with(lambda: next(steps).loss, peak, check=loss)


def first_loss(task: DiffusionTask, settings: Settings, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the loss of the first batch, with the weights as they are.

    Args:
        task, settings: Of the training.
        device: Where it is.
        dtype: To compute in.
    """
    with torch.autocast(device.type, dtype):
        return task.loss(0, range(settings.batch))


def random_latents() -> Latents:
    """Draw latents, captions of random words and masks, of the bundled model's shapes."""
    config, generator = bundled_config(), torch.Generator().manual_seed(0)
    cells, text = config.image_size // config.vae.factor, config.text_encoder
    mean = torch.randn(LATENTS, config.vae.latent_channels, cells, cells, generator=generator)
    tokens = torch.randint(text.vocab_size, (LATENTS, text.context_length), generator=generator)
    return Latents(mean, tokens, torch.rand(LATENTS, 1, cells, cells, generator=generator))


if __name__ == "__main__":
    serve(prepare)
