"""Read named tensors out of a file: the first step of loading a Stable Diffusion checkpoint.

    model.safetensors -----+
    model.ckpt, .pt, .bin -+--> read(path) --> Checkpoint(tensors, metadata, notes, tree)
    x.index.json + shards -+

The bytes decide how a file is read, not its name. Weights are not copied: a tensor is a window onto the file, which the
system brings into memory page by page when it is used. Writing to a tensor changes memory, never the file. (The one
exception is torch's format of before 1.6, see torch_files.) Which model the names belong to is decided elsewhere.
"""

import json
import mmap
import reprlib
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from weights_loader.brief import brief
from weights_loader.read.pickles import InertObject, Name, Refused, refuse_call
from weights_loader.read.torch_files import check_size, read_pickles, read_zip

SAFETENSORS_LONGEST_HEADER = 100_000_000  # bytes; a limit of the format
LONGEST_HEADER = 25_000_000  # what is read here: a Stable Diffusion's has 0.2 MB, and reading 100 MB of JSON takes gigabytes
LONGEST_INDEX = 25_000_000
DEEPEST, LONGEST_NAME, MOST_LETTERS, MOST_NOTES = 64, 1000, 50_000_000, 40  # of what is nested in a torch file, and of all its names
FEW_BESIDE = 3  # tensors next to a state dict; more are weights that are meant


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a file holds.

    tensors: by name, without the `state_dict` that training scripts wrap around them. Names inside nested dicts and lists
        are joined by dots.
    metadata: the text that a safetensors file carries; empty for the other formats.
    notes: a sentence for each thing in the file that is not among the tensors.
    numbers: by name, what stands among the tensors of a torch file as a plain number.
    tree: the file's own nesting below the wrapper, for the small files (embeddings, weight deltas) in which it means something; the same as
        `tensors` for safetensors.
    """

    path: Path
    tensors: dict[str, Tensor] = field(repr=False)
    metadata: dict[str, str]
    notes: tuple[str, ...]
    tree: object = field(repr=False)
    numbers: dict[str, float] = field(default_factory=dict, repr=False)


def read(path: str | Path) -> Checkpoint:
    """Read a safetensors file, a torch file (zip, or from before 1.6), a bare pickle, or the index of a sharded checkpoint.

    Of a folder, such as the `unet` of a diffusers model, the weights are read that `find_weights` finds. Tensors have the
    file's dtype and are on the CPU.

    Raises FileNotFoundError when something is not there; ValueError, with the likely cause, for what is no whole checkpoint
    and for a pickle that asks to call a function (nothing in it is run).
    """
    return _read(Path(path))


def _read(path: Path, is_shard: bool = False) -> Checkpoint:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; check the spelling and the folder")
    if path.is_dir():
        path = find_weights(path)
    if not path.is_file():
        raise ValueError(f"{path}: neither a file nor a folder")  # such as a pipe, whose reading would wait for ever
    if path.stat().st_size == 0:
        raise ValueError(f"{path}: the file is empty; interrupted download?")
    with path.open("rb") as file:
        # Copy-on-write: what is written to a tensor never reaches the file.
        buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    try:
        checkpoint = _read_by_content(path, buffer, is_shard)
    except ValueError as error:
        text = str(error)
        raise ValueError(f"{path}: {text if len(text) < LONGEST_NAME else text[:LONGEST_NAME] + ' ...'}") from error
    if not checkpoint.tensors:
        raise ValueError(f"{path}: no tensors in it; {' '.join(checkpoint.notes) or 'it is an empty list'}")
    return checkpoint


def find_weights(folder: str | Path) -> Path:
    """Return the weights file, or the index of its shards, in a folder of a diffusers model such as `unet`.

    Full precision goes before the fp16 variant, safetensors before pickles. Raises FileNotFoundError if there is none.
    """
    folder = Path(folder)
    for variant in ("", ".fp16"):
        for suffix in ("safetensors", "bin"):
            for stem in ("diffusion_pytorch_model", "model", "pytorch_model"):
                weights = f"{stem}{variant}.{suffix}"
                # Both spellings of a variant's index are in use.
                for name in (weights, f"{weights}.index.json", f"{stem}.{suffix}.index{variant}.json"):
                    if (folder / name).is_file():
                        return folder / name
    if (folder / "model_index.json").is_file():
        raise FileNotFoundError(f"{folder}: a whole diffusers model; its weights are in the folders inside, such as {folder / 'unet'}")
    names = ", ".join(sorted(entry.name for entry in folder.iterdir())[:10]) or "nothing"
    raise FileNotFoundError(f"{folder}: no weights in this folder (it holds {names}); expected a name like model.safetensors")


def _read_by_content(path: Path, buffer: mmap.mmap, is_shard: bool) -> Checkpoint:
    start = buffer[:512]
    if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= SAFETENSORS_LONGEST_HEADER:
        return _read_safetensors(path, buffer)
    if start.startswith(b"PK\x03\x04"):
        return _from_tree(path, *read_zip(path, buffer))
    if start[257:262] == b"ustar":
        raise ValueError("a tar archive; unpack it (or, if torch wrote it before 2017, save it again with a later version)")
    text = start.lstrip().lower()
    if text.startswith(b"version https://git-lfs"):
        raise ValueError("a Git LFS pointer, a few lines in place of the weights; run `git lfs pull`, or download the file itself")
    if text.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise ValueError("a web page, not weights: the download led to an error or log-in page; download it again")
    if start.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"RIFF")):
        raise ValueError("a picture, not weights; words that web interfaces hide in pictures are not read, save them there as .pt")
    if start.startswith(b"GGUF"):
        raise ValueError(
            "a GGUF file of stable-diffusion.cpp, which is not read; give the .safetensors or .ckpt file that it was made from"
        )
    if start.startswith((b"7z\xbc\xaf\x27\x1c", b"Rar!", b"\x1f\x8b")):
        raise ValueError("a packed archive, not weights; unpack it first")
    if text.startswith(b"{") and is_shard:
        raise ValueError("an index, named as one of the shards of another")
    if text.startswith(b"{"):
        return _read_sharded(path)
    try:
        return _from_tree(path, *read_pickles(buffer))
    except Refused:
        raise
    except ValueError as error:
        raise ValueError(f"truncated download, or no checkpoint? {len(buffer):,} bytes that begin with {start[:12]}: {error}") from error


def _read_safetensors(path: Path, buffer: mmap.mmap) -> Checkpoint:
    header_end = 8 + int.from_bytes(buffer[:8], "little")
    check_size(buffer, header_end)
    if header_end > LONGEST_HEADER:
        raise Refused(f"a header of {header_end:,} bytes, more than any model's ({LONGEST_HEADER:,})")
    try:
        header = json.loads(buffer[8:header_end])
        names = [name for name in header if name != "__metadata__"]
        if long := next((name for name in names if len(name) > LONGEST_NAME), None):
            raise Refused(f"a tensor's name has {len(long):,} letters, more than any model's; it begins with {long[:40]!r}")
        check_size(buffer, header_end + max((header[name]["data_offsets"][1] for name in names), default=0))
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in names}
            metadata = file.metadata() or {}
    except Refused:
        raise
    except (SafetensorError, ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"damaged: it begins as a safetensors file, but its header is wrong: {error}") from error
    return Checkpoint(path, tensors, metadata, (), tensors)


def _read_sharded(path: Path) -> Checkpoint:
    """Read the shards beside an index: {"weight_map": {tensor name: file name}}."""
    if path.stat().st_size > LONGEST_INDEX:
        raise Refused(f"JSON of {path.stat().st_size:,} bytes, more than the index of any checkpoint has")
    try:
        weight_map = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
        outside = [shard for shard in shards if Path(shard).name != shard]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("JSON, but not the index of a sharded checkpoint: no `weight_map` from tensors to files") from None
    if outside:
        raise ValueError(f"the index names a file outside its folder: {brief(outside[0])}")
    if absent := [shard for shard in shards if not (path.parent / shard).is_file()]:
        raise FileNotFoundError(f"{path}: {len(absent)} of {len(shards)} shards are not beside it, first {absent[0]}; download them too")
    parts = [_read(path.parent / shard, is_shard=True) for shard in shards]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    if lost := sorted(weight_map.keys() - tensors.keys()):
        raise ValueError(f"{len(lost)} tensors of the index are in no shard, first {lost[0]}; do index and shards belong together?")
    metadata = {key: text for part in parts for key, text in part.metadata.items()}
    return Checkpoint(path, tensors, metadata, tuple(note for part in parts for note in part.notes), tensors)


def _from_tree(path: Path, tree: object, inert: tuple[str, ...]) -> Checkpoint:
    """Take the state dict out of what a torch file holds, and say what else is there."""
    notes = [f"'{name}' is not a known name; it stayed a name, nothing of it was run." for name in inert]
    outer = set()  # a pickle may hold a dict that holds itself
    while isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict) and id(tree) not in outer:
        if sum(isinstance(value, Tensor) for value in tree.values()) > FEW_BESIDE:
            break  # weights on both levels: all are kept, under their whole names
        outer.add(id(tree))
        notes += [f"{_show(key)} stands beside the state dict: {_show(value)}." for key, value in tree.items() if key != "state_dict"]
        tree = tree["state_dict"]

    tensors, numbers, left_out, letters = {}, {}, 0, 0
    seen = set()  # a pickle may hold a list that holds itself
    waiting = [("", tree, 0)]
    while waiting:
        name, value, depth = waiting.pop()
        if isinstance(value, Tensor):
            if name in tensors:
                raise ValueError(f"two tensors have the name '{name}'")
            tensors[name] = value
        elif isinstance(value, dict | list | tuple) and id(value) not in seen:
            letters += (len(name) + 1) * len(value)
            if depth > DEEPEST or len(name) > LONGEST_NAME or letters > MOST_LETTERS:
                raise Refused(f"nested more than {DEEPEST} deep, or with names that are too long: no weights")
            seen.add(id(value))
            children = value.items() if isinstance(value, dict) else enumerate(value)
            prefix = f"{name}." if name else ""
            named = [(prefix + (child if isinstance(child, str) else _show(child)), item, depth + 1) for child, item in children]
            waiting += reversed(named)
        elif isinstance(value, InertObject) and value.called:
            refuse_call(value.name)  # beside the weights it is only told; among them it may stand for one
        else:
            if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**63:
                numbers[name] = float(value)
            if len(notes) >= MOST_NOTES:
                left_out += 1
            elif isinstance(value, dict | list | tuple):
                notes.append(f"'{name}' repeats what came before.")
            else:
                notes.append(f"'{name}' is not a tensor: {_show(value)}.")
    notes += [f"... and {left_out} more things that are no tensors."] * bool(left_out)
    return Checkpoint(path, tensors, {}, tuple(notes), tree, numbers)


def _show(value: object) -> str:
    match value:
        case Tensor():
            return f"a tensor of shape {tuple(value.shape)}"
        case Name():
            return value.path
        case InertObject():
            return f"an object of {value.name.path}"
        case dict() | list() | tuple():
            return f"a {type(value).__name__} of {len(value)}"
        case int() if abs(value) >= 2**64:
            return f"a number of {value.bit_length()} bits"  # Python refuses to write long ones out
    return reprlib.repr(value)
