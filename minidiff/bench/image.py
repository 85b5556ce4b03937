"""Measure how long a whole picture takes, from the prompt to pixels: `minidiff bench image`.

    random weights -> each library's pipeline, in a process of its own -> the same prompt and noise -> text, N steps of DDIM, decoder

Errors are those of the picture against the one in float32, relative to its root mean square; memory is what the process takes from loading
the weights to the picture.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from minidiff.bench.common import BenchRecord, check_arguments, model_config
from minidiff.bench.contender import serve
from minidiff.bench.pipelines import diffusers_pipeline, make_model_jobs, minidiff_model, start_worker, with_backend
from minidiff.bench.race import RaceRules, race_models
from minidiff.bench.worker_protocol import answer_with
from minidiff.config import ModelConfig

PROMPT = "a photo of a cat on a blue background"
GUIDANCE = 7.5


def bench_image(
    against: bool = True,
    out: Path | None = None,
    rounds: int | None = None,
    model: str | ModelConfig = "sd1",
    size: int | None = None,
    steps: int | None = None,
    device: str = "cpu",
    max_autotune: bool = False,
    rules: RaceRules = RaceRules(),
) -> Iterator[str]:
    """Measure, and yield the lines of a Markdown table. On a CPU our float32 is left out: it takes as long as diffusers'.

    Raises ValueError for unknown names and if diffusers is missing.

    Args:
        against: Race diffusers as well.
        out: A .json file for every number.
        rounds: By default 2 on a CPU, 5 on a GPU.
        model: A name of `model_config`, or a config.
        size: Pixels a side; None is the model's own.
        steps: Of DDIM; by default 4 on a CPU, 50 on a GPU.
        device: Of all contenders.
        max_autotune: Race diffusers compiled with max-autotune too.
        rules: Who takes part, on which weights, how long.
    """
    on_cpu = torch.device(device).type == "cpu"
    rounds = (2 if on_cpu else 5) if rounds is None else rounds
    steps = (4 if on_cpu else 50) if steps is None else steps
    check_arguments(rounds, out, against)
    if steps < 1:
        raise ValueError(f"steps {steps}: give 1 or more")
    config = model_config(model)
    size = size or config.image_size
    jobs = {name: job | {"size": size, "steps": steps} for name, job in make_model_jobs(device, against, max_autotune).items()}
    if on_cpu and against and "minidiff float32" not in rules.contenders:
        del jobs["minidiff float32"]
    jobs = rules.choose(jobs)
    record = BenchRecord(out, {"bench": "image", "model": str(config), "size": size, "steps": steps, "rounds": rounds, "device": device})
    part = f"A picture of {size} x {size} in {steps} steps\n", "", jobs
    yield from race_models(__name__, [part], config, lambda folder: None, record, rules)


# ------------------------------------------------------------------------------------------------------ the contenders


def prepare(job: dict) -> Callable[[dict], dict]:
    """Load the pipeline in the contender's process."""
    peak, device, dtype = start_worker(job)
    run = {"diffusers": _diffusers, "minidiff": _minidiff}[job["library"]](job, device, dtype)
    return with_backend(job, answer_with(run, peak))


def _diffusers(job: dict, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Draw with diffusers, from our noise: both libraries draw it on the CPU, but in different shapes."""
    from diffusers import DDIMScheduler  # pyright: ignore[reportPrivateImportUsage]

    from minidiff.pipeline import noise_source

    pipe = diffusers_pipeline(job, device, dtype)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    cells = job["size"] // pipe.vae_scale_factor
    noise = noise_source([0], (pipe.unet.config.in_channels, cells, cells), device)().to(dtype)

    def run() -> Tensor:
        return pipe(
            PROMPT,
            num_inference_steps=job["steps"],
            guidance_scale=GUIDANCE,
            latents=noise,
            height=job["size"],
            width=job["size"],
            output_type="pt",
        ).images

    return run


def _minidiff(job: dict, device: torch.device, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Draw with our pipeline."""
    sd = minidiff_model(job, device, dtype)

    def run() -> Tensor:
        *_, last = sd.denoise(PROMPT, steps=job["steps"], guidance_scale=GUIDANCE, seeds=[0], size=job["size"])
        return (sd.decode(last.x_t) + 1) / 2  # diffusers' pixels are in 0..1

    return run


if __name__ == "__main__":
    serve(prepare)
