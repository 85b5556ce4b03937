"""The files that training ends in, and the flag of `minidiff generate` that takes each."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from minidiff.cli.model import print_notes, slug

if TYPE_CHECKING:
    from minidiff.pipeline import StableDiffusion
    from minidiff.trainers.methods.finetune_task import TrainingRun

Settings = dict[str, object]
Written = Iterator[tuple[str, Path]]


def write_results(training: "TrainingRun", sd: "StableDiffusion", out: Path, names: str, settings: Settings) -> Written:
    """Write what was learned; yield each file with the flag of `generate` that takes it. settings.json has all settings too.

    Args:
        training: a run that has ended
        sd: its model
        out: folder to write to
        names: spelling of the files, as in Method.formats
        settings: for the metadata
    """
    (out / "settings.json").write_text(json.dumps(settings, indent=1, ensure_ascii=False), encoding="utf-8")
    kinds = [kind for kind in WRITERS if getattr(training, kind) is not None]
    kinds += ["model"] if training.trains_model or not kinds else []
    for kind in kinds:
        yield from {**WRITERS, "model": write_model}[kind](training, sd, out, names, settings)


def write_tokens(training: "TrainingRun", sd: "StableDiffusion", out: Path, names: str, settings: Settings) -> Written:
    """Write new words: in one file, or for the web interfaces in a file each.

    Args:
        training, sd, out, names, settings: as in `write_results`
    """
    import weights_loader
    from minidiff.adapters.tokens import NewTokens

    assert training.tokens is not None
    if names in ("a1111", "kohya"):
        files = {out / f"{slug(word)}.safetensors": NewTokens({word: rows}) for word, rows in training.tokens.rows.items()}
        form = "a1111"
    else:
        files, form = {out / "embedding.safetensors": training.tokens}, "diffusers"
    for path, tokens in files.items():
        weights_loader.write_embedding(path, tokens, form, settings)
        yield "--embedding", path


def write_lora(training: "TrainingRun", sd: "StableDiffusion", out: Path, names: str, settings: Settings) -> Written:
    """Write a LoRA.

    Args:
        training, sd, out, names, settings: as in `write_results`
    """
    import weights_loader

    assert training.lora is not None
    weights_loader.write_lora(out / "lora.safetensors", training.lora, sd, names, settings)
    yield "--lora", out / "lora.safetensors"


def write_custom_diffusion(training: "TrainingRun", sd: "StableDiffusion", out: Path, names: str, settings: Settings) -> Written:
    """Write a Custom Diffusion: a safe file, diffusers' folder, or the original's file, which has no room for settings.

    Args:
        training, sd, out, names, settings: as in `write_results`
    """
    import weights_loader

    assert training.custom_diffusion is not None
    path = out / {"minidiff": "custom-diffusion.safetensors", "diffusers": "custom-diffusion", "original": "delta.bin"}[names]
    if path.is_dir():
        print_notes([f"{path} is there already and is left as it is"])
    else:
        weights_loader.write_custom_diffusion(path, training.custom_diffusion, sd, None if names == "original" else settings)
    yield "--custom-diffusion", path


def write_controlnet(training: "TrainingRun", sd: "StableDiffusion", out: Path, names: str, settings: Settings) -> Written:
    """Write a ControlNet, and the first hint of its sheets, so that it can be tried at once.

    Args:
        training, sd, out, names, settings: as in `write_results`
    """
    import weights_loader
    from minidiff.pictures import save_png
    from minidiff.pipeline import to_images
    from minidiff.trainers.methods.controlnet_task import ControlNetTask

    (phase,) = training.phases
    assert training.controlnet is not None and isinstance(phase, ControlNetTask)
    save_png(to_images(2 * phase.fixed_hint()[None] - 1)[0], out / "hint.png")
    path = out / {"original": "controlnet.safetensors", "diffusers": "controlnet"}[names]
    if path.is_dir():
        print_notes([f"{path} is there already and is left as it is"])
    else:
        weights_loader.write_controlnet(path, training.controlnet, sd, names, settings)
    yield "--control", out / "hint.png"
    yield "--controlnet", path


def write_model(training: "TrainingRun", sd: "StableDiffusion", out: Path, names: str, settings: Settings) -> Written:
    """Write the whole model, whose own weights were trained.

    Args:
        training, sd, out, names, settings: as in `write_results`
    """
    import weights_loader

    weights_loader.save(sd, out / "model.safetensors", settings=settings)
    yield "--model", out / "model.safetensors"


# By the field of TrainingRun that holds the result; a run without any has trained the model itself.
WRITERS: "dict[str, Callable[[TrainingRun, StableDiffusion, Path, str, Settings], Written]]" = {
    "tokens": write_tokens,
    "lora": write_lora,
    "custom_diffusion": write_custom_diffusion,
    "controlnet": write_controlnet,
}
