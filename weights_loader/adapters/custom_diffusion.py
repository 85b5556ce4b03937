"""Custom Diffusion files in and out: the changed weights of cross-attention, and the words that were learned with them.

    ours       name.safetensors   "unet.down_blocks....attn2.to_k.weight": W, "modifier_token.<new1>": row: the authors' names for
                                  diffusers, flat, so that one safe file holds everything
    diffusers  a folder           pytorch_custom_diffusion_weights.safetensors or .bin ("....attn2.processor.to_k_custom_diffusion.weight"),
                                  and <new1>.bin or .safetensors for each word
    original   delta.bin          {"unet": {"down_blocks....attn2.to_k.weight": W}, "modifier_token": {"<new1>": row}}
               delta.ckpt         {"state_dict": {"model.diffusion_model....attn2.to_k.weight": W, "embed": rows without names}}

In all but diffusers' form W may be {"u": [out, r], "v": [r, in]}, to be added to the base as u @ v: the compressed form.
"""

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from minidiff.adapters.custom_diffusion import Compressed, CustomDiffusion
from minidiff.adapters.tokens import NewTokens
from minidiff.pipeline import StableDiffusion
from weights_loader.adapters import embedding
from weights_loader.adapters.common import misfit, weights_file
from weights_loader.adapters.origin import describe_origin
from weights_loader.brief import brief
from weights_loader.detect import describe, kind
from weights_loader.families import part_names
from weights_loader.metadata import FORMAT, settings_to_metadata
from weights_loader.name_table import name_table
from weights_loader.read import read
from weights_loader.write import new_folder, write_safetensors, write_torch

FOLDER = ("pytorch_custom_diffusion_weights.safetensors", "pytorch_custom_diffusion_weights.bin")  # the weights in a folder of diffusers
TOKEN = "modifier_token."
# The parts of a tensor's name: the place in the model, diffusers' processor, the layer, the half of a compressed change.
CHANGE = re.compile(
    r"(?:unet\.)?(?P<place>.+\.attn2)\.(?P<processor>processor\.)?(?P<layer>to_[qkv]|to_out)(?(processor)_custom_diffusion)(?:\.0)?"
    r"\.(?P<kind>weight|bias)(?:\.(?P<half>[uv]))?"
)
EMPTY = re.compile(r".+\.attn[12]\.processor")  # diffusers wants a name for each attention, also where nothing has changed

# A whole weight, or the halves of a change to the base's.
Change = Tensor | tuple[Tensor, Tensor]


def read_custom_diffusion(path: str | Path, sd: StableDiffusion, names: tuple[str, ...] = ()) -> CustomDiffusion:
    """Read the weights and words of a file or folder in any of the four forms, float32, not attached.

    names: the words of a delta.ckpt, which holds their vectors only; "<new1>", "<new2>", ... by default, as in the original's command.
    Raises FileNotFoundError, and ValueError for what is none or does not fit the model, with the layers and shapes that disagree.
    """
    checkpoint = read(weights_file(path, FOLDER, "Custom Diffusion"))
    try:
        changes, rows = parse(checkpoint.tensors, names)
        rows |= words_beside(Path(path))
        embedding.check_width(rows, sd)
        weights, biases = fit(changes, sd)
        return CustomDiffusion(weights, NewTokens(rows) if rows else None, biases)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def words_beside(folder: Path) -> dict[str, Tensor]:
    """Return the words of a folder of diffusers: of every file that holds nothing else, whatever its name. None for a file.

    diffusers names a file after its word; not every system lets a name have < and > in it, so that it may have been changed. A warning
    names what is left out: a file that cannot be read, or holds something else.
    """
    rows = {}
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.suffix not in (".safetensors", ".bin") or file.name in FOLDER:
            continue
        try:
            found = embedding.parse(read(file))
            if twice := rows.keys() & found.keys():
                raise ValueError(f"the word {brief(min(twice))} is in another file too")
            rows |= found
        except ValueError as error:
            reason = str(error).removeprefix(f"{file}: ")
            warnings.warn(f"{file} beside the Custom Diffusion is left out: {reason}", stacklevel=2)
    return rows


def parse(tensors: Mapping[str, Tensor], names: tuple[str, ...] = ()) -> tuple[dict[str, Change], dict[str, Tensor]]:
    """Return the changes by the parameter's name in the file, and {word: rows [n, D]}. Raises ValueError for what is no part of one."""
    if kind(list(tensors)) != "custom_diffusion":
        raise ValueError(f"given as a Custom Diffusion, but it is {describe(list(tensors))}")
    if names and "embed" not in tensors:
        raise ValueError(f"names are given ({', '.join(names)}), and the file has no words without a name")
    words = {name.removeprefix(TOKEN): _rows(name, tensor) for name, tensor in tensors.items() if name.startswith(TOKEN)}
    if "embed" in tensors:
        words |= _name_rows(_rows("embed", tensors["embed"]), names)
    parts: dict[str, dict[str, Tensor]] = {}  # of each change: "weight", or "u" and "v"
    for name, tensor in tensors.items():
        if match := CHANGE.fullmatch(name):
            layer = "to_out.0" if match["layer"] == "to_out" else match["layer"]
            parts.setdefault(f"{match['place']}.{layer}.{match['kind']}", {})[match["half"] or "weight"] = tensor.float()
        elif name != "embed" and not name.startswith(TOKEN) and not (EMPTY.fullmatch(name) and tensor.numel() == 0):
            _refuse(name)
    return {place: _change(place, found) for place, found in parts.items()}, words


def _rows(name: str, tensor: Tensor) -> Tensor:
    if tensor.dim() not in (1, 2):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected a vector, or one per row")
    return tensor.float().reshape(-1, tensor.shape[-1])


def _name_rows(rows: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    names = names or tuple(f"<new{i + 1}>" for i in range(len(rows)))
    if len(names) != len(rows):
        raise ValueError(f"{len(rows)} vectors in it, and {len(names)} names given for them ({', '.join(names)}); give one each")
    return {name: row[None] for name, row in zip(names, rows)}


def _change(place: str, parts: Mapping[str, Tensor]) -> Change:
    if parts.keys() == {"weight"}:
        return parts["weight"]
    if parts.keys() != {"u", "v"}:
        found = ", ".join(sorted(parts.keys() - {"weight"})) + (" and a weight" if "weight" in parts else "")
        raise ValueError(f"{place} needs one weight, or u and v; found {found}")
    return parts["u"], parts["v"]


def _refuse(name: str) -> NoReturn:
    if name.startswith("text_encoder."):
        raise ValueError(f"a whole text encoder is in it too ({name}), which is not supported: only cross-attention is changed")
    raise ValueError(f"tensor {brief(name)} is no part of a Custom Diffusion; expected cross-attention (attn2) and modifier_token")


def fit(changes: Mapping[str, Change], sd: StableDiffusion) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the whole new weights and biases by our layers, such as "unet.down.0....cross_attention.to_k".

    Raises ValueError with all layers that the model lacks or has in another shape.
    """
    parameters = sd.unet.state_dict()
    places = {
        place.name: ours
        for layout in ("ldm", "diffusers")
        for ours, place in name_table(sd.unet, part_names(sd.config, "unet", layout)).items()
    }
    result, unknown, wrong = {"weight": {}, "bias": {}}, [], []
    for name, change in changes.items():
        if name not in places:
            unknown.append(name)
            continue
        base = parameters[places[name]].float().cpu()
        value = _whole(change, base)
        if value is None:
            shapes = tuple(change.shape) if isinstance(change, Tensor) else tuple(tuple(half.shape) for half in change)
            wrong.append(f"{name} has shape {shapes}; this layer's is {tuple(base.shape)}")
        else:
            layer, kind = places[name].rsplit(".", 1)
            result[kind][f"unet.{layer}"] = value
    if unknown or wrong:
        counts = f"{len(unknown)} of its {len(changes)} layers are not there, {len(wrong)} have other shapes"
        attention = [name for name in places if ".attn2." in name]
        raise ValueError(misfit(f"not a Custom Diffusion for this model: {counts}", unknown, attention, wrong))
    return result["weight"], result["bias"]


def _whole(change: Change, base: Tensor) -> Tensor | None:
    """Return the new value of a parameter; None if the change does not fit it."""
    if isinstance(change, Tensor):
        return change if change.shape == base.shape else None
    u, v = change
    fits = u.dim() == v.dim() == base.dim() == 2 and u.shape[1] == v.shape[0] and (u.shape[0], v.shape[1]) == base.shape
    return base + u @ v if fits else None


# --- writing ----------------------------------------------------------------------------------------------------------


def write_custom_diffusion(
    path: str | Path,
    delta: CustomDiffusion,
    sd: StableDiffusion,
    settings: dict[str, object] | None = None,
    compressed: Compressed | None = None,
) -> None:
    """Write in the form that the name asks for: .safetensors ours, .bin or .ckpt the original's, no suffix a folder of diffusers.

    Args:
        path: the file or the folder. A .ckpt holds the words' vectors without their names
        delta: the Custom Diffusion
        sd: a model that it fits
        settings: what it was made with, kept as JSON in the metadata of .safetensors
        compressed: of the same Custom Diffusion, written in place of its whole weights; diffusers has no place for it

    Raises ValueError for another suffix, a folder that is there already, and what a form has no place for; FileNotFoundError without the
    folder above.
    """
    changes = {f"{name}.weight": weight for name, weight in (compressed or delta).layers.items()}
    changes |= {f"{name}.bias": bias for name, bias in delta.biases.items()}
    rows: Mapping[str, Tensor] = delta.tokens.rows if delta.tokens else {}
    path = Path(path)
    metadata = FORMAT | settings_to_metadata(settings or {}) | describe_origin("custom-diffusion", path, sd, settings)
    if settings and path.suffix in (".bin", ".ckpt"):
        raise ValueError(f"{path}: settings are kept in .safetensors and folders only; leave them out, or change the name")
    layout = "ldm" if path.suffix == ".ckpt" else "diffusers"
    theirs = name_table(sd.unet, part_names(sd.config, "unet", layout))
    named = {theirs[name.removeprefix("unet.")].name: change for name, change in changes.items()}
    match path.suffix:
        case ".safetensors":
            tensors = {f"unet.{name}": change for name, change in named.items()}
            tensors = {name: part for key, change in tensors.items() for name, part in _flat(key, change)}
            write_safetensors(path, tensors | {f"{TOKEN}{word}": vectors for word, vectors in rows.items()}, metadata)
        case ".bin":
            write_torch(path, {"unet": _nested(named), "modifier_token": _vectors(rows)})
        case ".ckpt":
            embed = {"embed": torch.stack(list(_vectors(rows).values()))} if rows else {}
            write_torch(path, {"state_dict": _nested(named) | embed})
        case "":
            _write_folder(path, named, rows, sd, metadata)
        case suffix:
            raise ValueError(f"{path}: Custom Diffusion is written as .safetensors, .bin, .ckpt or a folder (no suffix), not {suffix}")


def _flat(name: str, change: Change) -> list[tuple[str, Tensor]]:
    return [(name, change)] if isinstance(change, Tensor) else [(f"{name}.{half}", part) for half, part in zip("uv", change)]


def _nested(changes: Mapping[str, Change]) -> dict[str, object]:
    return {name: change if isinstance(change, Tensor) else dict(zip("uv", change)) for name, change in changes.items()}


def _vectors(rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for word, vectors in rows.items():
        if len(vectors) > 1:
            raise ValueError(
                f"{word} has {len(vectors)} vectors, and the original's files hold one per word; write .safetensors or a folder"
            )
    return {word: vectors[0] for word, vectors in rows.items()}


def _write_folder(
    path: Path, changes: Mapping[str, Change], rows: Mapping[str, Tensor], sd: StableDiffusion, metadata: dict[str, str]
) -> None:
    """Write a folder: diffusers gives every attention a processor, and a changed one holds all its layers, also unchanged ones."""
    if any(not isinstance(change, Tensor) for change in changes.values()):
        raise ValueError(f"{path}: diffusers' folders hold whole weights; write a compressed one as .safetensors, .bin or .ckpt")
    if unfit := [word for word in rows if Path(f"{word}.safetensors").name != f"{word}.safetensors"]:
        raise ValueError(f"{path}: the word {unfit[0]!r} cannot name a file in the folder; write .safetensors")
    parameters = sd.unet.state_dict()
    base = {place.name: parameters[ours] for ours, place in name_table(sd.unet, part_names(sd.config, "unet", "diffusers")).items()}
    tensors = {}
    for attention in sorted({match[0] for name in base if (match := re.match(r".+\.attn[12](?=\.)", name))}):
        changed = {name.removeprefix(f"{attention}.") for name in changes if name.startswith(f"{attention}.")}
        layers = ["to_k.weight", "to_v.weight"] if changed else []
        if changed - set(layers):
            layers += ["to_q.weight", "to_out.0.weight", "to_out.0.bias"]
        for layer in layers:
            name = re.sub(r"^(to_[qkv]|to_out)", r"\1_custom_diffusion", layer)
            tensors[f"{attention}.processor.{name}"] = changes.get(f"{attention}.{layer}", base[f"{attention}.{layer}"])
        if not layers:
            tensors[f"{attention}.processor"] = torch.empty(0)
    with new_folder(path) as folder:
        write_safetensors(folder / FOLDER[0], tensors, metadata)
        for word, vectors in rows.items():
            write_safetensors(folder / f"{word}.safetensors", {word: vectors}, FORMAT)
