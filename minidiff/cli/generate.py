"""`minidiff generate`: pictures from words, each PNG with the settings that make it again."""

import sys
from collections import deque
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from minidiff import __version__
from minidiff.cli.control import parse_controls, steer
from minidiff.cli.edit import EditFlags, check_model, prepare_edit, read_edit
from minidiff.cli.flags import Attentions, DTypes, File, Several, Text
from minidiff.cli.heat import heat_file, new_heat_maps, write_heat_maps
from minidiff.cli.model import load, named, print_notes, unused_words, weighted
from minidiff.cli.names import check_writable, free_path, slug

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from minidiff.pipeline import StableDiffusion


def generate(
    prompts: tyro.conf.Positional[tuple[str, ...]],
    /,
    model: str = "tiny",
    negative_prompt: str | None = None,
    prompt_2: str | None = None,
    empty_negative: Literal["encoded", "zeros"] | None = None,
    steps: int = 30,
    sampler: str = "ddim",
    guidance_scale: float | None = None,
    seed: int = 0,
    batch: int = 1,
    size: str | None = None,
    original_size: str | None = None,
    crop: str | None = None,
    target_size: str | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
    vae: str | None = None,
    ema: bool = False,
    prediction: Literal["eps", "v"] | None = None,
    ignore: Text = None,
    dtype: DTypes = "auto",
    device: str = "auto",
    offload: bool = False,
    attention: Attentions = "auto",
    lora: Several = (),
    embedding: Several = (),
    custom_diffusion: Several = (),
    control: Several = (),
    controlnet: Several = (),
    guess_mode: bool = False,
    heat_maps: bool = False,
    settings: File = None,
    out: Path | None = None,
    edit: EditFlags = EditFlags(),
) -> None:
    """Make pictures from words, or from a picture and words.

    Args:
        prompts: what a picture shows, in quotes; one picture for each. (small:1.3) makes a word count more, (small:0.7) less
        model: "tiny" (ships with minidiff), a .safetensors or .ckpt file, or a diffusers folder
        negative_prompt: what it should not show
        prompt_2: another prompt for SDXL's second text encoder
        empty_negative: what SDXL is given where nothing is negative: zeros (without --negative-prompt) or the empty prompt encoded (with
            --negative-prompt "") by default
        steps: how many steps the sampler takes
        sampler: its name; "list" prints all of them
        guidance_scale: how strongly the picture follows the prompt; 1 is the prompt alone, without guidance; the model's own by default
        seed: where the noise comes from; the same seed gives the same picture
        batch: how many pictures of a prompt, on consecutive seeds
        size: in pixels, as 512 or 768x512; the model's own by default (its shorter side, of a picture in another shape)
        original_size: what SDXL is told of the size of the picture before it was scaled, as 1024x1024; the picture's own by default
        crop: what it is told was cut off, left x top, as 0x128; nothing by default
        target_size: what it is told of the size of the picture itself; its own by default
        spacing: which timesteps are visited: leading, linspace or trailing; the model's own by default
        eta: how much fresh noise ddim adds at each step, 0 to 1
        vae: a VAE file to use instead of the model's
        ema: take the averaged weights, where a .ckpt holds both
        prediction: what the model predicts, eps or v, where its file is wrong about it
        ignore: a regular expression of unknown tensors in the model's file to leave out
        dtype: of the weights; float32 on a CPU and the file's own on a GPU by default; bfloat16 takes about half the time on a CPU that
            has it
        device: auto, cpu, cuda, cuda:1, mps
        offload: keep the parts of the model in main memory and move each to the device while it runs; slower, for small GPUs
        attention: how it is computed: auto takes what is fastest; triton is this package's kernels, on a GPU
        lora: a LoRA file, or FILE:0.7 for a part of its change
        embedding: a file of learned words, for the prompts to use; FILE:WORD gives its word another name
        custom_diffusion: a Custom Diffusion file or folder
        control: a hint that a ControlNet follows, such as a picture of edges (see `minidiff hint`), or a folder with one for each picture
        controlnet: a ControlNet file or folder, FILE or FILE:scale:start:end, as net.safetensors:0.8:0:0.5 for the first half of the steps;
            --control and --controlnet may be given several times, in the same order
        guess_mode: let the hint decide what is seen, also without a prompt; a guidance scale of 3 to 5 suits it
        heat_maps: also write a sheet of where each word was looked at, NAME-heat.png
        settings: a picture that generate or a web interface made, to make it again; flags and prompts beside it win over its own
        out: a .png file, named after the prompt by default; several pictures make a grid, with each picture in a file alongside
        edit: start from a picture
    """
    from tqdm import tqdm

    from minidiff.editing.start import Sampling, find_start
    from minidiff.kernels.dispatch import attention_backend
    from minidiff.pictures import check_png
    from minidiff.pipeline import to_images
    from minidiff.samplers import SAMPLERS, levels
    from minidiff.two_encoders import SizeNumbers, told

    if sampler == "list":
        web_names = {name: f"{row.web_name} {row.web_schedule or row.own_spacing or ''}".strip() for name, row in SAMPLERS.items()}
        print("\n".join(f"{name:16}  {web_names[name]:16}  {row.help}" for name, row in SAMPLERS.items()))
        return
    if not prompts or batch < 1:
        raise ValueError(f"{len(prompts)} prompts and --batch {batch} make no picture; give at least one of each")
    pairs = [(prompt, seed + i) for prompt in prompts for i in range(batch)]
    files = picture_files(out, prompts, pairs)
    for file in files:
        check_png(file)
        check_writable(file)
    sheet = heat_file(files[0]) if heat_maps else None
    requests = parse_controls(control, controlnet)
    if guess_mode and not requests:
        raise ValueError("--guess-mode without a ControlNet; give --control and --controlnet, or leave it out")
    pictures = read_edit(edit)
    if requests and pictures is not None:
        raise ValueError("--controlnet and --image together are for Python: sd.denoise takes start, x and model; leave one of them out")
    sd = load(
        model,
        dtype,
        device,
        offload=offload,
        vae=vae,
        ema=ema,
        prediction=prediction,
        ignore=ignore,
        lora=weighted(lora),
        embeddings=named(embedding),
        custom_diffusion=custom_diffusion,
    )
    check_model(edit, sd)
    negative = resolve_negative(negative_prompt, empty_negative, len(sd.text.encoders))
    read_weights(sd, [*prompts, negative or ""])
    sizes = SizeNumbers(
        original=parse_pair("original-size", original_size),
        crop=parse_pair("crop", crop) or (0, 0),
        target=parse_pair("target-size", target_size),
    )
    sd.text = told(sd.text, prompt_2, sizes)
    print_notes(unused_words(sd.tokenizer, [*prompts, prompt_2 or "", negative or ""]))
    texts, seeds = [prompt for prompt, _ in pairs], [seed for _, seed in pairs]
    guidance_scale = sd.config.guidance_scale if guidance_scale is None else guidance_scale
    if negative_prompt and guidance_scale == 1:
        print_notes(["--negative-prompt has no effect at --guidance-scale 1, which draws the prompt alone; give a larger scale"])
    if spacing and sampler in SAMPLERS and SAMPLERS[sampler].own_spacing:
        print_notes([f"--spacing has no effect on the sampler {sampler}, which has its own"])
    sampling, left = Sampling(steps, sampler, guidance_scale, negative, spacing, eta), steps
    with attention_backend(attention):
        if pictures is None:
            job, wanted = None, sd.pixel_size(parse_size(size))
            timesteps = [level.t for level in levels(sd.schedule, sampler, steps, spacing)[:-1]]
            steered = steer(sd, requests, count=len(pairs), size=wanted, timesteps=timesteps, guess_mode=guess_mode)
            trajectory = sd.denoise(texts, seeds=seeds, size=wanted, model=steered, **asdict(sampling))
        else:
            job = prepare_edit(edit, pictures, sd, parse_size(size))
            trajectory = job.denoise(sd, texts, seeds, sampling)
            start = find_start(sd.schedule, job.strength, sampling)
            left = steps - start.index
            print_notes([str(start)])
        heat = None if sheet is None else new_heat_maps(sd, texts)
        trajectory = trajectory if heat is None else heat.watch(trajectory, sd.unet)
        (last,) = deque(tqdm(trajectory, total=left, unit="step", file=sys.stderr), maxlen=1)
        pixels = sd.decode(last.x_t)
        images = to_images(pixels if job is None else job.finish(pixels))
    row = SAMPLERS[sampler]
    values = {
        "Steps": steps,
        "Sampler": row.web_name,
        "Schedule type": row.web_schedule or row.own_spacing,
        "CFG scale": guidance_scale,
        "Seed": seed,
        "Size": f"{images[0].width}x{images[0].height}",
        "Prompt 2": prompt_2,
        "Empty negative": empty_negative if empty_negative or negative != "" else "encoded",
        "Original size": original_size,
        "Crop": crop,
        "Target size": target_size,
        "Model": model,
        "VAE": vae,
        "EMA": ema,
        "Prediction": prediction,
        "Ignore": ignore,
        "Spacing": None if row.own_spacing else spacing or sd.config.schedule.spacing,
        "Eta DDIM": eta or None,
        "RNG": "CPU",
        "dtype": str(sd.dtype).removeprefix("torch."),
        "LoRA": lora,
        "Embedding": embedding,
        "Custom Diffusion": custom_diffusion,
        "Control": control,
        "ControlNet": controlnet,
        "Guess mode": guess_mode,
        **edit.settings(),
        "Version": f"minidiff {__version__}",
    }
    write_pictures(files, images, prompts, pairs, negative or "", values, batch)
    if sheet is not None and heat is not None:
        write_heat_maps(sheet, heat, sd, texts, pixels)
    print(files[0])


def picture_files(out: Path | None, prompts: tuple[str, ...], pairs: list[tuple[str, int]]) -> list[Path]:
    """Return the names of all files: of the picture, or of the grid and each picture in it. Only `out` may be a file that is there.

    Args:
        out: the first one; a free name made of the first prompt and its seed by default
        prompts: those that were given
        pairs: prompt and seed of each picture
    """
    out = out or free_path(Path(f"{slug(prompts[0])}-{pairs[0][1]}.png"))
    if len(pairs) == 1:
        return [out]
    alone = len(prompts) == 1
    names = [f"{out.stem}-{seed}.png" if alone else f"{out.stem}-{i}-{slug(prompt)}-{seed}.png" for i, (prompt, seed) in enumerate(pairs)]
    return [out, *(free_path(out.with_name(name)) for name in names)]


def write_pictures(
    files: list[Path],
    images: "list[Image.Image]",
    prompts: tuple[str, ...],
    pairs: list[tuple[str, int]],
    negative_prompt: str,
    values: dict[str, object],
    batch: int,
) -> None:
    """Write the picture, or the grid of several and each of them alongside.

    Args:
        files: as `picture_files` names them
        images: the pictures
        prompts: those that were given
        pairs: prompt and seed of each picture
        negative_prompt: of all
        values: settings of all, under the names that web interfaces use
        batch: pictures of each prompt
    """
    from minidiff.pictures import grid, save_png
    from minidiff.png_settings import picture_settings

    size = {"Batch size": batch} if batch > 1 else {}
    save_png(grid(images), files[0], picture_settings(prompts, negative_prompt, values | size))
    for (prompt, seed), image, file in zip(pairs, images, files[1:]):
        save_png(image, file, picture_settings([prompt], negative_prompt, values | {"Seed": seed}))


def read_weights(sd: "StableDiffusion", prompts: "Sequence[str]") -> None:
    """Let a model with one text encoder read weights and prompts of any length, and say which prompts are long.

    Raises ValueError for a weight in a prompt for two text encoders.
    """
    from minidiff.editing.prompt_weights import WeightedText, parse_weights

    parts = {prompt: parse_weights(prompt) for prompt in prompts}
    if len(sd.text.encoders) > 1:
        if weighted := next((prompt for prompt, own in parts.items() if any(part.weight != 1 for part in own)), None):
            raise ValueError(f"prompt {weighted!r} has weights, which a model with two text encoders does not read; leave them out")
        return
    sd.text = text = WeightedText(sd.text.tokenizers, sd.text.encoders)
    room = sd.config.tokenizer.context_length - 2
    print_notes(
        f"a prompt of {sum(map(len, chunks))} tokens is read in {len(chunks)} chunks; the model reads {room} at once"
        for own in parts.values()
        if len(chunks := text.chunks(own)) > 1
    )


def resolve_negative(prompt: str | None, empty: str | None, encoders: int) -> str | None:
    """Return the negative prompt, where None means zeros for a model with two text encoders, and "" is encoded.

    Raises ValueError for zeros that a model with one encoder does not know.
    """
    if encoders == 1 and empty == "zeros":
        raise ValueError("--empty-negative zeros: this model has one text encoder, and was trained with the empty prompt; leave it out")
    if prompt:
        return prompt
    return {None: prompt, "encoded": "", "zeros": None}[empty]


def parse_pair(flag: str, text: str | None) -> tuple[int, int] | None:
    """Read '768x512'. Raises ValueError, naming the flag, for anything else."""
    if text is None:
        return None
    numbers = text.lower().split("x")
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"--{flag} {text}: give two numbers of pixels, as 768x512")
    return int(numbers[0]), int(numbers[1])


def parse_size(size: str | None) -> int | tuple[int, int] | None:
    """Read '512' or '768x512' (width x height)."""
    if size is None:
        return None
    numbers = size.lower().split("x")
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"--size {size}: give pixels as 512, or width x height as 768x512")
    return int(numbers[0]) if len(numbers) == 1 else (int(numbers[0]), int(numbers[1]))
