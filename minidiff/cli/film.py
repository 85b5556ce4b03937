"""`minidiff film`: the denoising loop as a moving picture, x_t on the left and x0_hat on the right, a frame per step.

prompt -> sd.denoise -> Step -> decode x_t and x0_hat -> frame -> GIF or animated WebP
"""

import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from minidiff.cli.advice import negative_notes, size_notes, syntax_notes, word_notes
from minidiff.cli.endings import finish
from minidiff.cli.flags import DTypes, File, Number, Several, Text, Whole
from minidiff.cli.generate import read_weights
from minidiff.cli.model import load, named, print_notes, unused_words, weighted
from minidiff.cli.names import check_writable, free_path, slug
from minidiff.cli.picture_files import check_zoom, enlarge

if TYPE_CHECKING:
    from PIL import Image

    from minidiff.samplers import Step

FORMATS = {".gif": "GIF", ".webp": "WEBP"}
HEIGHT = 256  # pixels, at least, of a film of small pictures: browsers show a film as large as it is
HOLD = 1.5  # seconds that the last frame stays


def film(
    prompt: tyro.conf.Positional[str],
    /,
    model: str = "tiny",
    prediction: Literal["eps", "v"] | None = None,
    ignore: Text = None,
    steps: int = 30,
    sampler: str = "ddim",
    guidance_scale: Number = None,
    negative_prompt: Text = None,
    seed: int = 0,
    size: Whole = None,
    lora: Several = (),
    embedding: Several = (),
    seconds: float = 4.0,
    zoom: Whole = None,
    dtype: DTypes = "auto",
    device: str = "auto",
    out: File = None,
) -> None:
    """Make a film of the denoising loop: x_t on the left, x0_hat on the right.

        minidiff film "a fox" --out fox.gif
        minidiff film "a fox" --sampler heun --steps 12 --out fox.webp

    x_t is the noisy picture; x0_hat is the clean one that the model predicts from it.

    Args:
        prompt: what the picture shows, in quotes
        model: "tiny" (ships with minidiff), a .safetensors or .ckpt file, or a diffusers folder
        prediction: what the model predicts, eps or v, where its file is wrong about it
        ignore: a regular expression of unknown tensors in the model's file to leave out
        steps: how many steps the sampler takes; each is a frame
        sampler: its name; `minidiff list samplers` shows all of them
        guidance_scale: how strongly the picture follows the prompt; the model's own by default
        negative_prompt: what it should not show
        seed: where the noise comes from, as for generate
        size: pixels a side; the model's own by default
        lora: a LoRA file, or FILE:0.7 for a part of its change
        embedding: a file of learned words
        seconds: how long the film is, without the 1.5 s that its last frame stays
        zoom: how many times wider and higher the frames are; by default small pictures become 256 pixels high
        dtype: of the weights, as for generate
        device: auto, cpu, cuda, cuda:1, mps
        out: a .gif or .webp file; named after the prompt by default
    """
    from tqdm import tqdm

    from weights_loader.contents import BUNDLED

    out = out or free_path(Path(f"{slug(prompt)}-{seed}.gif"))
    if out.suffix.lower() not in FORMATS:
        raise ValueError(f"{out}: a film is a .gif or a .webp; name it {out.with_suffix('.gif').name}")
    check_writable(out)
    if not 0 < seconds <= 600:
        raise ValueError(f"--seconds {seconds:g} is outside 0..600; 4 is a good length")
    if zoom is not None:
        check_zoom(zoom)
    words = [prompt, negative_prompt or ""]
    print_notes(syntax_notes(words))
    sd = load(model, dtype, device, prediction=prediction, ignore=ignore, lora=weighted(lora), embeddings=named(embedding))
    if model in BUNDLED and not lora:
        print_notes(word_notes(words, sd.tokenizer.added))
    read_weights(sd, words)
    print_notes(unused_words(sd.tokenizer, words))
    print_notes(negative_notes(negative_prompt, sd.config.guidance_scale if guidance_scale is None else guidance_scale))
    print_notes(size_notes(sd.pixel_size(size), sd.config.image_size))
    trajectory = sd.denoise(
        prompt,
        steps=steps,
        sampler=sampler,
        guidance_scale=guidance_scale,
        negative_prompt=negative_prompt,
        seeds=[seed],
        size=size,
    )
    zoom = zoom or max(1, HEIGHT // sd.pixel_size(size)[1])
    frames = [
        enlarge(frame, zoom, "nearest") for frame in tqdm(frames_of(sd.decode, trajectory), total=steps, unit="step", file=sys.stderr)
    ]
    write_film(frames, out, seconds)
    flags = {"--model": None if model == "tiny" else model, "--prediction": prediction, "--ignore": ignore}
    flags |= {"--steps": steps, "--sampler": sampler, "--seed": seed, "--size": size, "--dtype": None if dtype == "auto" else dtype}
    flags |= {"--guidance-scale": guidance_scale, "--negative-prompt": negative_prompt}
    again = [text for flag, value in flags.items() if value is not None for text in (flag, str(value))]
    again += [text for flag, files in (("--lora", lora), ("--embedding", embedding)) for file in files for text in (flag, file)]
    finish(out, f"{len(frames)} frames, left x_t and right x0_hat", use=shlex.join(["minidiff", "generate", prompt, *again]))


def frames_of(decode, trajectory: "Iterator[Step]") -> "Iterator[Image.Image]":
    """Yield a frame for each step, x_t beside x0_hat.

    decode: turns latents into pixels in [-1, 1]. trajectory: of a single picture.
    """
    import torch

    from minidiff.pictures import grid
    from minidiff.pipeline import to_images

    for step in trajectory:
        yield grid(to_images(decode(torch.cat([step.x_t, step.x0_hat]))), columns=2)


def write_film(frames: "Sequence[Image.Image]", path: Path, seconds: float) -> None:
    """Write frames as a GIF or a lossless WebP, by the ending, that starts over at its end.

    seconds: from the first frame to the last, which stays for HOLD longer.
    """
    from minidiff.files import atomic_write

    each = max(20, round(1000 * seconds / len(frames)))  # ms; browsers slow down what is faster than 50 frames a second
    times = [*[each] * (len(frames) - 1), each + round(1000 * HOLD)]
    with atomic_write(path) as file:
        kind = FORMATS[path.suffix.lower()]
        frames[0].save(file, kind, save_all=True, append_images=frames[1:], duration=times, loop=0, lossless=True)
