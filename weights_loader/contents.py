"""What is in a checkpoint: its tensors, sorted by the part of the model that they belong to.

    one file in LDM names   -> sorted by the beginning of the name
    a diffusers folder      -> one file a part

A VAE of another file, or the moving averages of the U-Net, take the place of the model's own here, before anything is looked up.
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from weights_loader import detect, dialects
from weights_loader.read import Checkpoint, read

BUNDLED = {name: Path(__file__).parent / "bundled" / f"{name}.safetensors" for name in ("tiny", "half")}
CARRIED_FILE = "carried.safetensors"  # beside the parts of a diffusers folder of ours, in LDM names
PARTS = ("text_encoder", "unet", "vae")
FOLDERS = (*PARTS, "tokenizer", "scheduler")
LDM_PREFIXES = {"cond_stage_model.": "text_encoder", dialects.UNET_PREFIX: "unet", dialects.VAE_PREFIX: "vae"}


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds: the tensors of each part in the names of its layout, and those of no part."""

    path: Path
    layout: str
    parts: dict[str, dict[str, Tensor]] = field(repr=False)
    layouts: dict[str, str]  # of each part: a VAE taken from elsewhere may have another one
    rest: dict[str, Tensor] = field(repr=False)
    metadata: dict[str, str]
    notes: tuple[str, ...]

    @property
    def shapes(self) -> detect.Shapes:
        return {name: tuple(tensor.shape) for part in self.parts.values() for name, tensor in part.items()}


def find(path_or_name: str | Path) -> Path:
    """The path, or that of a checkpoint that ships with minidiff."""
    path = BUNDLED.get(str(path_or_name), Path(path_or_name))
    if path.exists():
        return path
    if str(path_or_name) in BUNDLED:
        raise FileNotFoundError(f"'{path_or_name}': this installation has no {path}; install minidiff again")
    raise FileNotFoundError(f"{path}: no such file or folder, and no name of a bundled model; those are {', '.join(BUNDLED)}")


def open_checkpoint(path: Path) -> Contents:
    """Read a file or a diffusers folder, and sort its tensors by part. Raises ValueError for what its names show to be something else."""
    if path.is_dir() and (path / "model_index.json").is_file():
        return _open_folder(path)
    checkpoint = read(path)
    what = detect.foreign(list(checkpoint.tensors))
    if what:
        raise ValueError(f"{path}: {what}")
    parts = {name: {} for name in PARTS}
    rest = {}
    for name, tensor in _respelled(checkpoint, dialects.LDM_SPELLINGS).items():
        part = next((part for prefix, part in LDM_PREFIXES.items() if name.startswith(prefix)), None)
        (rest if part is None else parts[part])[name] = tensor
    return Contents(path, "ldm", parts, dict.fromkeys(PARTS, "ldm"), rest, checkpoint.metadata, checkpoint.notes)


def _open_folder(path: Path) -> Contents:
    text_encoder, unet, vae = (read(path / name) for name in PARTS)
    parts = {
        "text_encoder": _respelled(text_encoder, dialects.TEXT_ENCODER_SPELLINGS),
        "unet": unet.tensors,
        "vae": _respelled(vae, dialects.VAE_SPELLINGS),
    }
    rest = read(path / CARRIED_FILE).tensors if (path / CARRIED_FILE).is_file() else {}
    others = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and entry.name not in FOLDERS)
    notes = tuple(f"{name}/ is left out: no part of making a picture" for name in others) + text_encoder.notes + unet.notes + vae.notes
    return Contents(path, "diffusers", parts, dict.fromkeys(PARTS, "diffusers"), rest, unet.metadata, notes)


def _respelled(checkpoint: Checkpoint, spellings: tuple[tuple[str, str], ...]) -> dict[str, Tensor]:
    result = {dialects.respell(name, spellings): tensor for name, tensor in checkpoint.tensors.items()}
    if len(result) < len(checkpoint.tensors):
        twice = len(checkpoint.tensors) - len(result)
        raise ValueError(f"{checkpoint.path}: {twice} weights occur twice, in two spellings of their names; which is meant?")
    return result


def take_averages(contents: Contents) -> Contents:
    """The U-Net's weights replaced by their moving averages. Raises ValueError where a weight has none."""
    names = {name: dialects.ema_name(name) for name in contents.parts["unet"]}
    absent = [name for name, ema in names.items() if ema not in contents.rest]
    if absent:
        raise ValueError(
            f"{contents.path}: ema=True, but {len(absent)} of the {len(names)} U-Net weights have no moving average in this file, "
            f"first {absent[0]}; load it with ema=False"
        )
    averages = {name: contents.rest[ema] for name, ema in names.items()}
    taken = set(names.values())
    rest = {name: tensor for name, tensor in contents.rest.items() if name not in taken}
    note = "took the moving average of the U-Net's weights; the last weights are left out"
    return replace(contents, parts=contents.parts | {"unet": averages}, rest=rest, notes=(*contents.notes, note))


def take_vae(contents: Contents, path: Path) -> Contents:
    """The VAE replaced by the one of another file: a VAE alone, in either layout, with a whole model's prefix or without; or a model's.

    Raises ValueError for a file without a VAE.
    """
    path = path / "vae" if (path / "model_index.json").is_file() else path
    tensors = _respelled(read(path), dialects.VAE_SPELLINGS)
    averages = {name: tensor for name, tensor in tensors.items() if name.startswith("model_ema.")}
    layout = "ldm"
    if any(name.startswith(dialects.VAE_PREFIX) for name in tensors):
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(dialects.VAE_PREFIX)}
    elif "encoder.mid.block_1.norm1.weight" in tensors:
        tensors = {dialects.VAE_PREFIX + name: tensor for name, tensor in tensors.items() if name not in averages}
    elif "encoder.mid_block.resnets.0.norm1.weight" in tensors:
        layout = "diffusers"
    else:
        what = detect.foreign(list(tensors)) or f"no VAE by the names of its tensors; the first is {next(iter(tensors))}"
        raise ValueError(f"{path}: given as vae=, but it is {what}")
    return replace(
        contents,
        parts=contents.parts | {"vae": tensors},
        layouts=contents.layouts | {"vae": layout},
        rest=contents.rest | averages,
        notes=(*contents.notes, f"VAE taken from {path}; the model's own is left out"),
    )


def check_parts(contents: Contents):
    """Raises ValueError unless there is something of every part."""
    absent = [name.replace("_", " ") for name, tensors in contents.parts.items() if not tensors]
    if len(absent) == len(PARTS):
        first = next(iter(contents.rest))
        raise ValueError(f"{contents.path}: no Stable Diffusion: no name is that of a text encoder, U-Net or VAE; the first is {first}")
    if absent:
        advice = "; give one as vae=FILE (--vae)" if absent == ["vae"] else "; a part of a model, or one that was saved in part"
        raise ValueError(f"{contents.path}: no {' and no '.join(absent)} in this file{advice}")
