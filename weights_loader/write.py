"""Write named tensors into a safetensors file, and whole folders: all of it or nothing.

A file or folder is built under a temporary name beside its place and renamed at the end, which a file system does in one
step. Whoever reads at that moment, or starts again after a crash or a full disk, finds the old one or the new one.

The format (https://huggingface.co/docs/safetensors): 8 bytes length of the header, the header as JSON, the numbers. It is
written here and not by the safetensors package, because the package orders the metadata at random, so that saving twice
gives two different files, and refuses tensors that share memory.
"""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from minidiff.files import atomic_write, digest, held, remove_leftovers, temporary_path, tensor_bytes

MODEL_SPEC = "modelspec.sai_model_spec"  # the version of ModelSpec that the metadata follow
HASH = "modelspec.hash_sha256"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None):
    """Write tensors of any device, stride and sharing, one after the other; the same input gives the same bytes.

    Metadata that follow ModelSpec get its hash of the numbers, by which read/verify.py finds damage.
    Tensors that share memory are written once under each name. A file at `path` is replaced, also the one that the
    tensors were read from.

    Raises ValueError for names, metadata or dtypes that the format has no place for, FileNotFoundError without the folder.
    """
    path = Path(path)
    metadata = dict(metadata or {})
    _check(path, tensors, metadata)
    # Wide numbers first, so that every tensor starts at a multiple of its number's size.
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    if MODEL_SPEC in metadata:
        metadata[HASH] = f"0x{digest(tensor_bytes(tensors[name]) for name in names)}"
    header: dict = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    with atomic_write(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(tensor_bytes(tensors[name]))


def write_torch(path: str | Path, tree: Mapping[str, object]):
    """Write a dict of tensors, text and dicts as torch.save does, for the programs that read nothing else. A file at `path` is replaced.

    Raises ValueError where `path` is a folder, FileNotFoundError without the folder above.
    """
    path = Path(path)
    _check(path, {}, {})
    with atomic_write(path) as file:
        torch.save(_compact(tree), file)


def _compact(tree: object) -> object:
    """Copy every tensor to the CPU: torch.save writes the whole storage of a view, and the device of a tensor."""
    if isinstance(tree, dict):
        return {key: _compact(value) for key, value in tree.items()}
    if isinstance(tree, Tensor):
        return tree.detach().cpu().clone(memory_format=torch.contiguous_format)
    return tree


@contextmanager
def new_folder(path: str | Path) -> Iterator[Path]:
    """Make a folder that is there whole or not at all: `with new_folder("model") as folder:` write into `folder`, which becomes "model".

    Raises ValueError when there is something at `path` already, other than an empty folder.
    """
    path = Path(path)
    if path.is_file() or path.is_dir() and any(path.iterdir()):
        raise ValueError(f"{path}: exists already; choose a new name, or delete it first")
    _check_parent(path)
    remove_leftovers(path)
    temporary = temporary_path(path)
    temporary.mkdir()
    try:
        with held(temporary):
            yield temporary
            if path.is_dir():
                path.rmdir()
            temporary.rename(path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]):
    if path.is_dir():
        raise ValueError(f"{path}: a folder; give the name of a file in it, such as {path / 'model.safetensors'}")
    _check_parent(path)
    for name, tensor in tensors.items():
        if not isinstance(name, str) or name == "__metadata__":
            raise ValueError(f"tensor name {name!r}: expected text other than __metadata__, which the format keeps for itself")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"'{name}' is {tensor.dtype}; safetensors has {', '.join(DTYPES.values())}; convert it first")
    for key, text in metadata.items():
        if not isinstance(key, str) or not isinstance(text, str):
            raise ValueError(f"metadata {key!r}: {text!r}; safetensors keeps text only, so pass it through str or json.dumps")


def _check_parent(path: Path):
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path}: there is no folder {path.parent}; make it first")
