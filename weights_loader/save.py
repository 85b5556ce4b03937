"""Write a StableDiffusion as a checkpoint that other programs read: the road of `load` backwards.

    ldm         one .safetensors file in the original's names
    diffusers   a folder that diffusers.StableDiffusionPipeline.from_pretrained takes

Either way the config is in the metadata of the file with the U-Net, so that `load` finds every number again; and what a file carried
without being computed with is written back, in a diffusers folder as a file of its own that diffusers does not look at.
"""

import json
import warnings
from pathlib import Path

import torch
from torch import Tensor

from minidiff.config import check_choice
from minidiff.files import write_text
from minidiff.pipeline import StableDiffusion
from weights_loader.contents import EXTRA_FILE, find
from weights_loader.families import family_of_config
from weights_loader.folder import write_folder_config
from weights_loader.load import load
from weights_loader.metadata import FORMAT, KEY, config_to_json, settings_to_metadata
from weights_loader.name_table import LAYOUTS, to_file
from weights_loader.read import verify
from weights_loader.write import new_folder, write_safetensors

SUFFIX = ".safetensors"
PARTS_INDEX = "parts.safetensors.index.json"
PICKLES = (".ckpt", ".pt", ".bin")  # read, never written


def save(sd: StableDiffusion, path: str | Path, layout: str = "ldm", settings: dict[str, object] | None = None):
    """Write a model in the dtype it has: all of it, or nothing. What is attached to it stays outside, with a warning.

    Args:
        sd: the model.
        path: of a .safetensors file in the ldm layout, of a new folder in the diffusers layout.
        layout: "ldm" or "diffusers".
        settings: what it was made with, as JSON in the metadata.

    Raises ValueError for an unknown layout and for a name that does not fit the layout, FileNotFoundError without the folder above.
    """
    path, metadata = Path(path), FORMAT | {KEY: config_to_json(sd.config)} | settings_to_metadata(settings or {})
    check_choice("layout", layout, LAYOUTS)
    if layout == "ldm":
        _save_ldm(sd, path, metadata)
    else:
        _save_folder(sd, path, metadata)
    if attached := ", ".join(adapter.title for adapter in sd.attached):
        warnings.warn(
            f"{path}: the model without what is attached to it ({attached}); merge that into the weights to save it", stacklevel=2
        )


def _save_ldm(sd: StableDiffusion, path: Path, metadata: dict[str, str]):
    if path.suffix.lower() != SUFFIX:
        raise ValueError(f"{path}: a model in the ldm layout is one {SUFFIX} file; give it a name that ends so, or take layout='diffusers'")
    write_safetensors(path, tensors_of(sd, "ldm") | sd.extra_tensors, metadata)


def _save_folder(sd: StableDiffusion, path: Path, metadata: dict[str, str]):
    if path.suffix.lower() in (SUFFIX, *PICKLES):
        raise ValueError(f"{path}: a model in the diffusers layout is a folder; give a name without {path.suffix}, or take layout='ldm'")
    with new_folder(path) as folder:
        write_folder_config(folder, sd.config, sd.text.tokenizers)
        for part, tensors in _parts_to_file(sd, "diffusers").items():
            name = "model.safetensors" if part.startswith("text_encoder") else "diffusion_pytorch_model.safetensors"
            write_safetensors(folder / part / name, tensors, metadata if part == "unet" else FORMAT)
        if sd.extra_tensors:
            write_safetensors(folder / EXTRA_FILE, sd.extra_tensors, FORMAT)


def tensors_of(sd: StableDiffusion, layout: str) -> dict[str, Tensor]:
    """Return {name in a file: tensor} of all weights of a model. Raises ValueError for an unknown layout."""
    return {name: tensor for part in _parts_to_file(sd, layout).values() for name, tensor in part.items()}


def _parts_to_file(sd: StableDiffusion, layout: str) -> dict[str, dict[str, Tensor]]:
    family = family_of_config(sd.config)
    return {part: to_file(sd.parts[part], family.part_names(part, layout)) for part in family.parts}


def save_parts(sd: StableDiffusion, folder: str | Path, dtype: torch.dtype = torch.float16):
    """Write each part into a file of its own, in the original's names and with the config, and an index that makes a whole of them.

    Tensors that nothing is computed with are left out. Raises FileNotFoundError without the folder.
    """
    folder, metadata, index = Path(folder), FORMAT | {KEY: config_to_json(sd.config)}, {}
    for part, named in _parts_to_file(sd, "ldm").items():
        tensors = {name: tensor.to(dtype) for name, tensor in named.items()}
        write_safetensors(folder / f"{part}.safetensors", tensors, metadata)
        index |= dict.fromkeys(tensors, f"{part}.safetensors")
    write_text(folder / PARTS_INDEX, json.dumps({"metadata": {}, "weight_map": index}, indent=1))


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | str = "file",
    ema: bool = False,
    vae: str | Path | None = None,
    prediction: str | None = None,
    ignore: str | None = None,
) -> tuple[str, ...]:
    """Rewrite a checkpoint: to LDM names where the target ends in .safetensors, else to a diffusers folder. Return the loader's notes.

    Checksums in the source are compared first (read/verify.py).

    Args:
        source: what `load` takes.
        target: a name that ends in .safetensors, or that of a new folder.
        dtype: of the weights; "file" is the one that holds every weight of the file exactly.
        ema: as in `load`.
        vae: as in `load`.
        prediction: as in `load`.
        ignore: as in `load`.
    """
    target = Path(target)
    if target.suffix.lower() in PICKLES:
        raise ValueError(f"{target}: checkpoints are written as {SUFFIX}; name it {target.with_suffix(SUFFIX).name}")
    checked = [note for file in (source, vae) if file is not None for note in verify(find(file))]
    sd = load(source, dtype=dtype, ema=ema, vae=vae, prediction=prediction, ignore=ignore)
    save(sd, target, "ldm" if target.suffix.lower() == SUFFIX else "diffusers")
    return (*sd.notes, *(note for note in checked if ": not the numbers" in note))
