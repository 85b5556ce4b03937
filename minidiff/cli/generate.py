"""`minidiff generate`: pictures from words, each PNG with the settings that make it again."""

import shlex
import sys
from collections import deque
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from minidiff import __version__
from minidiff.cli.advice import negative_notes, size_notes, syntax_notes, word_notes
from minidiff.cli.control import parse_controls, steer
from minidiff.cli.edit import EditFlags, check_model, prepare_edit, read_edit
from minidiff.cli.endings import finish
from minidiff.cli.flags import Attentions, DTypes, File, Several, Text
from minidiff.cli.heat import heat_file, new_heat_maps, write_heat_maps
from minidiff.cli.model import load, named, print_notes, unused_words, weighted
from minidiff.cli.picture_files import check_files, check_zoom, choose_seeds, enlarge, picture_files, read_prompts, write_pictures

if TYPE_CHECKING:
    from collections.abc import Sequence

    from minidiff.conditioning import TextSide
    from minidiff.pipeline import StableDiffusion
    from minidiff.two_encoders import SizeNumbers


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
    seeds: Text = None,
    prompts_file: File = None,
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
    zoom: int = 1,
    zoom_filter: Literal["lanczos", "nearest"] = "lanczos",
    out: Path | None = None,
    edit: EditFlags = EditFlags(),
) -> None:
    """Make pictures from words, or from a picture and words.

        minidiff generate "a fox on a green background" --batch 4 --out foxes.png
        minidiff generate "a dog on a green background" --image fox.png --strength 0.5

    Args:
        prompts: what a picture shows, in quotes; one picture for each. (small:1.3) makes a word count more, (small:0.7) less
        model: "tiny" (ships with minidiff), a .safetensors or .ckpt file, or a diffusers folder
        negative_prompt: what it should not show
        prompt_2: another prompt for SDXL's second text encoder
        empty_negative: what SDXL is given where nothing is negative: zeros (without --negative-prompt) or the empty prompt encoded (with
            --negative-prompt "") by default
        steps: how many steps the sampler takes
        sampler: its name; `minidiff list samplers` shows all of them
        guidance_scale: how strongly the picture follows the prompt; 1 is the prompt alone, without guidance; the model's own by
            default: 7.5 of Stable Diffusion 1 and 2, 5 of XL
        seed: where the noise comes from; the same seed gives the same picture
        batch: how many pictures of a prompt, on consecutive seeds
        seeds: a picture of each prompt for each of these, as 0-8 or 3,7,9
        prompts_file: a text file with a prompt per line, beside those that are given here
        size: in pixels, as 512 or 768x512; the model's own by default, 512 of Stable Diffusion 1, 512 or 768 of 2, 1024 of XL (its shorter
            side, of a picture in another shape)
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
        zoom: how many times wider and higher the files are, for viewing
        zoom_filter: how they are enlarged: lanczos is smooth, nearest shows every pixel as a square
        out: a .png file, named after the prompt by default, or a folder; several pictures make a sheet, with each in a file alongside
        edit: start from a picture
    """
    from tqdm import tqdm

    from minidiff.editing.start import Sampling, find_start
    from minidiff.kernels.dispatch import attention_backend
    from minidiff.pipeline import to_images
    from minidiff.samplers import SAMPLERS, levels
    from minidiff.two_encoders import SizeNumbers
    from weights_loader.contents import BUNDLED

    prompts = (*prompts, *read_prompts(prompts_file))
    check_zoom(zoom)
    if not prompts or batch < 1:
        raise ValueError(f"{len(prompts)} prompts and --batch {batch} make no picture; give at least one of each")
    chosen_seeds = choose_seeds(seed, batch, seeds)
    pairs = [(prompt, one) for prompt in prompts for one in chosen_seeds]
    files = picture_files(out, prompts, pairs)
    sheet = heat_file(files[0]) if heat_maps else None
    check_files(out, files if sheet is None else [*files, sheet])
    print_notes(syntax_notes([*prompts, negative_prompt or ""]))
    requests = parse_controls(control, controlnet)
    if guess_mode and not requests:
        raise ValueError("--guess-mode without a ControlNet; give --control and --controlnet, or leave it out")
    pictures = read_edit(edit)
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
    negative = resolve_negative(negative_prompt, empty_negative)
    read_weights(sd, [*prompts, *([prompt_2] if prompt_2 else []), negative or ""])
    sizes = SizeNumbers(
        original=parse_pair("original-size", original_size),
        crop=parse_pair("crop", crop) or (0, 0),
        target=parse_pair("target-size", target_size),
    )
    sd.text = tell(sd.text, prompt_2, sizes, zeros=empty_negative == "zeros")
    print_notes(unused_words(sd.tokenizer, [*prompts, prompt_2 or "", negative or ""]))
    if model in BUNDLED and not (lora or custom_diffusion):
        print_notes(word_notes([*prompts, negative_prompt or ""], sd.tokenizer.added))
    texts, each_seed = [prompt for prompt, _ in pairs], [one for _, one in pairs]
    guidance_scale = sd.config.guidance_scale if guidance_scale is None else guidance_scale
    print_notes(negative_notes(negative_prompt, guidance_scale))
    if spacing and sampler in SAMPLERS and SAMPLERS[sampler].own_spacing:
        print_notes([f"--spacing has no effect on the sampler {sampler}, which has its own"])
    sampling, left = Sampling(steps, sampler, guidance_scale, negative, spacing, eta), steps
    with attention_backend(attention):
        if pictures is None:
            job, wanted = None, sd.pixel_size(parse_size(size))
            print_notes(size_notes(wanted, sd.config.image_size))
            timesteps = [level.t for level in levels(sd.schedule, sampler, steps, spacing)[:-1]]
            sd.check_channels()
            print_notes(size_advice(sd, wanted))
            steered = steer(sd, requests, count=len(pairs), size=wanted, timesteps=timesteps, guess_mode=guess_mode)
            model_asked = steered(sd.predict) if steered else None
            trajectory = sd.denoise(texts, seeds=each_seed, size=wanted, model=model_asked, **asdict(sampling))
        else:
            job = prepare_edit(edit, pictures, sd, parse_size(size))
            start = find_start(sd.schedule, job.strength, sampling)
            timesteps = [level.t for level in sampling.levels(sd.schedule)[start.index : -1]]
            acting = requests if timesteps else []  # strength 0 asks no model
            steered = steer(sd, acting, count=len(pairs), size=job.size, timesteps=timesteps, guess_mode=guess_mode, frame=job.frame)
            trajectory = job.denoise(sd, texts, each_seed, sampling, steered)
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
        "Seed": chosen_seeds[0],
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
        "Zoom": zoom if zoom > 1 else None,
        "Zoom filter": zoom_filter if zoom > 1 else None,
        **edit.settings(job),
        "Version": f"minidiff {__version__}",
    }
    enlarged = [enlarge(image, zoom, zoom_filter) for image in images]
    write_pictures(files, enlarged, prompts, pairs, negative or "", values, seeds)
    if sheet is not None and heat is not None:
        write_heat_maps(sheet, heat, sd, texts, pixels)
    what = f"{enlarged[0].width} x {enlarged[0].height} pixels, seed {chosen_seeds[0]}"
    what = what if len(files) == 1 else f"a sheet of {len(images)} pictures, each in a file alongside"
    finish(files[0], what, use=shlex.join(["minidiff", "generate", "--settings", str(files[0])]))


def read_weights(sd: "StableDiffusion", prompts: "Sequence[str]") -> None:
    """Let a model read weights and prompts of any length, and say which prompts are long."""
    from minidiff.editing.prompt_weights import parse_weights, split_chunks, weighted_side

    sd.text = weighted_side(sd.text)
    for prompt in prompts:
        parts = parse_weights(prompt)
        chunks = max((split_chunks(tokenizer, parts) for tokenizer in sd.text.tokenizers.values()), key=len)
        if len(chunks) > 1:
            room = sd.config.tokenizer.context_length - 2
            print_notes([f"a prompt of {sum(map(len, chunks))} tokens is read in {len(chunks)} chunks; the model reads {room} at once"])


def tell(text: "TextSide", prompt_2: str | None, sizes: "SizeNumbers", zeros: bool) -> "TextSide":
    """Return a text side that is told what was asked for. Raises ValueError, naming the flags, for one that has no field for it.

    Args:
        text: of the model
        prompt_2: for the second encoder
        sizes: what the U-Net is told
        zeros: no negative prompt means zeros, whatever the model's own is
    """
    told: dict[str, Any] = {"prompt_2": prompt_2, "sizes": None if sizes == type(sizes)() else sizes, "zero_negative": zeros or None}
    told = {name: value for name, value in told.items() if value is not None}
    flags = {"prompt_2": f"--prompt-2 {prompt_2!r}", "sizes": f"{sizes}", "zero_negative": "--empty-negative zeros"}
    if unknown := [flags[name] for name in told if not hasattr(text, name)]:
        raise ValueError(f"{', '.join(unknown)}: this model has one text encoder and is told no sizes; leave it out")
    return replace(text, **told)


def resolve_negative(prompt: str | None, empty: str | None) -> str | None:
    """Return the negative prompt, where None means zeros for a model that was trained with them, and "" is encoded."""
    if prompt:
        return prompt
    return {None: prompt, "encoded": "", "zeros": None}[empty]


def size_advice(sd: "StableDiffusion", size: tuple[int, int]) -> list[str]:
    """Return a note where a model that is told sizes, which it has learned for about one area, is asked for another one."""
    from minidiff.trainers.data.buckets import nearest_bucket

    own = sd.config.image_size
    if sd.config.unet.pooled_width is None or own % 16 or 0.75 <= size[0] * size[1] / own**2 <= 1.25:
        return []
    width, height = nearest_bucket(*size, own, own // 16)
    return [f"the model was trained on pictures of about {own} x {own} pixels; of this shape that is --size {width}x{height}"]


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
