"""The command line: `minidiff generate`, `inspect`, `convert`, `compare`, `train METHOD`, `merge`, `compress`, `extract`, `evaluate WHAT`,
`bench WHAT`.

Each function is a command; its arguments and docstring are what `--help` shows. What a user can get wrong ends in one line and exit
code 2. The commands of training stand in cli/train.py, those that make small files of others in cli/merge.py, those that measure in
cli/evaluate.py and cli/bench.py; with bench/ these are the only places here that know of weights_loader. Imports that take long stand
inside the commands that need them.
"""

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import tyro

from minidiff.cli import bench, evaluate, merge, train
from minidiff.cli.flags import Attentions, DTypes, Several, numbers_of
from minidiff.cli.model import load, say, slug, weighted

CONFIG = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagCreatePairsOff)


def main() -> None:
    """Entry point of the `minidiff` command."""
    warnings.showwarning = lambda message, *rest: print(f"minidiff: {message}", file=sys.stderr)
    try:
        run(sys.argv[1:])
    except (ValueError, OSError, ImportError) as error:
        print(f"minidiff: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def run(args: list[str]) -> None:
    """Runs the command that the arguments name: one word, or two as `train lora`."""
    alone = {
        "generate": generate,
        "inspect": inspect,
        "convert": convert,
        "compare": compare,
        "compress": merge.compress,
        "extract": merge.extract,
    }
    groups = {
        "train": train.COMMANDS,
        "merge": {"lora": merge.merge_lora, "concepts": merge.merge_concepts},
        "evaluate": evaluate.COMMANDS,
        "bench": bench.COMMANDS,
    }
    if args[:1] and args[0] in groups:
        group, (name, *rest) = groups[args[0]], [*args[1:], ""][:1] + args[2:]
        if name in group:
            description = group[name].__doc__.split("\n\n    Args:")[0].replace("\n    ", "\n")
            if args[0] == "train":
                description += f"\n\n{numbers_of(name)}"
            tyro.cli(group[name], prog=f"minidiff {args[0]} {name}", description=description, args=rest, config=CONFIG)
            return
        if name not in ("", "-h", "--help"):
            raise ValueError(f"command {args[0] + ' ' + name!r} unknown; choose {', '.join(f'{args[0]} {known}' for known in group)}")
        out = sys.stdout if name else sys.stderr
        print(f"usage: minidiff {args[0]} {{{','.join(group)}}} ...\n\n{listed(group)}", file=out)
        sys.exit(0 if name else 2)
    # To tyro a command of two words is one argument: these are only listed.
    listing = {f"{first} {second}": function for first, group in groups.items() for second, function in group.items()}
    tyro.extras.subcommand_cli_from_dict(
        alone | listing, prog="minidiff", description="Stable Diffusion, every part written out.", args=args, config=CONFIG
    )


def listed(commands: dict[str, Callable]) -> str:
    """Their names, and the first line of what they do."""
    return "\n".join(f"  {name:18}  {command.__doc__.splitlines()[0]}" for name, command in commands.items())


def generate(
    prompts: tyro.conf.Positional[tuple[str, ...]],
    /,
    model: str = "tiny",
    negative: str = "",
    steps: int = 30,
    sampler: str = "ddim",
    guidance: float | None = None,
    seed: int = 0,
    batch: int = 1,
    size: str | None = None,
    spacing: str | None = None,
    eta: float = 0.0,
    vae: str | None = None,
    ema: bool = False,
    prediction: Literal["eps", "v"] | None = None,
    dtype: DTypes = "auto",
    device: str = "auto",
    attention: Attentions = "auto",
    lora: Several = (),
    embedding: Several = (),
    custom_diffusion: Several = (),
    out: Path | None = None,
) -> None:
    """Make pictures from words.

    Args:
        prompts: what a picture shows, in quotes; several make a picture each
        model: "tiny" (ships with minidiff), a .safetensors or .ckpt file, or a diffusers folder
        negative: what it should not show
        steps: how many steps the sampler takes
        sampler: its name; "list" prints all of them
        guidance: how strongly the picture follows the prompt; 1 is the prompt alone, without guidance; the model's own by default
        seed: where the noise comes from; the same seed gives the same picture
        batch: how many pictures of a prompt, on the seeds that follow
        size: in pixels, as 512 or 768x512; the model's own by default
        spacing: which timesteps are visited: leading, linspace or trailing; the model's own by default
        eta: how much fresh noise ddim adds at each step, 0 to 1
        vae: a VAE file to use instead of the model's
        ema: take the averaged weights, where a .ckpt holds both
        prediction: what the model predicts, eps or v, where its file is wrong about it
        dtype: of the weights; float32 on a CPU and the file's own on a GPU by default; bfloat16 takes about half the time on a CPU that has it
        device: auto, cpu, cuda, cuda:1, mps
        attention: how it is worked out: auto takes what is fastest; triton is this package's kernels, on a GPU
        lora: a LoRA file, or FILE:0.7 for a part of its change
        embedding: a file of learned words, for the prompts to use
        custom_diffusion: a Custom Diffusion file or folder
        out: a .png file, named after the prompt by default; several pictures make a grid, and stand beside it one by one
    """
    from tqdm import tqdm

    from minidiff.kernels.dispatch import attention_backend
    from minidiff.pictures import check_png, grid, save_png
    from minidiff.pipeline import to_images
    from minidiff.samplers import SAMPLERS

    if sampler == "list":
        print("\n".join(f"{name:16}  {row.web_name:16}  {row.help}" for name, row in SAMPLERS.items()))
        return
    if not prompts or batch < 1:
        raise ValueError(f"{len(prompts)} prompts and --batch {batch} make no picture; give at least one of each")
    out = out or free_name(f"{slug(prompts[0])}-{seed}")
    check_png(out)
    small = {"lora": weighted(lora), "embeddings": embedding, "custom_diffusion": custom_diffusion}
    sd = load(model, dtype, device, vae=vae, ema=ema, prediction=prediction, **small)
    pairs = [(prompt, seed + i) for prompt in prompts for i in range(batch)]
    guidance = sd.config.guidance_scale if guidance is None else guidance
    with attention_backend(attention):
        walk = sd.denoise(
            [prompt for prompt, _ in pairs],
            seeds=[seed for _, seed in pairs],
            steps=steps,
            sampler=sampler,
            guidance_scale=guidance,
            negative_prompt=negative,
            size=parse_size(size),
            spacing=spacing,
            eta=eta,
        )
        for last in tqdm(walk, total=steps, unit="step", file=sys.stderr):
            pass
        images = to_images(sd.decode(last.x_t))

    width, height = images[0].size
    schedule_type = SAMPLERS[sampler].own_spacing or spacing or sd.config.schedule.spacing
    settings = {
        "Steps": steps,
        "Sampler": sampler,
        "Schedule type": schedule_type,
        "CFG scale": guidance,
        "Seed": seed,
        "Batch": batch,
        "Size": f"{width}x{height}",
        "Model": model,
        "VAE": vae,
        "EMA": ema,
        "Prediction": prediction,
        "Eta": eta,
        "dtype": str(sd.dtype).removeprefix("torch."),
        "LoRA": " + ".join(lora) or None,
        "Embedding": " + ".join(embedding) or None,
        "Custom Diffusion": " + ".join(custom_diffusion) or None,
    }
    save_png(grid(images), out, parameters(" | ".join(prompts), negative, settings))
    if len(pairs) > 1:
        for number, ((prompt, one), image) in enumerate(zip(pairs, images)):
            name = f"{out.stem}-{one}.png" if len(prompts) == 1 else f"{out.stem}-{number}-{slug(prompt)}-{one}.png"
            save_png(image, out.with_name(name), parameters(prompt, negative, settings | {"Seed": one, "Batch": 1}))
    print(out)


def free_name(stem: str) -> Path:
    """A .png of this name, numbered if there is one already: without --out nothing is overwritten."""
    names = (Path(f"{stem}.png"), *(Path(f"{stem}-{i}.png") for i in range(2, 10_000)))
    return next(path for path in names if not path.exists())


def parameters(prompt: str, negative: str, settings: dict[str, object]) -> str:
    """The settings of a picture as the web interfaces write them: prompt, negative prompt, then names and values that were set."""
    lines = [prompt, f"Negative prompt: {negative}"] if negative else [prompt]
    given = [f"{name}: {value}" for name, value in settings.items() if value is not None and value is not False]
    return "\n".join([*lines, ", ".join(given)])


def inspect(file: tyro.conf.Positional[Path], /) -> None:
    """Say what a checkpoint is, what is in it and what would be ignored; or what a LoRA, learned words or a Custom Diffusion are.

    Args:
        file: "tiny", a .safetensors or .ckpt file, a diffusers folder, or a small file that was learned
    """
    import weights_loader

    print(weights_loader.inspect(file))


def convert(
    source: tyro.conf.Positional[str],
    target: tyro.conf.Positional[Path],
    /,
    dtype: DTypes = "auto",
    ema: bool = False,
    vae: str | None = None,
    prediction: Literal["eps", "v"] | None = None,
) -> None:
    """Rewrite a checkpoint: to one .safetensors file in the original's names, or to a diffusers folder.

    Args:
        source: "tiny", a .safetensors or .ckpt file, or a diffusers folder
        target: a file name ending in .safetensors, or else the folder to make
        dtype: of the weights; the file's own by default
        ema: take the averaged weights, where a .ckpt holds both; the others are left out in any case
        vae: a VAE file to put in the place of the model's
        prediction: what the model predicts, eps or v, where its file is wrong about it
    """
    import torch

    import weights_loader

    dtype = "file" if dtype == "auto" else getattr(torch, dtype)
    say(weights_loader.convert(source, target, dtype=dtype, ema=ema, vae=vae, prediction=prediction))
    print(target)


def compare(
    a: tyro.conf.Positional[str],
    b: tyro.conf.Positional[str],
    /,
    prompt: str = "a cat",
    t: int = 500,
    seed: int = 0,
    dtype_a: DTypes = "auto",
    dtype_b: DTypes = "auto",
    tolerance: float = 1e-5,
    every: bool = False,
) -> None:
    """Run two checkpoints side by side and say where they first differ, layer by layer.

    Args:
        a: a checkpoint, as for generate
        b: another, or the same with another dtype
        prompt: the words both are given
        t: the timestep the U-Nets are asked at, 0 to 999
        seed: of the latent both are given
        dtype_a: of the first one's weights
        dtype_b: of the second one's weights
        tolerance: the largest difference that counts as none, relative to the layer's largest value
        every: show every layer, not only those that differ
    """
    from minidiff.compare import compare_models, config_differences

    first, second = load(a, dtype_a, "cpu"), load(b, dtype_b, "cpu")
    differences = compare_models(first, second, prompt, t, seed)
    for line in config_differences(first, second):
        print(f"configurations differ in {line}")
    print(f"{'largest difference':>18}  {'relative':>9}  layer")
    for d in differences:
        if every or d.relative > tolerance:
            print(f"{d.absolute:18.3e}  {d.relative:9.2e}  {d.layer}")
    differing = next((d for d in differences if d.relative > tolerance), None)
    print(f"first layer that differs: {differing.layer}" if differing else f"all {len(differences)} layers agree to {tolerance:g}")


def parse_size(size: str | None) -> int | tuple[int, int] | None:
    """'512' or '768x512' (width x height)."""
    if size is None:
        return None
    numbers = size.lower().split("x")
    if len(numbers) > 2 or not all(number.isdecimal() for number in numbers):
        raise ValueError(f"--size {size}: give pixels as 512, or width x height as 768x512")
    return int(numbers[0]) if len(numbers) == 1 else (int(numbers[0]), int(numbers[1]))
