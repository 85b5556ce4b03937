"""Whole models for the benchmarks: random weights in a folder that both libraries read, and each library's model from it.

The weights have the published shapes and are the same for all; every contender reads them with its library's own loader.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minidiff.bench.common import random_model_to_run
from minidiff.bench.stand_in import provide_open_clip
from minidiff.bench.worker_protocol import PeakMemory
from minidiff.config import ModelConfig
from minidiff.kernels.dispatch import attention_backend

if TYPE_CHECKING:
    from minidiff.pipeline import StableDiffusion

COMPILED = {"compiled": "reduce-overhead", "max-autotune": "max-autotune"}


@contextmanager
def model_folder(config: ModelConfig) -> Iterator[Path]:
    """Write a diffusers folder of float32 weights, 4.3 GB for Stable Diffusion 1.x, 13.9 GB for XL, to a temporary folder for the block."""
    import weights_loader

    provide_open_clip()
    with tempfile.TemporaryDirectory(prefix="minidiff-bench-") as folder:
        weights_loader.save(random_model_to_run(config), Path(folder) / "model", layout="diffusers")
        yield Path(folder)


# The contenders by name: library, dtype, how it computes. The others are compared with the first, what the rival does by default.
# On a GPU float32 serves only to measure errors, and "triton" computes GroupNorm + SiLU and GEGLU by our kernels too, for choices.json.
ON_CPU = {
    "diffusers float32": ("diffusers", "float32", "eager"),
    "diffusers bfloat16": ("diffusers", "bfloat16", "channels-last"),
    "diffusers compiled bfloat16": ("diffusers", "bfloat16", "compiled"),
    "openvino bfloat16": ("openvino", "bfloat16", "eager"),
    "minidiff float32": ("minidiff", "float32", "eager"),
    "minidiff bfloat16": ("minidiff", "bfloat16", "eager"),
}
OF_STEPS = ("diffusers compiled bfloat16", "openvino bfloat16")  # those of a CPU that take part in `bench step` alone
ON_GPU = {
    "diffusers": ("diffusers", "bfloat16", "eager"),
    "diffusers channels-last": ("diffusers", "bfloat16", "channels-last"),
    "diffusers compiled": ("diffusers", "bfloat16", "compiled"),
    "diffusers max-autotune": ("diffusers", "bfloat16", "max-autotune"),
    "minidiff": ("minidiff", "bfloat16", "eager"),
    "minidiff triton": ("minidiff", "bfloat16", "triton"),
    "minidiff compiled": ("minidiff", "bfloat16", "compiled"),
    "minidiff float32": ("minidiff", "float32", "eager"),
}


def make_jobs(device: str, against: bool, leave_out: Sequence[str] = ()) -> dict[str, dict]:
    """Return the contenders' jobs by name, in the order of the tables above.

    Args:
        device: Of all contenders.
        against: Race other libraries as well.
        leave_out: Names of contenders that do not take part.
    """
    on_cpu = torch.device(device).type == "cpu"
    return {
        name: {"library": library, "dtype": dtype, "how": how, "untimed": not on_cpu and dtype == "float32", "device": device}
        for name, (library, dtype, how) in (ON_CPU if on_cpu else ON_GPU).items()
        if name not in leave_out and (against or library == "minidiff")
    }


def make_model_jobs(device: str, against: bool, max_autotune: bool = False) -> dict[str, dict]:
    """Return the jobs of those that run a model without training it.

    Args:
        device, against: As in `make_jobs`.
        max_autotune: Add diffusers compiled with max-autotune, which takes long to compile.
    """
    return make_jobs(device, against, (*OF_STEPS, "minidiff compiled", *(() if max_autotune else ("diffusers max-autotune",))))


def make_step_jobs(device: str, against: bool, max_autotune: bool = False) -> dict[str, dict]:
    """Return the jobs of `bench step`: on a CPU also compiled diffusers, and OpenVINO where it is installed; arguments as above."""
    without = [] if find_spec("openvino") else ["openvino bfloat16"]
    return make_jobs(device, against, (*without, "minidiff compiled", *(() if max_autotune else ("diffusers max-autotune",))))


def start_worker(job: dict) -> tuple[PeakMemory, torch.device, torch.dtype]:
    """Begin in the contender's process: import its library, then watch its memory. float32 is IEEE's, not TF32."""
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if job["library"] != "minidiff":  # OpenVINO converts diffusers' U-Net
        # Each class by name: both packages import what they are asked for.
        from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]  # noqa: F401
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401
    else:
        import weights_loader  # noqa: F401
        from minidiff.config import TokenizerConfig
        from minidiff.tokenizer import Tokenizer

        provide_open_clip()
        Tokenizer(TokenizerConfig(merges=()))  # imports open_clip's
    return PeakMemory(device, converted=dtype != torch.float32), device, dtype


def with_backend(job: dict, answer: Callable[[dict], dict]) -> Callable[[dict], dict]:
    """Return what answers a contender's requests, for a job["how"] of "triton" with all our kernels; otherwise unchanged."""
    return attention_backend("triton")(answer) if job["how"] == "triton" else answer


def diffusers_pipeline(job: dict, device: torch.device, dtype: torch.dtype) -> Any:
    """Load diffusers' pipeline.

    job["how"] is "eager" for the defaults, "channels-last" for U-Net and VAE in that layout, "compiled" to compile them as well, as
    diffusers' page on speed recommends.
    """
    from diffusers import DiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]

    pipe = DiffusionPipeline.from_pretrained(f"{job['folder']}/model", torch_dtype=dtype, local_files_only=True).to(device)
    pipe.set_progress_bar_config(disable=True)
    if job["how"] != "eager":
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    if job["how"] in COMPILED:
        pipe.unet = torch.compile(pipe.unet, mode=COMPILED[job["how"]], fullgraph=True)
        pipe.vae.decode = torch.compile(pipe.vae.decode, mode=COMPILED[job["how"]], fullgraph=True)
    return pipe


def minidiff_model(job: dict, device: torch.device, dtype: torch.dtype) -> "StableDiffusion":
    """Load our model."""
    import weights_loader

    return weights_loader.load(f"{job['folder']}/model", dtype=dtype, device=device)
