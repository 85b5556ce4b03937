"""What the benchmarks of whole models share: made-up weights in a folder that both libraries read, and each library's model from it.

The weights are random, of the published shapes, and the same for all; every contender reads them by its library's own loader.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minidiff.bench.answers import Peak
from minidiff.bench.common import made_up_to_run
from minidiff.config import ModelConfig

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

    from minidiff.pipeline import StableDiffusion

COMPILED = {"compiled": "reduce-overhead", "max-autotune": "max-autotune"}


@contextmanager
def model_folder(config: ModelConfig) -> Iterator[Path]:
    """A diffusers folder of float32 weights, 4.3 GB for Stable Diffusion 1.x, in the folder for temporary files; gone at the end."""
    import weights_loader

    with tempfile.TemporaryDirectory(prefix="minidiff-bench-") as folder:
        weights_loader.save(made_up_to_run(config), Path(folder) / "model", layout="diffusers")
        yield Path(folder)


def model_jobs(device: str, against: bool, max_autotune: bool = False, compiled: bool = True) -> dict[str, dict]:
    """The contenders by name, the one to compare with first: what the rivals do by default.

    On a GPU all compute in bfloat16, and float32 is there for the errors alone; on a CPU each has its float32 and its bfloat16.
    """

    def job(library: str, dtype: str, how: str = "eager", untimed: bool = False) -> dict:
        return {"library": library, "dtype": dtype, "how": how, "untimed": untimed, "device": device}

    half = "bfloat16"
    if torch.device(device).type == "cpu":
        theirs = {"diffusers float32": job("diffusers", "float32"), "diffusers bfloat16": job("diffusers", half, "channels-last")}
        ours = {"minidiff float32": job("minidiff", "float32"), "minidiff bfloat16": job("minidiff", half)}
        return (theirs if against else {}) | ours
    theirs = {"diffusers": job("diffusers", half), "diffusers channels-last": job("diffusers", half, "channels-last")}
    if compiled:
        theirs["diffusers compiled"] = job("diffusers", half, "compiled")
    if max_autotune:
        theirs["diffusers max-autotune"] = job("diffusers", half, "max-autotune")
    ours = {"minidiff": job("minidiff", half), "minidiff float32": job("minidiff", "float32", untimed=True)}
    return (theirs if against else {}) | ours


def started(job: dict) -> tuple[Peak, torch.device, torch.dtype]:
    """In the contender's process: its imports are done and its memory is watched from here on. float32 is IEEE's."""
    device, dtype = torch.device(job["device"]), getattr(torch, job["dtype"])
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if job["library"] == "diffusers":
        # Each class by name: both packages import what they are asked for.
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel  # noqa: F401
        from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401
    else:
        import weights_loader  # noqa: F401
        from minidiff.config import TokenizerConfig
        from minidiff.tokenizer import Tokenizer

        Tokenizer(TokenizerConfig(merges=()))  # imports open_clip's
    return Peak(device, converted=dtype != torch.float32), device, dtype


def diffusers_pipeline(job: dict, device: torch.device, dtype: torch.dtype) -> "StableDiffusionPipeline":
    """eager: as it comes; channels-last: U-Net and VAE in that layout; compiled: torch.compile too, as diffusers' page on speed says."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(f"{job['folder']}/model", torch_dtype=dtype, local_files_only=True).to(device)
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
