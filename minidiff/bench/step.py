"""How long the U-Net takes for a step of one picture with guidance: `minidiff bench step`.

    made-up weights -> each library's model, in a process of its own -> the same x_t, t and contexts -> guided prediction

What is compared is the guided prediction: the U-Net on the batch of two, and the sum of its halves. The text is encoded before, and a step
is one of many: what a library works out once a picture is not counted (`bench image` counts it).
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from minidiff.bench.answers import answers
from minidiff.bench.common import Record, check, in_a_line, model_config
from minidiff.bench.contender import serve
from minidiff.bench.race import race
from minidiff.bench.whole import diffusers_pipeline, minidiff_model, model_folder, model_jobs, started
from minidiff.config import ModelConfig

T = 501  # of the step
GUIDANCE = 7.5


def bench(
    against: bool = True,
    out: Path | None = None,
    rounds: int | None = None,
    model: str | ModelConfig = "sd1",
    size: int | None = None,
    device: str = "cpu",
    max_autotune: bool = False,
) -> Iterator[str]:
    """Measure, and yield the lines of a Markdown table. size: pixels; None is the model's own. rounds: 3 on a CPU, 10 on a GPU by default.

    Raises ValueError for what is unknown, and where diffusers is not there.
    """
    rounds = (3 if torch.device(device).type == "cpu" else 10) if rounds is None else rounds
    check(rounds, out, against)
    config = model_config(model) if isinstance(model, str) else model
    size = size or config.image_size
    jobs = model_jobs(device, against, max_autotune)
    record = Record(out, {"bench": "step", "model": str(config), "size": size, "rounds": rounds, "device": device})
    yield in_a_line(record.values["machine"])
    yield f"One step of {size} x {size} with guidance\n"
    with model_folder(config) as folder:
        torch.save(inputs(config, size), folder / "inputs.pt")
        yield from race(__name__, {name: job | {"folder": str(folder)} for name, job in jobs.items()}, rounds, record)
    record.finish()


def inputs(config: ModelConfig, size: int) -> dict[str, Tensor]:
    """A latent of one picture at timestep T, and the contexts of an empty prompt and of one."""
    generator = torch.Generator().manual_seed(0)
    cells, text = size // config.vae.factor, config.text_encoder
    x_t = torch.randn(1, config.unet.in_channels, cells, cells, generator=generator)
    uncond, cond = torch.randn(2, 1, text.context_length, text.width, generator=generator)
    return {"x_t": x_t, "uncond": uncond, "cond": cond}


# ------------------------------------------------------------------------------------------------------ the contenders


def prepare(job: dict) -> Callable[[dict], dict]:
    """In the contender's process: the model and its inputs."""
    peak, device, dtype = started(job)
    given = {name: x.to(device, dtype) for name, x in torch.load(f"{job['folder']}/inputs.pt").items()}
    make = {"diffusers": _diffusers, "minidiff": _minidiff}[job["library"]]
    run = make(job, device, dtype, given)

    def without_gradients() -> Tensor:
        with torch.inference_mode() if job["library"] == "diffusers" else torch.no_grad():
            return run()

    return answers(without_gradients, peak)


def _diffusers(job: dict, device: torch.device, dtype: torch.dtype, given: dict[str, Tensor]) -> Callable[[], Tensor]:
    """As StableDiffusionPipeline does a step, without its scheduler."""
    unet = diffusers_pipeline(job, device, dtype).unet
    context, t = torch.cat([given["uncond"], given["cond"]]), torch.tensor(T, device=device)

    def run() -> Tensor:
        uncond, cond = unet(torch.cat([given["x_t"]] * 2), t, encoder_hidden_states=context, return_dict=False)[0].chunk(2)
        return uncond + GUIDANCE * (cond - uncond)

    return run


def _minidiff(job: dict, device: torch.device, dtype: torch.dtype, given: dict[str, Tensor]) -> Callable[[], Tensor]:
    """As the pipeline does it."""
    from minidiff.conditioning import Conditioning
    from minidiff.guidance import guided
    from minidiff.pipeline import channels_last

    sd, t = minidiff_model(job, device, dtype), torch.tensor([T], device=device)
    channels_last(sd.unet)
    model = guided(sd.predict, Conditioning(given["cond"]), Conditioning(given["uncond"]), GUIDANCE, shared_prefix=True)
    return lambda: model(given["x_t"], t)


if __name__ == "__main__":
    serve(prepare)
