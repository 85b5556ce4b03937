"""The commands that make files of files: `minidiff merge lora`, `merge concepts`, `compress`, `extract`."""

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from minidiff.cli.endings import finish, readers
from minidiff.cli.flags import DTypes, File, Number, Several, Text, Whole
from minidiff.cli.model import load, print_notes, weighted
from minidiff.cli.names import check_writable
from minidiff.trainers.methods.options import family_of

if TYPE_CHECKING:
    from minidiff.pipeline import StableDiffusion
    from minidiff.tokenizer import Tokenizer

REGULARISATION = 1000  # captions; as many as the authors' program takes
Files = tyro.conf.Positional[Annotated[tuple[str, ...], tyro.conf.arg(metavar="FILE ...", help_behavior_hint="")]]


def merge_lora(files: Files, /, out: Path, model: str = "tiny", dtype: DTypes = "auto", ignore: Text = None) -> None:
    """Put LoRAs into a checkpoint's weights, and write the checkpoint.

        minidiff merge lora runs/lora/lora.safetensors:0.8 --model tiny --out merged.safetensors

    Args:
        files: LoRA files, each as FILE or FILE:0.7
        out: a file name ending in .safetensors, or else the diffusers folder to make
        model: the checkpoint, as for generate
        dtype: of the weights that are written; the model's own by default
        ignore: a regular expression of unknown tensors in the model's file to leave out
    """
    import torch

    import weights_loader
    from minidiff.adapters import lora

    if not files:
        raise ValueError("no LoRA to merge; give at least one file")
    check_out(out, (".safetensors", ""))
    sd = weights_loader.load(model, dtype="file" if dtype == "auto" else getattr(torch, dtype), ignore=ignore)
    print_notes(sd.notes)
    for path, weight in weighted(files):
        one = weights_loader.read_lora(path, sd)
        print_notes(weights_loader.base_notes(path, sd))
        one.weight = weight
        lora.merge_lora(sd, one)
    layout = "ldm" if out.suffix else "diffusers"
    weights_loader.save(sd, out, layout)
    finish_small(out, "--model", layout, sd)


def merge_concepts(
    files: Files,
    /,
    out: Path,
    model: str = "tiny",
    target: Several = (),
    captions: File = None,
    ridge: float = 0.0,
    ignore: Text = None,
) -> None:
    """Make one Custom Diffusion of several without training, in closed form (Kumari et al. 2023, eq. 4).

        minidiff merge concepts cat.safetensors dog.safetensors --out both.safetensors

    Each concept keeps what its captions ask for. Their words should have been learned from different rare words (--start): two that
    began alike may still be too near to be told apart.

    Args:
        files: Custom Diffusion files of one concept or more each
        out: the file, ending in .safetensors, .bin or .ckpt, or else the diffusers folder to make
        model: the checkpoint that they were learned on
        target: a caption whose words should look as learned, for the file whose word it holds; "photo of a <word>" by default
        captions: a text file with a caption a line, about 1000, that should stay as they are; those of the bundled scenes by default
        ridge: added to the diagonal where the captions do not suffice, as 1e-3
        ignore: a regular expression of unknown tensors in the model's file to leave out
    """
    import weights_loader
    from minidiff.adapters import merge_concepts as closed_form

    if len(files) < 2:
        raise ValueError(f"{len(files)} files to merge; give at least two")
    check_out(out, (".safetensors", ".bin", ".ckpt", ""))
    sd = load(model, "float32", "cpu", ignore=ignore)
    regularisation = read_captions(captions, sd)
    concepts = [weights_loader.read_custom_diffusion(file, sd) for file in files]
    targets = targets_of(sd.tokenizer, files, [concept.tokens.names if concept.tokens else () for concept in concepts], target)
    merged, report = closed_form.merge_concepts(sd, concepts, targets, regularisation, ridge)
    settings = {"method": "merge", "files": [Path(file).name for file in files], "captions": targets, "ridge": ridge}
    weights_loader.write_custom_diffusion(out, merged, sd, settings if out.suffix in (".safetensors", "") else None)
    print_notes(
        [
            f"constraints  {report.rows} tokens of {sum(map(len, targets))} captions, met to {report.residual:.1e} of their size",
            f"drift        {report.drift:.2%} of the keys and values of {report.regularisation_rows} tokens that should stay",
            f"condition    {report.condition:.1e} of the constraints, {report.regularisation_condition:.1e} of what should stay",
            f"time         {report.seconds:.2f} s",
        ]
    )
    finish_small(out, "--custom-diffusion", spelling(out), sd, model)


def compress(
    file: tyro.conf.Positional[str],
    /,
    out: Path,
    model: str = "tiny",
    share: float = 0.6,
    rank: Whole = None,
    ignore: Text = None,
) -> None:
    """Make a Custom Diffusion smaller by keeping the largest singular values of its changes.

        minidiff compress custom-diffusion.safetensors --share 0.6 --out small.safetensors

    Args:
        file: the Custom Diffusion
        out: the file, ending in .safetensors, .bin or .ckpt
        model: the checkpoint that it was learned on
        share: of the sum of singular values to keep
        rank: keep this many instead
        ignore: a regular expression of unknown tensors in the model's file to leave out
    """
    import weights_loader
    from minidiff.adapters import custom_diffusion

    check_out(out, (".safetensors", ".bin", ".ckpt"))
    sd = load(model, "float32", "cpu", ignore=ignore)
    delta = weights_loader.read_custom_diffusion(file, sd)
    small = custom_diffusion.compress(delta.deltas(sd), share, rank)
    settings = {"method": "compress", "file": Path(file).name, **({"rank": rank} if rank else {"share": share})}
    weights_loader.write_custom_diffusion(out, delta, sd, settings if out.suffix == ".safetensors" else None, small)
    ranks = sorted(u.shape[1] for u, _ in small.layers.values())
    print_notes(
        [
            f"ranks {ranks[0]} to {ranks[-1]}: {small.size / 1e6:.2f} MB of changes in place of {small.full_size / 1e6:.2f} MB",
            f"error {small.error:.1%} of the changes' norm",
        ]
    )
    finish_small(out, "--custom-diffusion", spelling(out), sd, model)


def extract(
    base: tyro.conf.Positional[str],
    tuned: tyro.conf.Positional[str],
    /,
    out: Path,
    rank: Whole = None,
    share: Number = None,
    of: Literal["sum", "frobenius", "ratio"] = "sum",
    clamp: float = 1.0,
    layers: Several = (),
    names: Literal["kohya", "diffusers"] = "kohya",
    ignore: Text = None,
) -> None:
    """Make a LoRA of the difference between two checkpoints, by singular values.

        minidiff extract tiny runs/tuned/model.safetensors --rank 8 --out extracted.safetensors

    Args:
        base: the checkpoint before, as for generate
        tuned: the checkpoint after
        out: the LoRA's file, ending in .safetensors
        rank: how many singular values are kept, or with --share at most; 32 without either
        share: keep as many as make up this share
        of: share of their sum, of the norm of the change (frobenius), or of the largest one (ratio)
        clamp: cut the factors off at this quantile, as kohya at 0.99; 1 does not, and is nearer
        layers: attention, transformer, conv, text_encoder, or regular expressions over layer names; conv and text_encoder by default
        names: of the layers in the file
        ignore: a regular expression of unknown tensors in either checkpoint to leave out
    """
    import weights_loader
    from minidiff.adapters.extraction import extract_lora
    from minidiff.adapters.lora import PATTERNS

    check_out(out, (".safetensors",))
    rank = 32 if rank is None and share is None else rank
    first, second = (load(file, "float32", "cpu", ignore=ignore) for file in (base, tuned))
    patterns = tuple(pattern for name in layers or ("conv", "text_encoder") for pattern in PATTERNS.get(name, (name,)))
    made = extract_lora(first, second, patterns, rank=rank, energy=share, criterion=of, clamp=clamp)
    settings: dict[str, object] = {"method": "extract", "base": Path(base).name, "tuned": Path(tuned).name}
    weights_loader.write_lora(out, made, first, names, settings | {"rank": rank, "share": share, "of": of, "clamp": clamp})
    ranks = sorted(layer.rank for layer in made.layers.values())
    print_notes([f"{len(ranks)} layers that differ, ranks {ranks[0]} to {ranks[-1]}"])
    finish_small(out, "--lora", names, first, base)


def finish_small(out: Path, flag: str, names: str, sd: "StableDiffusion", model: str = "tiny") -> None:
    """Print what was made and the command that uses it.

    Args:
        out: the file or folder
        flag: of generate, which takes it
        names: its spelling
        sd: the model it is for
        model: the name of that model, for a file that is not one itself
    """
    with_model = [] if model == "tiny" else ["--model", model]
    use = shlex.join(["minidiff", "generate", "...", *with_model, flag, str(out)])
    finish(out, use=use, read_by=readers(flag, names, family_of(sd.config)))


def spelling(out: Path) -> str:
    """Return the spelling of a Custom Diffusion that is written under this name."""
    return {".safetensors": "minidiff", "": "diffusers"}.get(out.suffix, "original")


def check_out(out: Path, suffixes: tuple[str, ...]) -> None:
    """Raise ValueError or OSError for a name that cannot be written, before any work is done."""
    if out.suffix not in suffixes:
        expected = " or ".join(suffix or "no suffix (a folder)" for suffix in suffixes)
        raise ValueError(f"--out {out}: expected a name with {expected}")
    check_writable(out)


def read_captions(path: Path | None, sd: "StableDiffusion") -> list[str]:
    """Read one caption per line, or make the bundled scenes' for a model that knows them."""
    import numpy as np

    from minidiff.scenes.scenes import sample_scene

    if path is not None:
        return [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    if family_of(sd.config) != "bundled":
        raise ValueError("no captions that should stay as they are; give --captions FILE, a text file with about 1000 of them, one a line")
    return [sample_scene(np.random.default_rng([0, i])).caption for i in range(REGULARISATION)]


def targets_of(tokenizer: "Tokenizer", files: tuple[str, ...], words: list[tuple[str, ...]], given: tuple[str, ...]) -> list[list[str]]:
    """Return for each file the captions with one of its words: those given, or the ones it was learned with, or "photo of a <word>".

    Args:
        tokenizer: says what a word of a caption is
        files: Custom Diffusion files
        words: of each file
        given: captions of the command line
    """
    from minidiff.trainers.methods.common import names_token

    targets = [[caption for caption in given if any(names_token(tokenizer, caption, word) for word in own)] for own in words]
    if stray := [caption for caption in given if not any(caption in own for own in targets)]:
        every = ", ".join(word for own in words for word in own)
        raise ValueError(f"--target {stray[0]!r} holds none of the learned words {every}")
    return [own or learned_captions(file, names) for own, file, names in zip(targets, files, words)]


def learned_captions(file: str, words: tuple[str, ...]) -> list[str]:
    """Return one caption per word: the one it was trained with, if the file records it. Raises ValueError without a word."""
    from minidiff.trainers.data.templates import fill_in

    if not words:
        raise ValueError(f"{file}: no word in it; a merge tells concepts apart by their words")
    path = Path(file)
    settings = settings_in(path) if path.is_file() else {}
    classes = {one.get("token"): one.get("class_word", "") for one in settings.get("concepts", [])}
    template = settings.get("prompt", "photo of a {}")
    return [fill_in(template, f"{word} {classes.get(word, '')}".strip()) for word in words]


def settings_in(path: Path) -> dict:
    """Return the settings that a file of this project was made with; nothing for others."""
    from weights_loader.metadata import SETTINGS_KEY
    from weights_loader.read import read

    try:
        found = json.loads(read(path).metadata.get(SETTINGS_KEY, "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


COMMANDS = {"lora": merge_lora, "concepts": merge_concepts}
