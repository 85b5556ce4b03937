"""`minidiff inspect`, `convert` and `compare`: checkpoints looked at, rewritten, and held against each other."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import tyro

from minidiff.cli.endings import finish, readers
from minidiff.cli.flags import DTypes, Text, check_least
from minidiff.cli.model import load, print_notes
from minidiff.cli.names import check_writable


def inspect(file: tyro.conf.Positional[Path], /, ignore: Text = None, verify: bool = False) -> None:
    """Describe a checkpoint, a LoRA, learned words or a Custom Diffusion, and what of it would be ignored.

        minidiff inspect v1-5-pruned-emaonly.safetensors

    Args:
        file: "tiny", a .safetensors or .ckpt file, a diffusers folder, or a small file that was learned
        ignore: a regular expression of unknown tensors to leave out
        verify: compare all numbers with the checksums in the file, as far as its format has some
    """
    import weights_loader

    print(weights_loader.inspect(file, ignore=ignore, verify=verify))


def convert(
    source: tyro.conf.Positional[str],
    target: tyro.conf.Positional[Path],
    /,
    dtype: DTypes = "auto",
    ema: bool = False,
    vae: str | None = None,
    prediction: Literal["eps", "v"] | None = None,
    ignore: Text = None,
    names: Text = None,
    model: Text = None,
) -> None:
    """Rewrite a checkpoint as one .safetensors file or a diffusers folder, or a small file in other names.

        minidiff convert v1-5-pruned-emaonly.safetensors sd15-folder
        minidiff convert lora.safetensors theirs.safetensors --names diffusers

    Args:
        source: "tiny", a .safetensors or .ckpt file, or a diffusers folder; or a LoRA, learned words or a Custom Diffusion
        target: a file name ending in .safetensors, or else the folder to make; of small files also .bin, .pt and .ckpt
        dtype: of the weights; the file's own by default
        ema: take the averaged weights, where a .ckpt holds both; the others are left out in any case
        vae: a VAE file to put in the place of the model's
        prediction: what the model predicts, eps or v, where its file is wrong about it
        ignore: a regular expression of unknown tensors in the checkpoint to leave out
        names: of a LoRA: kohya (by default) or diffusers; of learned words: diffusers (by default) or a1111
        model: the checkpoint that a LoRA is for, if it is of no public family, or that a Custom Diffusion was learned on
    """
    import torch

    import weights_loader

    check_writable(target)
    if weights_loader.small_kind(source):
        refuse_flags(
            {"dtype": dtype != "auto", "ema": ema, "vae": vae, "prediction": prediction, "ignore": None if model else ignore},
            f"a whole model, and {source} is small",
        )
        weights_loader.rewrite(source, target, names, load(model, "float32", "cpu", ignore=ignore) if model else None)
        finish(target, use=f"minidiff inspect {shlex.quote(str(target))}")
        return
    refuse_flags({"names": names, "model": model}, f"a small file, and {source} is a whole model")
    kept = "file" if dtype == "auto" else getattr(torch, dtype)
    print_notes(weights_loader.convert(source, target, dtype=kept, ema=ema, vae=vae, prediction=prediction, ignore=ignore))
    use = shlex.join(["minidiff", "generate", "...", "--model", str(target)])
    finish(target, use=use, read_by=readers("--model", "ldm" if target.suffix else "diffusers"))


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
    ignore: Text = None,
) -> None:
    """Run two checkpoints side by side and name the first layer that differs.

        minidiff compare v1-5-pruned-emaonly.safetensors another.safetensors

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
        ignore: a regular expression of unknown tensors in either file to leave out
    """
    from minidiff.compare import compare_models, config_differences

    check_least(0, tolerance=tolerance)
    first, second = load(a, dtype_a, "cpu", ignore=ignore), load(b, dtype_b, "cpu", ignore=ignore)
    differences = compare_models(first, second, prompt, t, seed)
    for line in config_differences(first, second):
        print(f"configurations differ in {line}")
    print(f"{'largest difference':>18}  {'relative':>9}  layer")
    for d in differences:
        if every or d.relative > tolerance:
            print(f"{d.absolute:18.3e}  {d.relative:9.2e}  {d.layer}")
    differing = next((d for d in differences if d.relative > tolerance), None)
    print(f"first layer that differs: {differing.layer}" if differing else f"all {len(differences)} layers agree to {tolerance:g}")


def refuse_flags(given: Mapping[str, object], of: str) -> None:
    """Raise ValueError for the first flag that was given and has no effect here."""
    for flag in (flag for flag, value in given.items() if value):
        raise ValueError(f"--{flag} is of {of}; leave it out")
