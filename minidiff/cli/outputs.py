"""The files that training ends in, and the flag of `minidiff generate` that takes each."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minidiff.cli.model import print_notes
from minidiff.cli.names import slug

if TYPE_CHECKING:
    from minidiff.adapters.custom_diffusion import CustomDiffusion
    from minidiff.adapters.lora import LoRA
    from minidiff.adapters.tokens import NewTokens
    from minidiff.controlnet import Control
    from minidiff.pipeline import StableDiffusion
    from minidiff.trainers.methods.finetune_task import TrainingRun

Settings = dict[str, object]
Written = Iterator[tuple[str, Path]]
Write = Callable[[Any, "StableDiffusion", Path, str, Settings], Written]
ONE_EACH = ("a1111", "kohya")  # names of programs that call a word by its file's name


def write_results(training: "TrainingRun", sd: "StableDiffusion", out: Path, names: str, settings: Settings) -> Written:
    """Write what was learned; yield each file with the flag of `generate` that takes it. settings.json has all settings too.

    Args:
        training: a run that has ended
        sd: its model
        out: folder to write to
        names: spelling of the files, as in Method.formats
        settings: for the metadata
    """
    from minidiff.files import write_text

    write_text(out / "settings.json", json.dumps(settings, indent=1, ensure_ascii=False))
    learned = results_of(training)
    learned += [(write_model, sd)] if training.trains_model or not learned else []
    for write, result in learned:
        yield from write(result, sd, out, names, settings)


def results_of(training: "TrainingRun") -> "list[tuple[Write, Any]]":
    """Return what a run has learned beside the model's own weights, each with the function that writes it."""
    return [(write, getattr(training, kind)) for kind, write in WRITERS.items() if getattr(training, kind) is not None]


def result_names(training: "TrainingRun", names: str) -> list[str]:
    """Return the names of files that are made of what the user called things, with the longest number that a sheet's file has."""
    words = training.tokens.names if training.tokens and names in ONE_EACH else ()
    files = [f"{slug(word)}-000000.safetensors" for word in words]
    if len(set(files)) < len(files):
        raise ValueError(f"the words {', '.join(words)} would have one file name; choose words that differ in letters or digits")
    return files


def write_tokens(learned: "NewTokens", sd: "StableDiffusion", out: Path, names: str, settings: Settings) -> Written:
    """Write new words: in one file, or for the web interfaces in a file each.

    Args:
        learned: what the run has learned
        sd, out, names, settings: as in `write_results`
    """
    import weights_loader
    from minidiff.adapters.tokens import NewTokens

    widths = [encoder.config.width for encoder in sd.text.encoders.values()]
    one_each = names in ONE_EACH or len(widths) > 1
    tokens = {slug(word): NewTokens({word: rows}) for word, rows in learned.rows.items()} if one_each else {"embedding": learned}
    for name, words in tokens.items():
        weights_loader.write_embedding(out / f"{name}.safetensors", words, "a1111" if one_each else "diffusers", settings, widths, sd)
        yield "--embedding", out / f"{name}.safetensors"


def write_lora(learned: "LoRA", sd: "StableDiffusion", out: Path, names: str, settings: Settings) -> Written:
    """Write a LoRA.

    Args:
        learned: what the run has learned
        sd, out, names, settings: as in `write_results`
    """
    import weights_loader

    weights_loader.write_lora(out / "lora.safetensors", learned, sd, names, settings)
    yield "--lora", out / "lora.safetensors"


def write_custom_diffusion(learned: "CustomDiffusion", sd: "StableDiffusion", out: Path, names: str, settings: Settings) -> Written:
    """Write a Custom Diffusion: a safe file, diffusers' folder, or the original's file, which has no room for settings.

    Args:
        learned: what the run has learned
        sd, out, names, settings: as in `write_results`
    """
    import weights_loader

    path = out / {"minidiff": "custom-diffusion.safetensors", "diffusers": "custom-diffusion", "original": "delta.bin"}[names]
    if path.is_dir():
        print_notes([f"{path} is there already and is left as it is"])
    else:
        weights_loader.write_custom_diffusion(path, learned, sd, None if names == "original" else settings)
    yield "--custom-diffusion", path


def write_controlnet(learned: "Control", sd: "StableDiffusion", out: Path, names: str, settings: Settings) -> Written:
    """Write a ControlNet, and a hint beside it, so that it can be tried at once.

    Args:
        learned: what the run has learned
        sd, out, names, settings: as in `write_results`
    """
    import weights_loader
    from minidiff.pictures import save_png
    from minidiff.pipeline import to_images

    save_png(to_images(2 * learned.hint - 1)[0], out / "hint.png")
    path = out / {"original": "controlnet.safetensors", "diffusers": "controlnet"}[names]
    if path.is_dir():
        print_notes([f"{path} is there already and is left as it is"])
    else:
        weights_loader.write_controlnet(path, learned.net, sd, names, settings)
    yield "--control", out / "hint.png"
    yield "--controlnet", path


def write_model(learned: "StableDiffusion", sd: "StableDiffusion", out: Path, names: str, settings: Settings) -> Written:
    """Write the whole model, whose own weights were trained.

    Args:
        learned: what the run has learned
        sd, out, names, settings: as in `write_results`
    """
    import weights_loader

    weights_loader.save(learned, out / "model.safetensors", settings=settings)
    yield "--model", out / "model.safetensors"


# By the field of TrainingRun that holds the result; a run without any has trained the model itself.
WRITERS: dict[str, Write] = {
    "tokens": write_tokens,
    "lora": write_lora,
    "custom_diffusion": write_custom_diffusion,
    "controlnet": write_controlnet,
}
