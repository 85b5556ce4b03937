"""`minidiff verify FILE`: a checkpoint of one's own, held against diffusers on the same file: every layer, every step and the picture.

    file -> weights_loader -> minidiff's modules ---.
                                                     >- same tokens, latents and noise -> one page, to be read or passed on
    file -> diffusers' own reader and modules ------'

diffusers reads the tensors by its own conversion; of this project it gets the JSON settings alone, since it would download them. Without
diffusers the page has what the file holds and what was decided about it.
"""

import importlib
import importlib.util
import platform
import sys
import tempfile
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from minidiff.cli.flags import File, Text
from minidiff.cli.model import load
from minidiff.cli.names import check_writable

if TYPE_CHECKING:
    from torch import Tensor, nn

    from minidiff.compare import Difference
    from minidiff.pipeline import StableDiffusion

TOLERANCE = 1e-3  # relative to a layer's largest value: float32, rounded anew in each of some hundred layers
LEVELS = 2  # of 255: where rounding takes a value across the middle between two of them
WORST = 8  # layers that the page shows
PACKAGES = ("minidiff", "torch", "diffusers", "transformers", "safetensors")


def verify(
    file: tyro.conf.Positional[str],
    /,
    prompt: str = "a cat",
    steps: int = 10,
    seed: int = 0,
    size: int | None = None,
    ignore: Text = None,
    out: File = None,
) -> None:
    """Compare with diffusers on the same file: every layer, a trajectory and the picture, on one page.

        minidiff verify v1-5-pruned-emaonly.safetensors --size 256 --out page.md

    It runs on the CPU in float32. Without diffusers (pip install diffusers transformers) the page says what is in the file alone.

    Args:
        file: "tiny", a .safetensors or .ckpt file, or a diffusers folder
        prompt: of the picture
        steps: of ddim; a divisor of 1000, for at others diffusers visits other timesteps
        seed: of the noise
        size: of the picture in pixels; the model's own by default, less takes less time
        ignore: a regular expression of unknown tensors in the file to leave out
        out: a file for the page, which is printed otherwise
    """
    import weights_loader

    if out is not None:
        check_writable(out)
    sd = load(file, "float32", "cpu", ignore=ignore)
    check_asked(sd, steps, seed, size)
    lines = [f"# {file}", "", versions(), "", "```", str(weights_loader.inspect(file, ignore=ignore)), "```", ""]
    agrees = True
    if importlib.util.find_spec("diffusers") is None:
        lines.append("diffusers is not installed, so nothing was compared: pip install diffusers transformers")
    else:
        with quiet():
            pipe = their_pipeline(file, sd)
        lines += page(sd, pipe, prompt, steps, seed, size)
        agrees = lines[-1].startswith("Verdict: the same")
    text = "\n".join(lines) + "\n"
    if out is not None:
        from minidiff.files import write_text

        write_text(out, text)
    print(out if out is not None else text)
    if not agrees:
        sys.exit(1)


def check_asked(sd: "StableDiffusion", steps: int, seed: int, size: int | None) -> None:
    """Raise ValueError for numbers that the model cannot be drawn with, or at which diffusers visits other timesteps.

    Args:
        sd: the model
        steps, seed, size: of the picture
    """
    from minidiff.pipeline import noise_source

    timesteps = sd.config.schedule.timesteps
    if not 1 <= steps <= timesteps or timesteps % steps:
        raise ValueError(f"--steps {steps}: give a divisor of {timesteps}, as 10 or 20; at others diffusers visits other timesteps")
    sd.pixel_size(size)
    noise_source([seed], (1, 1, 1), sd.device)


def versions() -> str:
    """Return the versions of everything that takes part."""
    from importlib.metadata import PackageNotFoundError, version

    found = [f"Python {platform.python_version()} on {platform.platform()}"]
    for name in PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} not installed")
    return ", ".join(found)


def quiet() -> ExitStack:
    """Return a context that keeps back what diffusers says while it reads."""
    stack, nowhere = ExitStack(), StringIO()
    stack.enter_context(redirect_stdout(nowhere))
    stack.enter_context(redirect_stderr(nowhere))
    return stack


def their_pipeline(file: str, sd: "StableDiffusion") -> Any:
    """Return diffusers' pipeline of the same file, in float32, without a download. Raises ValueError with what diffusers says."""
    import torch

    from weights_loader.contents import find
    from weights_loader.folder import write_folder_config

    diffusers: Any = importlib.import_module("diffusers")
    diffusers.utils.logging.set_verbosity_error()  # its warnings are of its own loading
    path = find(file)
    with tempfile.TemporaryDirectory() as settings:
        write_folder_config(Path(settings), sd.config, sd.text.tokenizers)
        common: dict[str, Any] = {"local_files_only": True, "torch_dtype": torch.float32}
        two = len(sd.text.encoders) > 1
        common |= {"add_watermarker": False} if two else {"safety_checker": None}
        read = diffusers.StableDiffusionXLPipeline if two else diffusers.StableDiffusionPipeline
        try:
            pipe = read.from_pretrained(path, **common) if path.is_dir() else read.from_single_file(str(path), config=settings, **common)
            pipe.scheduler = diffusers.DDIMScheduler.from_pretrained(settings, subfolder="scheduler")
        except Exception as error:  # of any kind: it is another program's
            raise ValueError(f"{file}: diffusers does not read it ({type(error).__name__}: {error})") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe


def page(sd: "StableDiffusion", pipe: Any, prompt: str, steps: int, seed: int, size: int | None) -> list[str]:
    """Return the lines of the comparison, the verdict last.

    Args:
        sd: minidiff's model
        pipe: diffusers' pipeline
        prompt, steps, seed, size: of the picture
    """
    layers = compare_layers(sd, pipe, prompt, seed)
    worst = sorted(layers, key=lambda one: -one.relative)[:WORST]
    drifts, levels = compare_pictures(sd, pipe, prompt, steps, seed, size)
    wrong = next((one.layer for one in layers if not one.relative <= TOLERANCE), None)
    differs = f"layer {wrong} differs first" if wrong else f"the pictures differ by {levels} of 255" if levels > LEVELS else None
    rows = [f"| {one.layer} | {one.absolute:.2e} | {one.relative:.2e} |" for one in worst]
    return [
        f"## {len(layers)} layers, the {len(worst)} that differ most",
        "",
        *("| layer | largest difference | relative |", "|---|---|---|", *rows),
        "",
        f"## Trajectory and picture: {prompt!r}, ddim, {steps} steps, seed {seed}",
        "",
        *(["All of the picture is masked for this inpainting model: it is drawn from the prompt alone.", ""] if is_inpainting(sd) else []),
        f"Largest difference of the latent after each step: {', '.join(f'{drift:.1e}' for drift in drifts)}.",
        f"Largest difference of the 8-bit picture: {levels} of 255.",
        "",
        f"Verdict: {differs or 'the same'} (layers to {TOLERANCE:g} of their largest value, pixels to {LEVELS} of 255).",
    ]


def compare_layers(sd: "StableDiffusion", pipe: Any, prompt: str, seed: int) -> "list[Difference]":
    """Run the parts of both on the same inputs; return one Difference per layer with weights, in the order in which they run.

    Args:
        sd: minidiff's model
        pipe: diffusers' pipeline
        prompt: the text encoders' input
        seed: of latent and pixels
    """
    import torch

    from minidiff.compare import difference, record_outputs
    from minidiff.pipeline import noise_source
    from minidiff.vae import VAE

    cells, config = 16, sd.config
    noise = noise_source([seed], (config.unet.in_channels, cells, cells), sd.device)()
    latent = noise[:, : config.vae.latent_channels]
    pixels = noise_source([seed], (3, cells * config.vae.factor, cells * config.vae.factor), sd.device)().clamp(-1, 1)
    t, side = torch.tensor([config.schedule.timesteps // 2]), cells * config.vae.factor
    found = []
    with torch.no_grad():
        told = sd.text([prompt], (side, side))
        added = {} if told.pooled is None else {"added_cond_kwargs": {"text_embeds": told.pooled, "time_ids": told.size}}
        tokens = {name: sd.text.tokens(name, [prompt]) for name in sd.text.encoders}
        for part, ours, theirs in (
            *((name, partial(run_text, sd, name, own), partial(getattr(pipe, name), own)) for name, own in tokens.items()),
            ("unet", partial(sd.unet, noise, t, told), partial(pipe.unet, noise, t, told.context, **added)),
            ("vae", partial(VAE.encode, sd.vae, pixels), partial(pipe.vae.encode, pixels)),
            ("vae", partial(VAE.decode, sd.vae, latent), partial(pipe.vae.decode, latent)),
        ):
            pairs = paired_layers(sd, part, getattr(pipe, part))
            ours_of = record_outputs({name: one for name, (one, _) in pairs.items()}, ours)
            theirs_of = record_outputs({name: other for name, (_, other) in pairs.items()}, theirs)
            found += [
                difference(f"{part}.{name}", ours_of[name], _as_shaped(theirs_of[name], ours_of[name], pairs[name][0])) for name in ours_of
            ]
    return found


def run_text(sd: "StableDiffusion", name: str, tokens: "Tensor") -> object:
    """Run a text encoder, and the layers behind the context of one that makes a pooled vector."""
    encoder = sd.text.encoders[name]
    context, ends = encoder(tokens), (tokens == sd.text.tokenizers[name].end_id).int().argmax(dim=1)
    return context if encoder.projection is None else encoder.pool(context, ends)


def paired_layers(sd: "StableDiffusion", part: str, theirs: "nn.Module") -> "dict[str, tuple[nn.Module, nn.Module]]":
    """Return the layers with weights of a part of ours, each with diffusers' layer of that place. Raises ValueError for one it lacks."""
    from weights_loader.families import part_names
    from weights_loader.name_table import name_table

    modules, pairs = dict(theirs.named_modules()), {}
    for ours, place in name_table(sd.parts[part], part_names(sd.config, part, "diffusers")).items():
        layer, name = ours.rpartition(".")[0], place.name.rpartition(".")[0]
        module = modules.get(name) or modules.get(name.removeprefix("text_model."))  # transformers 5 leaves that out
        if module is None and layer:
            raise ValueError(f"diffusers has no {name}, the place of {part}.{layer}: another version of diffusers or transformers?")
        if layer and module is not None:
            pairs[layer] = (sd.parts[part].get_submodule(layer), module)
    return pairs


def _as_shaped(theirs: "Tensor", ours: "Tensor", layer: "nn.Module") -> "Tensor":
    """Return diffusers' output in our layout: cells are an axis in one place, height and width in another.

    Args:
        theirs: the output of diffusers' layer
        ours: the output of ours
        layer: ours; a GroupNorm has its channels first in any case, a matrix last
    """
    from torch import nn

    if theirs.dim() == ours.dim():
        return theirs
    if isinstance(layer, nn.GroupNorm):
        return theirs.reshape(ours.shape)
    return theirs.flatten(2).transpose(1, 2) if theirs.dim() == 4 else theirs.transpose(1, 2).reshape(ours.shape)


def compare_pictures(sd: "StableDiffusion", pipe: Any, prompt: str, steps: int, seed: int, size: int | None) -> tuple[list[float], int]:
    """Return the largest difference of the latents after each step, and that of the pictures, in levels of 255.

    Args:
        sd, pipe: both models
        prompt, steps, seed, size: of the picture
    """
    import numpy as np
    import torch

    from minidiff.editing.inpaint import with_hole
    from minidiff.pipeline import noise_source, to_images

    side = size or sd.config.image_size
    grey, everything = torch.zeros(1, 3, side, side), torch.ones(1, 1, side, side)
    model = with_hole(sd, grey, everything) if is_inpainting(sd) else None
    ours = [step.x_t for step in sd.denoise([prompt], seeds=[seed], steps=steps, sampler="ddim", size=side, model=model)]
    picture = to_images(sd.decode(ours[-1]))[0]
    theirs: list[torch.Tensor] = []

    def keep(_pipe: Any, _step: int, _t: Any, values: dict[str, Any]) -> dict[str, Any]:
        theirs.append(values["latents"].clone())
        return values

    cells = side // sd.config.vae.factor
    noise = noise_source([seed], (sd.config.vae.latent_channels, cells, cells), sd.device)()
    scale = sd.config.guidance_scale
    with ExitStack() as stack:
        if model is not None:
            hook = pipe.unet.register_forward_pre_hook(partial(add_hole, their_hole(pipe, grey)))
            stack.callback(hook.remove)
        other = pipe(
            prompt,
            height=side,
            width=side,
            num_inference_steps=steps,
            guidance_scale=scale,
            latents=noise,
            callback_on_step_end=keep,
        ).images[0]
    drifts = [(a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True)]
    levels = int(np.abs(np.asarray(picture).astype(int) - np.asarray(other).astype(int)).max())
    return drifts, levels


def is_inpainting(sd: "StableDiffusion") -> bool:
    """Return whether the U-Net is also told a mask and the picture outside it."""
    return sd.config.unet.in_channels != sd.config.vae.latent_channels


def their_hole(pipe: Any, pixels: "Tensor") -> "Tensor":
    """Return the channels with which diffusers' pipeline for inpainting says that all is masked: the mask, and the latent of `pixels`.

    pipe: diffusers' pipeline. pixels: mid-grey, of the picture's size.
    """
    import torch

    with torch.no_grad():
        latent = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
    return torch.cat([torch.ones_like(latent[:, :1]), latent], dim=1)


def add_hole(hole: "Tensor", _unet: "nn.Module", args: "tuple[Tensor, ...]") -> "tuple[Tensor, ...]":
    """Put the channels of the hole behind those of the latent, as a hook in front of diffusers' U-Net.

    Args:
        hole: one row of channels
        args: of the U-Net; the first one is the latent
    """
    import torch

    return torch.cat([args[0], hole.expand(len(args[0]), -1, -1, -1)], dim=1), *args[1:]
