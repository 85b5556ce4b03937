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
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from minidiff.adapters.custom_diffusion import Compressed, CustomDiffusion
from minidiff.adapters.tokens import NewTokens
from minidiff.pipeline import StableDiffusion
from weights_loader.adapters import embedding
from weights_loader.detect import describe, kind
from weights_loader.families import part_names
from weights_loader.metadata import FORMAT, settings_to_metadata
from weights_loader.name_table import name_table
from weights_loader.read import read
from weights_loader.report import SHOWN, nearest, some
from weights_loader.write import new_folder, write_safetensors, write_torch

FOLDER = ("pytorch_custom_diffusion_weights.safetensors", "pytorch_custom_diffusion_weights.bin")  # the weights in a folder of diffusers
TOKEN = "modifier_token."
# The parts of a tensor's name: the place in the model, the layer, the half of a compressed change.
DELTA = re.compile(r"(?:unet\.)?(?P<place>.+\.attn2)\.(?P<layer>to_[qkv]|to_out\.0)\.(?P<kind>weight|bias)(?:\.(?P<half>[uv]))?")
PROCESSOR = re.compile(
    r"(?:unet\.)?(?P<place>.+\.attn2)\.processor\.(?P<layer>to_[qkv]|to_out)_custom_diffusion(?:\.0)?\.(?P<kind>weight|bias)"
)
EMPTY = re.compile(r".+\.attn[12]\.processor")  # diffusers wants a name for each attention, also where nothing has changed

# A whole weight, or the halves of a change to the base's.
Change = Tensor | tuple[Tensor, Tensor]


def read_custom_diffusion(path: str | Path, sd: StableDiffusion, names: tuple[str, ...] = ()) -> CustomDiffusion:
    """Read the weights and words of a file or folder in any of the four forms, float32, not attached.

    names: the words of a delta.ckpt, which holds their vectors only; "<new1>", "<new2>", ... by default, as in the original's command.
    Raises FileNotFoundError, and ValueError for what is none or does not fit the model, with the layers and shapes that disagree.
    """
    path = Path(path)
    try:
        changes, rows = parse_folder(path, names) if path.is_dir() else parse(read(path).tensors, names)
        embedding.check_width(rows, sd)
        by_kind = {"weight": {}, "bias": {}}
        for name, value in fit(changes, sd).items():
            layer, kind = name.rsplit(".", 1)
            by_kind[kind][layer] = value
        return CustomDiffusion(by_kind["weight"], NewTokens(rows) if rows else None, by_kind["bias"])
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse_folder(path: Path, names: tuple[str, ...] = ()) -> tuple[dict[str, Change], dict[str, Tensor]]:
    """Parse a folder of diffusers: the weights, and every file next to them that holds the word it is named after."""
    weights = next((path / name for name in FOLDER if (path / name).is_file()), None)
    if weights is None:
        is_model = (path / "model_index.json").is_file()
        what = "a whole model, given as a Custom Diffusion" if is_model else "no Custom Diffusion in this folder"
        raise ValueError(f"{what}; expected a file, or a folder with {' or '.join(FOLDER)}")
    changes, rows = parse(read(weights).tensors, names)
    return changes, rows | words_beside(path)


def words_beside(folder: Path) -> dict[str, Tensor]:
    """Return the words of a folder of diffusers: of every file that holds nothing else, whatever its name.

    diffusers names a file after its word; not every system lets a name have < and > in it, so that it may have been changed. A warning
    names what is left out: a file that cannot be read, or holds something else.
    """
    rows = {}
    for file in sorted(folder.iterdir()):
        if file.suffix not in (".safetensors", ".bin") or file.name in FOLDER:
            continue
        try:
            found = embedding.parse(read(file))
            if twice := rows.keys() & found.keys():
                raise ValueError(f"the word {min(twice)!r} is in another file too")
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
    named = {name: _rows(name, tensor) for name, tensor in tensors.items() if name.startswith(TOKEN)}
    words = {name.removeprefix(TOKEN): rows for name, rows in named.items()}
    if "embed" in tensors:
        words |= _name_rows(_rows("embed", tensors["embed"]), names)
    rest = {name: tensor for name, tensor in tensors.items() if name != "embed" and name not in named}
    processors, rest = _processors(rest)
    whole, compressed, rest = _deltas(rest)
    if rest:
        _refuse(next(iter(rest)))
    return processors | whole | _pairs(compressed, {*processors, *whole}), words


def _rows(name: str, tensor: Tensor) -> Tensor:
    if tensor.dim() not in (1, 2):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected a vector, or one per row")
    return tensor.float().reshape(-1, tensor.shape[-1])


def _name_rows(rows: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
    names = names or tuple(f"<new{i + 1}>" for i in range(len(rows)))
    if len(names) != len(rows):
        raise ValueError(f"{len(rows)} vectors in it, and {len(names)} names given for them ({', '.join(names)}); give one each")
    return {name: row[None] for name, row in zip(names, rows)}


def _processors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights in diffusers' form, and the tensors that are left."""
    found, rest = {}, {}
    for name, tensor in tensors.items():
        if match := PROCESSOR.fullmatch(name):
            layer = "to_out.0" if match["layer"] == "to_out" else match["layer"]
            found[f"{match['place']}.{layer}.{match['kind']}"] = tensor.float()
        elif not (EMPTY.fullmatch(name) and tensor.numel() == 0):
            rest[name] = tensor
    return found, rest


def _deltas(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Return whole weights and the halves of compressed changes in our form, which is the original's too, and the tensors that are left."""
    whole, halves, rest = {}, {}, {}
    for name, tensor in tensors.items():
        match = DELTA.fullmatch(name)
        if match is None:
            rest[name] = tensor
        elif match["half"]:
            halves.setdefault(f"{match['place']}.{match['layer']}.{match['kind']}", {})[match["half"]] = tensor.float()
        else:
            whole[f"{match['place']}.{match['layer']}.{match['kind']}"] = tensor.float()
    return whole, halves, rest


def _pairs(compressed: Mapping[str, Mapping[str, Tensor]], whole: Collection[str]) -> dict[str, tuple[Tensor, Tensor]]:
    for place, halves in compressed.items():
        if halves.keys() != {"u", "v"} or place in whole:
            found = ", ".join(sorted(halves)) + (" and a weight" if place in whole else "")
            raise ValueError(f"{place} needs one weight, or u and v; found {found}")
    return {place: (halves["u"], halves["v"]) for place, halves in compressed.items()}


def _refuse(name: str) -> NoReturn:
    if name.startswith("text_encoder."):
        raise ValueError(f"a whole text encoder is in it too ({name}), which is not supported: only cross-attention is changed")
    raise ValueError(f"tensor {name!r} is no part of a Custom Diffusion; expected cross-attention (attn2) and modifier_token")


def fit(changes: Mapping[str, Change], sd: StableDiffusion) -> dict[str, Tensor]:
    """Return {our parameter: its whole new value}, such as "unet.down.0....cross_attention.to_k.weight".

    Raises ValueError with all layers that the model lacks or has in another shape.
    """
    parameters = sd.unet.state_dict()
    places = {
        place.name: ours
        for layout in ("ldm", "diffusers")
        for ours, place in name_table(sd.unet, part_names(sd.config, "unet", layout)).items()
    }
    result, unknown, wrong = {}, [], []
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
            result[f"unet.{places[name]}"] = value
    if unknown or wrong:
        attention = [name for name in places if ".attn2." in name]
        counts = f"{len(unknown)} of its {len(changes)} layers are not there, {len(wrong)} have other shapes"
        lines = [f"not a Custom Diffusion for this model: {counts}"]
        lines += some([f"no layer {name}{nearest(name, attention)}" for name in unknown[:SHOWN]], len(unknown))
        lines += some(wrong, len(wrong))
        raise ValueError("\n".join(lines))
    return result


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
    metadata = FORMAT | settings_to_metadata(settings or {})
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
