"""Measure how long the U-Net takes for a step of one picture with guidance: `minidiff bench step`.

    random weights -> each library's model, in a process of its own -> the same x_t, t and contexts -> guided prediction

The guided predictions are compared: the U-Net on a batch of two, and the sum of its halves. The text is encoded before, and the step is one
of many: what a library computes once per picture is not counted (`bench image` counts it). With a ControlNet all is measured once more; it
runs eagerly, and its hint block, which we run once per picture and diffusers at every step, is counted where the library runs it.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from minidiff.bench.common import BenchRecord, check_arguments, model_config
from minidiff.bench.contender import serve
from minidiff.bench.pipelines import diffusers_pipeline, make_step_jobs, minidiff_model, start_worker, with_backend
from minidiff.bench.race import RaceRules, race_models
from minidiff.bench.worker_protocol import answer_with
from minidiff.config import ModelConfig

T = 501  # of the step
GUIDANCE = 7.5
WITH = "with a ControlNet: "  # before the names in the record
SIZE_NUMBERS = (1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0)  # that SDXL is told


def bench_step(
    against: bool = True,
    out: Path | None = None,
    rounds: int | None = None,
    model: str | ModelConfig = "sd1",
    size: int | None = None,
    device: str = "cpu",
    max_autotune: bool = False,
    controlnet: bool = False,
    rules: RaceRules = RaceRules(),
) -> Iterator[str]:
    """Measure, and yield the lines of a Markdown table. Raises ValueError for unknown names and if diffusers is missing.

    On a CPU diffusers is raced compiled as well, and OpenVINO; where that is not installed, a line says that it is left out.

    Args:
        against: Race other libraries as well.
        out: A .json file for every number.
        rounds: By default 3 on a CPU, 10 on a GPU.
        model: A name of `model_config`, or a config.
        size: Pixels a side; None is the model's own.
        device: Of all contenders.
        max_autotune: Race diffusers compiled with max-autotune too.
        controlnet: Race all of them again, with a ControlNet.
        rules: Who takes part, on which weights, how long.
    """
    on_cpu = torch.device(device).type == "cpu"
    rounds = (3 if on_cpu else 10) if rounds is None else rounds
    check_arguments(rounds, out, against)
    config = model_config(model)
    size = size or config.image_size
    jobs = rules.choose(make_step_jobs(device, against, max_autotune))
    parts = [(f"One step of {size} x {size} with guidance\n", "", jobs)]
    settings = {"bench": "step", "model": str(config), "size": size, "rounds": rounds, "device": device}
    if controlnet:
        parts.append(("\nThe same with a ControlNet\n", WITH, {name: job | {"controlnet": True} for name, job in jobs.items()}))
        settings["controlnet"] = True
    record = BenchRecord(out, settings)

    def write_inputs(folder: Path) -> None:
        torch.save(inputs(config, size), folder / "inputs.pt")
        if controlnet:
            write_random_controlnet(config, folder)

    if against and on_cpu and find_spec("openvino") is None:
        yield "left out, openvino is not installed: openvino bfloat16\n"
    yield from race_models(__name__, parts, config, write_inputs, record, rules)
    if controlnet:
        yield from format_costs(record.results, list(jobs))


def write_random_controlnet(config: ModelConfig, folder: Path) -> None:
    """Write a ControlNet of random weights, also in its zero convolutions, as a folder of diffusers; 1.4 GB for Stable Diffusion 1.x."""
    import weights_loader
    from minidiff.controlnet import ControlNet, controlnet_config

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = ControlNet(controlnet_config(config)).requires_grad_(False)
        for conv in (*net.zero_convs, net.hint_block.conv_out):
            assert isinstance(conv, torch.nn.Conv2d)
            torch.nn.init.normal_(conv.weight, std=0.1 / conv.weight[0].numel() ** 0.5)
    sd = minidiff_model({"folder": str(folder)}, torch.device("cpu"), torch.float32)
    weights_loader.write_controlnet(folder / "controlnet", net, sd, "diffusers")


def format_costs(results: dict[str, dict], names: list[str]) -> Iterator[str]:
    """Yield one line per contender that ran both ways: how much longer a step with a ControlNet takes."""
    yield ""
    for name in names:
        plain, steered = (results.get(part + name, {}).get("rounds") for part in ("", WITH))
        if plain and steered:
            yield f"{name}: a ControlNet adds {median(steered) / median(plain) - 1:.0%} to a step"


def inputs(config: ModelConfig, size: int) -> dict[str, Tensor]:
    """Draw a latent of one picture at timestep T, and context and pooled vector, if there is one, of an empty and of another prompt."""
    generator = torch.Generator().manual_seed(0)
    cells, text = size // config.vae.factor, config.text_encoder
    x_t = torch.randn(1, config.unet.in_channels, cells, cells, generator=generator)
    uncond, cond = torch.randn(2, 1, text.context_length, config.unet.context_width, generator=generator)
    drawn = {"x_t": x_t, "uncond": uncond, "cond": cond}
    if width := config.unet.pooled_width:
        drawn |= {"pooled": torch.randn(2, width, generator=generator)}
    return drawn | {"hint": torch.rand(1, 3, size, size, generator=generator)}


# ------------------------------------------------------------------------------------------------------ the contenders


def prepare(job: dict) -> Callable[[dict], dict]:
    """Load the model and its inputs in the contender's process."""
    peak, device, dtype = start_worker(job)
    given = {name: x.to(device, dtype) for name, x in torch.load(f"{job['folder']}/inputs.pt").items()}
    run = {"diffusers": _diffusers, "minidiff": _minidiff, "openvino": _openvino}[job["library"]](job, device, dtype, given)
    without_gradients = torch.no_grad() if job["library"] == "minidiff" else torch.inference_mode()
    return with_backend(job, answer_with(without_gradients(run), peak))


def _diffusers(job: dict, device: torch.device, dtype: torch.dtype, given: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Step like StableDiffusionPipeline, without its scheduler."""
    unet = diffusers_pipeline(job, device, dtype).unet
    context, t = torch.cat([given["uncond"], given["cond"]]), torch.tensor(T, device=device)
    x_t, hint = torch.cat([given["x_t"]] * 2), torch.cat([given["hint"]] * 2)
    told: dict = {}
    if "pooled" in given:
        told = {"added_cond_kwargs": {"text_embeds": given["pooled"], "time_ids": torch.tensor([SIZE_NUMBERS] * 2, device=device)}}
    net: Any = None
    if job.get("controlnet"):
        from diffusers import ControlNetModel  # pyright: ignore[reportPrivateImportUsage]

        net = ControlNetModel.from_pretrained(f"{job['folder']}/controlnet", torch_dtype=dtype, local_files_only=True)
        net.to(device)
        if job["how"] != "eager":
            net.to(memory_format=torch.channels_last)

    def run() -> Tensor:
        residuals = {}
        if net is not None:
            skips, middle = net(x_t, t, encoder_hidden_states=context, controlnet_cond=hint, return_dict=False, **told)
            residuals = {"down_block_additional_residuals": skips, "mid_block_additional_residual": middle}
        uncond, cond = unet(x_t, t, encoder_hidden_states=context, return_dict=False, **told, **residuals)[0].chunk(2)
        return uncond + GUIDANCE * (cond - uncond)

    return run


def _openvino(job: dict, device: torch.device, dtype: torch.dtype, given: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Step with diffusers' U-Net converted by OpenVINO, in bfloat16 where the processor has it.

    The model is read in float32, as OpenVINO does itself; PyTorch's copy is let go before the first step.
    """
    openvino = import_module("openvino")  # takes part where somebody has installed it: no extra of ours brings it
    if job.get("controlnet") or "pooled" in given:
        raise ValueError("raced on a U-Net of latent, timestep and context only")
    unet = diffusers_pipeline(job | {"how": "eager"}, device, torch.float32).unet
    context, x_t = torch.cat([given["uncond"], given["cond"]]).float(), torch.cat([given["x_t"]] * 2).float()
    example = {"sample": x_t, "timestep": torch.tensor(T), "encoder_hidden_states": context}
    with torch.no_grad():
        converted = openvino.convert_model(unet, example_input=example)
    del unet
    core = openvino.Core()
    has_bfloat16 = dtype == torch.bfloat16 and "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    hints = {"INFERENCE_PRECISION_HINT": "bf16" if has_bfloat16 else "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = core.compile_model(converted, "CPU", hints)
    del converted
    arrays = [x.numpy() for x in example.values()]

    def run() -> Tensor:
        uncond, cond = torch.from_numpy(compiled(arrays)[0]).chunk(2)
        return uncond + GUIDANCE * (cond - uncond)

    return run


def _minidiff(job: dict, device: torch.device, dtype: torch.dtype, given: dict[str, Tensor]) -> Callable[[], Tensor]:
    """Step like our pipeline."""
    from minidiff.conditioning import Conditioning
    from minidiff.guidance import guided
    from minidiff.pipeline import channels_last

    sd, t = minidiff_model(job, device, dtype), torch.tensor([T], device=device)
    channels_last(sd.unet)
    predict = sd.predict
    if job.get("controlnet"):
        import weights_loader
        from minidiff.controlnet import Control, controlled

        net = weights_loader.read_controlnet(f"{job['folder']}/controlnet", sd)
        channels_last(net)
        predict = controlled(sd.predict, [Control(net, given["hint"])])
    told = [Conditioning(given[name]) for name in ("cond", "uncond")]
    if "pooled" in given:
        sizes = torch.tensor([SIZE_NUMBERS], device=device)
        told = [Conditioning(one.context, pooled[None], sizes) for one, pooled in zip(told, reversed(given["pooled"]))]
    model = guided(predict, told[0], told[1], GUIDANCE, shared_prefix=True)
    return lambda: model(given["x_t"], t)


if __name__ == "__main__":
    serve(prepare)
