"""`minidiff edit`: a picture and its edit by another prompt, drawn side by side (editing/prompt_to_prompt.py)."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from minidiff import __version__
from minidiff.cli.advice import negative_notes, syntax_notes
from minidiff.cli.endings import finish
from minidiff.cli.flags import Attentions, DTypes, File, Number, Several, Text, Whole
from minidiff.cli.generate import parse_size
from minidiff.cli.model import load, named, print_notes, unused_words, weighted
from minidiff.cli.names import check_writable, free_path, slug
from minidiff.cli.picture_files import choose_seeds

if TYPE_CHECKING:
    from torch import Tensor

    from minidiff.editing.prompt_to_prompt import AttentionEdit
    from minidiff.pipeline import Model, StableDiffusion

Self = Annotated[float, tyro.conf.arg(name="self")]
TwoWords = Annotated[tuple[str, str] | None, tyro.conf.arg(metavar="WORD WORD")]
CROSS = 0.8  # of the steps, without --replace and --refine
FROM_PICTURE = ("ddim",)  # samplers that inversion can be run backward for


def edit(
    prompts: tyro.conf.Positional[tuple[str, ...]],
    /,
    replace: Number = None,
    refine: Number = None,
    self_attention: Self = 0.4,
    until: Several = (),
    reweight: Several = (),
    local_blend: TwoWords = None,
    image: File = None,
    model: str = "tiny",
    prediction: Literal["eps", "v"] | None = None,
    ignore: Text = None,
    negative_prompt: Text = None,
    steps: int = 30,
    sampler: str = "ddim",
    guidance_scale: Number = None,
    seed: Whole = None,
    batch: Whole = None,
    size: Text = None,
    dtype: DTypes = "auto",
    device: str = "auto",
    attention: Attentions = "auto",
    lora: Several = (),
    embedding: Several = (),
    custom_diffusion: Several = (),
    out: Path | None = None,
) -> None:
    """Change words of a prompt and keep the picture: prompt-to-prompt, on drawn pictures and on real ones.

        minidiff edit "a lion on a blue background" "a tiger on a blue background" --local-blend lion tiger

    Args:
        prompts: the picture's prompt and the edit's, in quotes; a single one with --reweight
        replace: words take each other's place, in prompts of as many words: the share of the steps, from the first, in which the
            edit's words are looked at where the original's are, 0 to 1; 0.8 by default
        refine: words are added or left out: the same share for the words that both prompts have; the default where the numbers differ
        self_attention: the share of the steps in which the parts of the edit look at each other as the original's do
        until: another share for a word of the edit, as tiger=0.4
        reweight: how much a word of the edit counts, as red=3; 1 is as it was, 0 not at all
        local_blend: a word of the original and a word of the edit: elsewhere the picture stays
        image: a picture to edit, which the first prompt describes; it is inverted first, which takes some ten times as long
        model: "tiny" (ships with minidiff), a .safetensors or .ckpt file, or a diffusers folder
        prediction: what the model predicts, eps or v, where its file is wrong about it
        ignore: a regular expression of unknown tensors in the model's file to leave out
        negative_prompt: what neither picture should show
        steps: how many steps the sampler takes
        sampler: its name, as in generate; a picture needs ddim
        guidance_scale: how strongly pictures follow their prompts; the model's own by default
        seed: where the noise comes from, 0 by default; a picture needs none
        batch: how many pairs, on consecutive seeds
        size: in pixels, as 512 or 768x512; the model's own by default (its shorter side, of a picture in another shape)
        dtype: of the weights, as in generate; a picture needs float32
        device: auto, cpu, cuda, cuda:1, mps
        attention: how it is computed where it is not changed, as in generate
        lora: a LoRA file, or FILE:0.7 for a part of its change
        embedding: a file of learned words, for the prompts to use; FILE:WORD gives its word another name
        custom_diffusion: a Custom Diffusion file or folder
        out: a .png file for originals and edits side by side, a pair a row, named after the edit by default; each picture is in a file
            alongside
    """
    from collections import deque

    from tqdm import tqdm

    from minidiff.editing.prompt_to_prompt import prompt_to_prompt
    from minidiff.editing.start import Sampling
    from minidiff.kernels.dispatch import attention_backend
    from minidiff.pipeline import to_images

    original, edited = read_prompts(prompts, reweight)
    wanted = read_attention_edit(replace, refine, self_attention, until, reweight, local_blend)
    check_picture(image, sampler, seed, batch, dtype)
    seeds = choose_seeds(seed or 0, 1 if batch is None else batch, None)
    if not seeds:
        raise ValueError(f"--batch {batch} makes no picture; give at least 1")
    files = pair_files(out, edited, seeds)
    print_notes(syntax_notes([original, edited, negative_prompt or ""]))
    sd = load(
        model,
        dtype if image is None else "float32",
        device,
        prediction=prediction,
        ignore=ignore,
        lora=weighted(lora),
        embeddings=named(embedding),
        custom_diffusion=custom_diffusion,
    )
    print_notes(unused_words(sd.tokenizer, [original, edited, negative_prompt or ""]))
    scale = sd.config.guidance_scale if guidance_scale is None else guidance_scale
    print_notes(negative_notes(negative_prompt, scale))
    sampling = Sampling(steps, sampler, scale, negative_prompt)
    with attention_backend(attention):
        prompt_to_prompt(sd, original, edited, wanted, seeds=seeds, sampling=sampling)  # refuses what it cannot do before the inversion
        start = Start() if image is None else invert_picture(sd, original, image, parse_size(size), sampling)
        pair = parse_size(size) if start.size is None else start.size
        trajectory = prompt_to_prompt(sd, original, edited, wanted, seeds=seeds, sampling=sampling, size=pair, x=start.x, model=start.model)
        (last,) = deque(tqdm(trajectory, total=steps, unit="step", file=sys.stderr), maxlen=1)
        images = to_images(sd.decode(last.x_t))
    values: dict[str, object] = {
        "Steps": steps,
        "Sampler": sampler,
        "CFG scale": scale,
        "Seed": seeds[0],
        "Size": f"{images[0].width}x{images[0].height}",
        "Model": model,
        "Prediction": prediction,
        "Ignore": ignore,
        "Cross-attention": f"{wanted.align or 'by words'} {wanted.cross:g}",
        "Self-attention": wanted.self_attention,
        "Until": until,
        "Reweight": reweight,
        "Local blend": local_blend,
        "Edited picture": image,
        "LoRA": lora,
        "Embedding": embedding,
        "Custom Diffusion": custom_diffusion,
        "Version": f"minidiff {__version__}",
    }
    write_pairs(files, images, (original, edited), negative_prompt or "", values, seeds)
    finish(files[0], f"{len(seeds)} pair{'s' * (len(seeds) > 1)}, original and edit, with each picture in a file alongside")


def read_prompts(prompts: Sequence[str], reweight: Sequence[str]) -> tuple[str, str]:
    """Return the original's prompt and the edit's. Raises ValueError for other numbers of them, and for weights in brackets."""
    from minidiff.editing.prompt_weights import parse_weights

    if len(prompts) == 1 and reweight:
        prompts = (prompts[0], prompts[0])
    if len(prompts) != 2:
        only = f"one prompt only, {prompts[0]!r}" if len(prompts) == 1 else f"{len(prompts)} prompts"
        raise ValueError(f"{only}: give the picture's prompt and the edit's, or one prompt and --reweight WORD=NUMBER")
    if bracket := next((prompt for prompt in prompts if any(part.weight != 1 for part in parse_weights(prompt))), None):
        raise ValueError(f"prompt {bracket!r} has weights in brackets; say how much a word counts by --reweight WORD=NUMBER")
    return prompts[0], prompts[1]


def read_attention_edit(
    replace: float | None,
    refine: float | None,
    self_attention: float,
    until: Sequence[str],
    reweight: Sequence[str],
    local_blend: tuple[str, str] | None,
) -> "AttentionEdit":
    """Read the flags of the edit.

    Args:
        replace, refine, self_attention, until, reweight, local_blend: as in `edit`

    Raises ValueError, naming the flag, for shares outside 0..1, --replace with --refine, and words without a number.
    """
    from minidiff.editing.prompt_to_prompt import AttentionEdit

    if replace is not None and refine is not None:
        raise ValueError("--replace and --refine do not go together: words either take each other's place or are added; leave one out")
    shares, factors = read_words("until", until), read_words("reweight", reweight)
    given = {
        "--replace": replace,
        "--refine": refine,
        "--self": self_attention,
        **{f"--until {word}": share for word, share in shares.items()},
    }
    for flag, share in given.items():
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"{flag} {share:g} is outside 0..1; it is the share of the steps in which the edit follows the original")
    align, cross = ("replace", replace) if replace is not None else ("refine", refine) if refine is not None else (None, CROSS)
    assert cross is not None
    return AttentionEdit(cross, self_attention, shares, align, factors, local_blend)


def read_words(flag: str, texts: Sequence[str]) -> dict[str, float]:
    """Read "red=3" and the like. Raises ValueError, naming the flag, for anything else and for a word that is given twice."""
    numbers: dict[str, float] = {}
    for text in texts:
        word, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = None
        if not word or value is None or word in numbers:
            raise ValueError(f"--{flag} {text}: write each word once with its number, as red=3")
        numbers[word] = value
    return numbers


def check_picture(image: Path | None, sampler: str, seed: int | None, batch: int | None, dtype: str) -> None:
    """Raise ValueError for flags that mean nothing for a real picture, FileNotFoundError where it is not there.

    Args:
        image, sampler, seed, batch, dtype: as in `edit`
    """
    if image is None:
        return
    if not image.is_file():
        raise FileNotFoundError(f"--image {image}: no such file")
    if sampler not in FROM_PICTURE:
        raise ValueError(f"--sampler {sampler} with --image: only {', '.join(FROM_PICTURE)} can be run backward; leave --sampler out")
    if seed is not None or batch is not None:
        raise ValueError("--seed and --batch with --image: the noise is that of the picture, so there is one edit; leave them out")
    if dtype not in ("auto", "float32"):
        raise ValueError(f"--dtype {dtype} with --image: inversion learns in float32; leave --dtype out")


@dataclass(frozen=True)
class Start:
    """What the loop starts from: latents and a model with learned empty prompts of a picture, or nothing of the kind."""

    x: "Tensor | None" = None
    model: "Model | None" = None
    size: tuple[int, int] | None = None


def invert_picture(sd: "StableDiffusion", prompt: str, image: Path, size: int | tuple[int, int] | None, sampling) -> Start:
    """Invert a picture: DDIM at scale 1, and empty prompts that guidance comes back by.

    Args:
        sd: the model
        prompt: of the picture
        image: its file
        size: as --size says it; None is to scale, by the model's own size
        sampling: of the way down
    """
    import numpy as np
    from tqdm import tqdm

    from minidiff.editing.canvas import fit, usual_size
    from minidiff.editing.inversion import invert
    from minidiff.editing.null_text import null_text, with_empty_prompts
    from minidiff.editing.start import encode
    from minidiff.pictures import load_picture, to_pixels

    pixels = to_pixels(np.array(load_picture(image))[None])
    width, height = (
        usual_size(pixels.shape[3], pixels.shape[2], sd.config.image_size, sd.config.vae.factor) if size is None else sd.pixel_size(size)
    )
    x_0 = encode(sd, fit(pixels, width, height, "crop"))

    def bar(steps: Iterator, what: str) -> list:
        return list(tqdm(steps, total=sampling.steps, unit="step", desc=what, file=sys.stderr))

    up = bar(invert(sd, [prompt], x_0, steps=sampling.steps), "inversion")
    if sampling.guidance_scale == 1:
        return Start(up[-1].x_t, None, (width, height))
    learned = bar(
        null_text(sd, [prompt], x_0, up, guidance_scale=sampling.guidance_scale, negative_prompt=sampling.negative_prompt), "null text"
    )
    return Start(up[-1].x_t, with_empty_prompts(sd.predict, learned), (width, height))


def pair_files(out: Path | None, edited: str, seeds: Sequence[int]) -> list[Path]:
    """Return the names of all files, which can be written: of the pairs, then of each original and its edit.

    Only `out` may be a file that is there. Raises ValueError or OSError for what cannot be written.
    """
    from minidiff.pictures import check_png

    out = out or free_path(Path(f"{slug(edited)}-edit-{seeds[0]}.png"))
    files = [out, *(free_path(out.with_name(f"{out.stem}-{kind}-{seed}.png")) for kind in ("original", "edited") for seed in seeds)]
    for file in files:
        check_png(file)
        check_writable(file)
    return files


def write_pairs(
    files: Sequence[Path], images: Sequence, prompts: tuple[str, str], negative: str, values: dict[str, object], seeds: Sequence[int]
) -> None:
    """Write the sheet, a pair a row, and each picture.

    Args:
        files: as `pair_files` names them
        images: originals, then edits
        prompts: of the original and of the edit
        negative: the prompt of what neither shows
        values: settings
        seeds: one per pair
    """
    from minidiff.pictures import grid, save_png
    from minidiff.png_settings import picture_settings

    pairs = [image for pair in zip(images[: len(seeds)], images[len(seeds) :]) for image in pair]
    save_png(grid(pairs, columns=2), files[0], picture_settings(prompts, negative, values))
    told = [(prompt, seed) for prompt in prompts for seed in seeds]
    for (prompt, seed), image, file in zip(told, images, files[1:]):
        save_png(image, file, picture_settings([prompt], negative, values | {"Seed": seed, "Prompts of the pair": " | ".join(prompts)}))
