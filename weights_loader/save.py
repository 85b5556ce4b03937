"""A StableDiffusion to a checkpoint that other programs read: the road of `load` backwards.

    ldm         one .safetensors file in the original's names
    diffusers   a folder that diffusers.StableDiffusionPipeline.from_pretrained takes

Either way the config is in the metadata of the file with the U-Net, so that `load` finds every number again; and what a file carried
without being computed with is written back, in a diffusers folder as a file of its own that diffusers does not look at.
"""

import json
import warnings
from pathlib import Path

import torch

from minidiff.pipeline import StableDiffusion
from weights_loader.contents import CARRIED_FILE, PARTS
from weights_loader.dialects import LAYOUTS, to_file
from weights_loader.folder import write_folder_config
from weights_loader.load import load
from weights_loader.metadata import FORMAT, KEY, config_to_json, settings_to_metadata
from weights_loader.write import new_folder, write_safetensors

SUFFIX = ".safetensors"
PARTS_INDEX = "parts.safetensors.index.json"
PICKLES = (".ckpt", ".pt", ".bin")  # read, never written


def save(sd: StableDiffusion, path: str | Path, layout: str = "ldm", settings: dict[str, object] | None = None):
    """Write a model in the dtype it has: all of it, or nothing. What is attached to it stays outside, with a warning.

    settings: what it was made with, as JSON in the metadata.

    Raises ValueError for an unknown layout and for a name that does not fit the layout, FileNotFoundError without the folder above.
    """
    path, metadata = Path(path), FORMAT | {KEY: config_to_json(sd.config)} | settings_to_metadata(settings or {})
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} unknown; choose {' or '.join(LAYOUTS)}")
    if layout == "ldm":
        _save_ldm(sd, path, metadata)
    else:
        _save_folder(sd, path, metadata)
    if attached := ", ".join(str(one) for one in sd.adapters if one.adapter.attached):
        warnings.warn(
            f"{path}: the model without what is attached to it ({attached}); merge that into the weights to save it", stacklevel=2
        )


def _save_ldm(sd: StableDiffusion, path: Path, metadata: dict[str, str]):
    if path.suffix != SUFFIX:
        raise ValueError(f"{path}: a model in the ldm layout is one {SUFFIX} file; give it a name that ends so, or take layout='diffusers'")
    tensors = to_file(sd.text_encoder, "ldm") | to_file(sd.unet, "ldm") | to_file(sd.vae, "ldm") | sd.extra_tensors
    write_safetensors(path, tensors, metadata)


def _save_folder(sd: StableDiffusion, path: Path, metadata: dict[str, str]):
    if path.suffix in (SUFFIX, *PICKLES):
        raise ValueError(f"{path}: a model in the diffusers layout is a folder; give a name without {path.suffix}, or take layout='ldm'")
    with new_folder(path) as folder:
        write_folder_config(folder, sd.config, sd.tokenizer)
        write_safetensors(folder / "unet" / "diffusion_pytorch_model.safetensors", to_file(sd.unet, "diffusers"), metadata)
        write_safetensors(folder / "vae" / "diffusion_pytorch_model.safetensors", to_file(sd.vae, "diffusers"), FORMAT)
        write_safetensors(folder / "text_encoder" / "model.safetensors", to_file(sd.text_encoder, "diffusers"), FORMAT)
        if sd.extra_tensors:
            write_safetensors(folder / CARRIED_FILE, sd.extra_tensors, FORMAT)


def save_parts(sd: StableDiffusion, folder: str | Path, dtype: torch.dtype = torch.float16):
    """Text encoder, U-Net and VAE in a file each, in the original's names, each with the config; and an index that makes a whole of them.

    What the model carries besides is left out. Raises FileNotFoundError without the folder.
    """
    folder, metadata, index = Path(folder), FORMAT | {KEY: config_to_json(sd.config)}, {}
    for part in PARTS:
        tensors = {name: tensor.to(dtype) for name, tensor in to_file(getattr(sd, part), "ldm").items()}
        write_safetensors(folder / f"{part}.safetensors", tensors, metadata)
        index |= dict.fromkeys(tensors, f"{part}.safetensors")
    (folder / PARTS_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=1), encoding="utf-8")


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype | str = "file",
    ema: bool = False,
    vae: str | Path | None = None,
    prediction: str | None = None,
) -> tuple[str, ...]:
    """Rewrite a checkpoint: to LDM names where the target ends in .safetensors, else to a diffusers folder. Gives the loader's notes.

    dtype: of the weights; "file" is the one that holds every weight of the file exactly. The rest as in `load`.
    """
    target = Path(target)
    if target.suffix in PICKLES:
        raise ValueError(f"{target}: checkpoints are written as {SUFFIX}; name it {target.with_suffix(SUFFIX).name}")
    sd = load(source, dtype=dtype, ema=ema, vae=vae, prediction=prediction)
    save(sd, target, "ldm" if target.suffix == SUFFIX else "diffusers")
    return sd.notes
