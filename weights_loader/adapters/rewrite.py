"""Write a small file anew, in the names of other programs: a LoRA, learned words or a Custom Diffusion.

    LoRA                .safetensors                   kohya, diffusers
    learned words       .safetensors, .bin, .pt        diffusers, a1111
    Custom Diffusion    .safetensors, .bin, .ckpt, or a folder: the target's name says which form

Numbers keep their dtype, but for those of a Custom Diffusion, which become float32. The metadata is passed on, but for what it says of
the tensors' names, and for checksums of the numbers, whose order changes.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from minidiff.adapters.lora import LoRA
from minidiff.adapters.tokens import NewTokens
from minidiff.config import ModelConfig
from minidiff.files import parse_json
from minidiff.pipeline import StableDiffusion
from minidiff.two_encoders import text_side
from weights_loader.adapters import custom_diffusion, embedding, lora
from weights_loader.adapters.common import weights_file
from weights_loader.adapters.peft import METADATA
from weights_loader.detect import FEW, kind
from weights_loader.empty_parts import empty_parts
from weights_loader.families import FAMILIES
from weights_loader.metadata import FORMAT, SETTINGS_KEY
from weights_loader.read import Checkpoint, read
from weights_loader.write import HASH, write_safetensors

Names = dict[str, tuple[str, ...]]
SAFE = ("", ".safetensors")  # of a Custom Diffusion: the forms that have room for settings
NAMES: Names = {"lora": ("kohya", "diffusers"), "embedding": ("diffusers", "a1111"), "custom_diffusion": ()}
OF_NAMES = (METADATA, "ss_network_", embedding.NAME_KEY, "sshs_", HASH)  # metadata that belongs to the tensors of one dialect


def small_kind(source: str | Path) -> str | None:
    """Return "lora", "embedding" or "custom_diffusion"; None for a whole model and for what is not there."""
    path = Path(source)
    if not path.exists() or (path / "model_index.json").is_file():
        return None
    if path.is_dir():
        folders = {"lora": lora.FOLDER, "custom_diffusion": custom_diffusion.FOLDER}
        return next((what for what, names in folders.items() if any((path / name).is_file() for name in names)), None)
    checkpoint = read(path)
    what = kind(list(checkpoint.tensors))
    if what is None and len(checkpoint.tensors) <= FEW and embedding.is_embedding(dict(checkpoint.tensors)):
        what = "embedding"
    return what if what in NAMES else None


def rewrite(source: str | Path, target: str | Path, names: str | None = None, sd: StableDiffusion | None = None) -> None:
    """Write a small file in other names.

    Args:
        source: a file or folder that `small_kind` knows
        target: a new name; its suffix says the form
        names: of the table above; the first by default
        sd: the model that it is for. A LoRA for one of the public families or the bundled model needs none; a Custom Diffusion does

    Raises ValueError for names that the kind of file does not have, for what a form has no place for, and as the readers and writers do.
    """
    source, target, what = Path(source), Path(target), small_kind(source)
    if what is None:
        raise ValueError(f"{source}: no LoRA, learned words or Custom Diffusion")
    if names is not None and names not in NAMES[what]:
        choices = " or ".join(NAMES[what]) or "none: the target's name says the form"
        raise ValueError(f"names {names!r}: a file of this kind ({what.replace('_', ' ')}) has {choices}")
    names = names or next(iter(NAMES[what]), "")
    if what == "lora":
        _rewrite_lora(source, target, names, sd)
    elif what == "embedding":
        _rewrite_embedding(source, target, names)
    elif sd is None:
        raise ValueError(f"{source}: a Custom Diffusion holds whole weights of one model; give that model too (--model)")
    else:
        found = custom_diffusion.read_custom_diffusion(source, sd)
        custom_diffusion.write_custom_diffusion(target, found, sd, _settings(source) if target.suffix in SAFE else None)


def _settings(source: Path) -> dict[str, Any] | None:
    """Return what a Custom Diffusion of ours was made with, as its file says."""
    text = read(weights_file(source, custom_diffusion.FOLDER, "Custom Diffusion")).metadata.get(SETTINGS_KEY)
    return None if text is None else parse_json(text, f"{source}: metadata {SETTINGS_KEY}")


def _rewrite_lora(source: Path, target: Path, names: str, sd: StableDiffusion | None) -> None:
    if target.suffix != ".safetensors":
        raise ValueError(f"{target}: a LoRA is written as .safetensors; name it {target.with_suffix('.safetensors').name}")
    checkpoint = read(weights_file(source, lora.FOLDER, "LoRA"))
    try:
        changes = lora.parse(checkpoint)
        own = sd or _model_of(changes)
        read_anew = LoRA(lora.fit(changes, own))
        lora.check_names(read_anew, names)
        tensors, metadata = lora.pack(read_anew, own, names)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    dtype = _commonest_dtype(checkpoint)
    stored = {name: tensor if name.endswith(".alpha") else tensor.to(dtype) for name, tensor in tensors.items()}
    write_safetensors(target, stored, _passed_on(checkpoint) | metadata)


def _rewrite_embedding(source: Path, target: Path, names: str) -> None:
    checkpoint = read(source)
    try:
        rows = embedding.parse(checkpoint)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    embedding.write_embedding(target, NewTokens(rows), names)
    if target.suffix == ".safetensors":
        written, dtype = read(target), _commonest_dtype(checkpoint)
        tensors = {name: tensor.to(dtype) for name, tensor in written.tensors.items()}
        write_safetensors(target, tensors, _passed_on(checkpoint) | dict(written.metadata))


def _commonest_dtype(checkpoint: Checkpoint) -> torch.dtype:
    numbers = [tensor for name, tensor in checkpoint.tensors.items() if not name.endswith(".alpha") and tensor.is_floating_point()]
    (dtype, _), *others = Counter(tensor.dtype for tensor in numbers).most_common()
    return torch.float32 if others else dtype


def _passed_on(checkpoint: Checkpoint) -> dict[str, str]:
    return FORMAT | {key: text for key, text in checkpoint.metadata.items() if not key.startswith(OF_NAMES)}


def _model_of(changes: Mapping[str, lora.StoredChange]) -> StableDiffusion:
    """Return a model without weights that a LoRA fits: of a public family, or the bundled one. Raises ValueError if it fits none."""
    nearest: ValueError | None = None
    for config in _configs():
        parts = empty_parts(config)
        sd = StableDiffusion(config, text_side(config, parts.encoders), parts.unet, parts.vae)
        try:
            lora.fit(changes, sd)
            return sd
        except ValueError as error:
            nearest = nearest or error
    raise ValueError(f"{nearest}\n  nor does it fit another model that is known here; give its own with --model")


def _configs() -> Iterator[ModelConfig]:
    from weights_loader.load import load

    yield from (family.config for family in FAMILIES if not family.any_size)
    yield load("tiny").config
