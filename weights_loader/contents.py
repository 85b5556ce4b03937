"""What is in a checkpoint: its tensors, sorted by the part of the model that they belong to.

    one file in LDM names   -> sorted by the beginning of the name
    a diffusers folder      -> one file per part

A VAE of another file, or the moving averages of the U-Net, take the place of the model's own here, before anything is looked up.
"""

import re
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from minidiff.config import VAEConfig
from weights_loader.brief import MOST
from weights_loader.detect import foreign
from weights_loader.dialects import Aliases
from weights_loader.families import Family, Shapes, family_of_names
from weights_loader.folder import INDEX, folder_family, read_json, vae_config
from weights_loader.metadata import KEY, config_from_json
from weights_loader.name_table import EMA_PREFIX, PartNames, canonical_name, ema_name, file_name
from weights_loader.read import Checkpoint, read
from weights_loader.stated import Statement, statements, yaml_numbers

BUNDLED = {name: Path(__file__).parent / "bundled" / f"{name}.safetensors" for name in ("tiny", "half")}
EXTRA_FILE = "carried.safetensors"  # beside the parts of a diffusers folder that minidiff wrote, in LDM names
OTHER_FOLDERS = ("tokenizer", "tokenizer_2", "scheduler")


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    family: whose names sorted the tensors; the config decides which family the model is of.
    parts: {part: {name: tensor}} in the names of its layout.
    layouts: of each part; a VAE taken from elsewhere may have another one than the model.
    rest: the tensors of no part.
    stated: what the file says of its prediction; see stated.py.
    vae_config: of a VAE taken from elsewhere, where its place states one.
    yaml: numbers of the .yaml of the file's name; see stated.yaml_numbers.
    """

    path: Path
    family: Family
    layout: str
    parts: dict[str, dict[str, Tensor]] = field(repr=False)
    layouts: dict[str, str]
    rest: dict[str, Tensor] = field(repr=False)
    metadata: dict[str, str]
    notes: tuple[str, ...]
    stated: tuple[Statement, ...] = ()
    vae_config: VAEConfig | None = None
    yaml: dict[str, float] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors by name, those of no part first."""
        return self.rest | {name: tensor for part in self.parts.values() for name, tensor in part.items()}

    @property
    def shapes(self) -> Shapes:
        """Return the shapes of the parts' tensors."""
        return {name: tuple(tensor.shape) for part in self.parts.values() for name, tensor in part.items()}


def find(path_or_name: str | Path) -> Path:
    """Return the path, or that of a checkpoint that ships with minidiff."""
    path = BUNDLED.get(str(path_or_name), Path(path_or_name))
    if path.exists():
        return path
    if str(path_or_name) in BUNDLED:
        raise FileNotFoundError(f"'{path_or_name}': this installation has no {path}; install minidiff again")
    raise FileNotFoundError(f"{path}: no such file or folder, and no name of a bundled model; those are {', '.join(BUNDLED)}")


def open_checkpoint(path: Path) -> Contents:
    """Read a file or a diffusers folder, and sort its tensors by part. Raises ValueError for what its names show to be something else."""
    contents = _open_folder(path) if path.is_dir() and (path / INDEX).is_file() else _open_file(path)
    if path == BUNDLED["half"]:  # made on the bundled model's VAE, and shipped without it: nothing that its user has to be told
        return replace(take_vae(contents, BUNDLED["tiny"]), notes=contents.notes)
    return contents


def _open_file(path: Path) -> Contents:
    checkpoint = unwrap(read(path))
    what = foreign(list(checkpoint.tensors))
    if what:
        raise ValueError(f"{path}: {what}")
    family = family_of_names(checkpoint.tensors)
    aliases = tuple(alias for names in family.names["ldm"].values() for alias in names.aliases)
    parts, rest = {part: {} for part in family.parts}, {}
    for name, tensor in _without_aliases(checkpoint, aliases).items():
        part = family.part_of(name)
        (rest if part is None else parts[part])[name] = tensor
    yaml, notes = _beside(path)
    told = {key: checkpoint.metadata.get(key, "") for key in UNUSED_METADATA}
    notes += [
        f"metadata {key} = {told[key][:MOST]}: {UNUSED_METADATA[key]}" for key in told if told[key] not in ("", "1", "None", "0,1000")
    ]
    stated = statements(rest, checkpoint.metadata, yaml)
    notes = (*checkpoint.notes, *notes)
    return Contents(
        path, family, "ldm", parts, dict.fromkeys(parts, "ldm"), rest, checkpoint.metadata, notes, stated, yaml=_numbers(path, yaml)
    )


# Metadata that change how a model is to be used, and which nothing here follows.
UNUSED_METADATA = {
    "modelspec.encoder_layer": "trained on an earlier layer of the text encoder (clip skip); config= with fewer layers follows it",
    "modelspec.timestep_range": "trained for these timesteps only",
}


def _numbers(path: Path, yaml: str) -> dict[str, float]:
    try:
        return yaml_numbers(yaml)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _beside(path: Path) -> tuple[str, list[str]]:
    """Return the text of the .yaml of a file's name, and a note for each thing beside the file that programs read and this one does not."""
    yaml = path.with_suffix(".yaml")
    text = yaml.read_text(encoding="utf-8", errors="replace") if yaml.is_file() else ""
    notes = (
        [f"{yaml.name} beside the file: its parameterization, noise schedule and scale_factor are read, sizes come from the tensors"]
        if text
        else []
    )
    vaes = (path.with_suffix(f".vae{suffix}") for suffix in (".safetensors", ".pt", ".ckpt"))
    notes += [f"{vae.name} beside the file is not used; vae={vae.name} (--vae) takes it" for vae in vaes if vae.is_file()]
    return text, notes


def _open_folder(path: Path) -> Contents:
    family = folder_family(path)
    files = {part: unwrap(read(path / part)) for part in family.parts}
    parts = {part: _without_aliases(file, family.names["diffusers"][part].aliases) for part, file in files.items()}
    rest = read(path / EXTRA_FILE).tensors if (path / EXTRA_FILE).is_file() else {}
    others = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and entry.name not in (*parts, *OTHER_FOLDERS))
    notes = [f"{name}/ is left out: no part of making a picture" for name in others]
    notes += [note for file in files.values() for note in file.notes]
    metadata = files["unet"].metadata
    stated = statements(rest, metadata)
    return Contents(path, family, "diffusers", parts, dict.fromkeys(parts, "diffusers"), rest, metadata, tuple(notes), stated)


# What wrappers put before the names of the module they wrap: (pattern, what stays of it, the wrapper).
WRAPPERS = (
    (re.compile(r"(^|\.)_orig_mod\."), r"\1", "torch.compile"),
    (re.compile(r"^module\."), "", "DataParallel"),
    (re.compile(r"^(vae|first_stage)\.(?=(en|de)coder\.|(post_)?quant_conv\.)"), "", "a trainer of VAEs"),
)


def unwrap(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint without the prefixes that wrappers left in its names, and a note for each."""
    names, notes = {name: name for name in checkpoint.tensors}, list(checkpoint.notes)
    for pattern, replacement, wrapper in WRAPPERS:
        changed = {name: pattern.sub(replacement, now) for name, now in names.items()}
        if count := sum(changed[name] != names[name] for name in names):
            notes.append(f"{count} names begin as {wrapper} leaves them; read without that")
        names = changed
    if len(set(names.values())) < len(names):
        raise ValueError(f"{checkpoint.path}: two weights have one name but for what wrappers put before it; which is meant?")
    return replace(checkpoint, tensors={names[name]: tensor for name, tensor in checkpoint.tensors.items()}, notes=tuple(notes))


def _without_aliases(checkpoint: Checkpoint, aliases: Aliases) -> dict[str, Tensor]:
    """Return the tensors under the names that the rules give. Raises ValueError if two tensors have one such name."""
    result = {canonical_name(name, aliases): tensor for name, tensor in checkpoint.tensors.items()}
    if len(result) < len(checkpoint.tensors):
        twice = len(checkpoint.tensors) - len(result)
        raise ValueError(f"{checkpoint.path}: {twice} weights occur twice, in two spellings of their names; which is meant?")
    return result


def take_averages(contents: Contents) -> Contents:
    """Replace the U-Net's weights by their moving averages. Raises ValueError if a weight has none."""
    names = {name: ema_name(name) for name in contents.parts["unet"]}
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
    """Replace the VAE by the one of another file: a VAE alone, in either layout, with a whole model's prefix or without; or a model's.

    Raises ValueError for a file without a VAE.
    """
    path = path / "vae" if (path / INDEX).is_file() else path
    checkpoint, config = unwrap(read(path)), _config_of_vae(path, contents.family)
    names = {layout: contents.family.part_names("vae", layout) for layout in ("ldm", "diffusers")}
    tensors = _without_aliases(checkpoint, names["diffusers"].aliases)
    averages = {name: tensor for name, tensor in tensors.items() if name.startswith(EMA_PREFIX)}
    layout = "ldm"
    if KEY in checkpoint.metadata:
        config = config_from_json(checkpoint.metadata[KEY]).vae
    if any(names["ldm"].belongs(name) for name in tensors):
        tensors = {name: tensor for name, tensor in tensors.items() if names["ldm"].belongs(name)}
    elif _first_norm(contents.family, names["ldm"]) in tensors:
        tensors = {names["ldm"].prefix + name: tensor for name, tensor in tensors.items() if name not in averages}
    elif _first_norm(contents.family, names["diffusers"]) in tensors:
        layout = "diffusers"
    else:
        what = foreign(list(tensors)) or f"no VAE by the names of its tensors; the first is {next(iter(tensors))}"
        if what.startswith("a VAE alone"):
            absent = _first_norm(contents.family, names["diffusers" if any("mid_block" in name for name in tensors) else "ldm"])
            what = f"a VAE of another kind than Stable Diffusion's, or one that was saved in part: it has no {absent}"
        raise ValueError(f"{path}: given as vae=, but it is {what}")
    return replace(
        contents,
        parts=contents.parts | {"vae": tensors},
        layouts=contents.layouts | {"vae": layout},
        rest=contents.rest | averages,
        notes=(*contents.notes, f"VAE taken from {path}" + "; the model's own is left out" * bool(contents.parts["vae"])),
        vae_config=config,
    )


def _config_of_vae(path: Path, family: Family) -> VAEConfig | None:
    """Return what the config.json of diffusers states in a VAE's folder, or beside its file; None without one.

    A config.json of something else may lie beside a file, so there it counts only if it is that of a VAE.
    """
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not file.is_file() or not path.is_dir() and read_json(file).get("_class_name") != "AutoencoderKL":
        return None
    return vae_config(file, family.settings["vae"])


def _first_norm(family: Family, names: PartNames) -> str:
    """Return the name, without a prefix, of a tensor that every VAE of a layout has."""
    return file_name("encoder.middle.block_1.norm_1.weight", names.layers(family.config.vae))


def check_parts(contents: Contents):
    """Check that there is something of every part. Raises ValueError if not."""
    absent = [name.replace("_", " ") for name, tensors in contents.parts.items() if not tensors]
    if len(absent) == len(contents.parts):
        first = next(iter(contents.rest))
        raise ValueError(f"{contents.path}: no Stable Diffusion: no name is that of a text encoder, U-Net or VAE; the first is {first}")
    if absent:
        advice = "; give one as vae=FILE (--vae)" if absent == ["vae"] else "; a part of a model, or one that was saved in part"
        raise ValueError(f"{contents.path}: no {' and no '.join(absent)} in this file{advice}")
