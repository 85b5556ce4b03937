"""Read the three forms in which torch has written weights, without running anything: .ckpt, .pt, .pth and .bin files.

    zip, since 1.6      NAME/data.pkl, and NAME/data/KEY for each storage (a block of numbers that tensors are views of)
    legacy, before 1.6  pickles one after the other: magic number, version, system, the object, the storage keys;
                        then each storage, behind its number of elements
    bare pickle         one pickle; each storage is a legacy file inside it, as bytes

The pickles go through weights_loader.read.pickles. The storages of a zip are windows onto the file. In a legacy file numbers
mostly stand at odd addresses, where a processor need not be able to read them: those are copied.

Left out: torch's tar format of before 2017, TorchScript, compressed archives. Each is refused by name.
"""

import mmap
import reprlib
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from weights_loader.read.pickles import STORAGES, Name, Refused, unpickle

# Called with a storage's key, dtype and number of elements.
LoadStorage = Callable[[str, torch.dtype, int], Tensor]
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # torch.save before 1.6 begins with this number, pickled


def read_zip(path: Path, buffer: mmap.mmap) -> tuple[object, tuple[str, ...]]:
    """Return the object that torch.save has put in a zip, and the names in it that stayed inert (see unpickle).

    buffer: the mapped file at `path`. Tensors share its memory.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename: entry for entry in archive.infolist()}
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error):
        raise Refused(_cut_zip(buffer)) from None
    pickled = [name for name in entries if name.endswith("/data.pkl")]
    if len(pickled) != 1:
        raise Refused(f"a zip archive that torch.save did not write (it holds {', '.join(list(entries)[:5])}); unpack it")
    folder = pickled[0].removesuffix("data.pkl")
    if folder + "constants.pkl" in entries:
        raise Refused("a TorchScript program, not a list of weights; ask for the file with the state dict")
    if byte_order := entries.get(folder + "byteorder"):
        start, size = _content(buffer, byte_order)
        _check_byte_order(buffer[start : start + size].decode())

    def load_storage(key: str, dtype: torch.dtype, numel: int) -> Tensor:
        if f"{folder}data/{key}" not in entries:
            raise Refused(f"damaged: storage {key} is missing from the archive")
        start, size = _content(buffer, entries[f"{folder}data/{key}"])
        if numel * dtype.itemsize > size:
            raise Refused(f"damaged: storage {key} has {size:,} bytes, too few for {numel:,} numbers of {dtype}")
        return _window(buffer, start, numel, dtype)

    start, size = _content(buffer, entries[pickled[0]])
    buffer.seek(start)
    return _unpickle(buffer, load_storage, size)


def _content(buffer: mmap.mmap, entry: zipfile.ZipInfo) -> tuple[int, int]:
    """Return where the content of a zip entry starts, behind its local header (APPNOTE 4.3.7), and how many bytes it has."""
    if entry.compress_type != zipfile.ZIP_STORED:
        raise Refused(f"'{entry.filename}' in it is compressed, which torch never does; unpack it and save it again")
    header = buffer[entry.header_offset : entry.header_offset + 30]
    if len(header) < 30 or not header.startswith(b"PK\x03\x04"):
        raise Refused(f"damaged: '{entry.filename}' is not where the archive says")
    start = entry.header_offset + _local_header_size(header)
    check_size(buffer, start + entry.file_size)
    return start, entry.file_size


def _local_header_size(header: bytes) -> int:
    name_length, extra_length = struct.unpack_from("<HH", header, 26)
    return 30 + name_length + extra_length


def _cut_zip(buffer: mmap.mmap) -> str:
    """Say what is wrong with a zip whose table of contents is missing. The pickle comes first, and knows how much should follow."""
    try:
        buffer.seek(_local_header_size(buffer[:30]))
        expected = f"expected more than {sum(_storage_sizes(buffer).values()):,} bytes"
    except (ValueError, struct.error):
        expected = "the table of contents at its end is missing"
    return f"truncated download? {expected}, found {len(buffer):,}"


def read_pickles(buffer: mmap.mmap) -> tuple[object, tuple[str, ...]]:
    """Do the same for a legacy file or a bare pickle, from the buffer's position."""
    first, inert = _unpickle(buffer, _no_storage)
    if not isinstance(first, int) or first != LEGACY_MAGIC:
        return first, inert
    _version, _ = _unpickle(buffer, _no_storage)
    system, _ = _unpickle(buffer, _no_storage)
    if isinstance(system, dict):
        _check_byte_order("little" if system.get("little_endian", True) else "big")

    # The storages stand behind the object that uses them: it is read once to learn their sizes, and again to have them.
    start_of_object = buffer.tell()
    sizes = _storage_sizes(buffer)
    keys, _ = _unpickle(buffer, _no_storage)
    keys = keys if isinstance(keys, list) and all(isinstance(key, str) for key in keys) else []
    if set(keys) != sizes.keys():
        raise Refused("damaged: its list of storages does not fit its tensors")
    starts, end = {}, buffer.tell()
    for key in keys:
        starts[key] = end + 8  # behind the number of elements, eight bytes
        end = starts[key] + sizes[key]
    check_size(buffer, end)
    buffer.seek(start_of_object)
    return _unpickle(buffer, lambda key, dtype, numel: _window(buffer, starts[key], numel, dtype))


def _storage_sizes(buffer: mmap.mmap) -> dict[str, int]:
    """Return the bytes of each storage that the pickle at the buffer's position asks for; none is read."""
    sizes = {}

    def note_size(key: str, dtype: torch.dtype, numel: int) -> Tensor:
        sizes[key] = numel * dtype.itemsize
        return torch.empty(numel, dtype=dtype, device="meta")

    _unpickle(buffer, note_size)
    return sizes


def _unpickle(buffer: mmap.mmap, load_storage: LoadStorage, size: int | None = None) -> tuple[object, tuple[str, ...]]:
    """Call unpickle on a pickle of at most `size` bytes.

    Each storage is loaded once, so that tensors which share one in the file share it in memory.
    """
    loaded: dict[str, Tensor] = {}

    def from_persistent_id(persistent_id: tuple) -> Tensor | Name:
        if persistent_id[0] == "module":  # ("module", class, file, source): the class of a pickled model
            return persistent_id[1]
        _storage, storage_type, key, _location, numel, *view = persistent_id
        if not isinstance(storage_type, Name) or storage_type.path not in STORAGES or not isinstance(key, str):
            raise Refused(f"damaged: a storage of type {storage_type} with key {reprlib.repr(key)}")
        if not isinstance(numel, int) or not 0 <= numel < 2**60:
            raise Refused(f"damaged: storage {reprlib.repr(key)} has {reprlib.repr(numel)} elements")
        if any(view):
            raise Refused("a storage that is a view of another, as torch wrote them before 0.4; save it again with a later one")
        dtype = STORAGES[storage_type.path]
        if key not in loaded:
            loaded[key] = load_storage(key, dtype, numel)
        if loaded[key].dtype != dtype:
            raise Refused(f"damaged: storage {key} is used as {loaded[key].dtype} and as {dtype}")
        return loaded[key]

    return unpickle(buffer, size or len(buffer) - buffer.tell(), from_persistent_id, _storage_in_pickle)


def _storage_in_pickle(content: bytes) -> Tensor:
    if not isinstance(content, bytes | bytearray):
        raise Refused(f"damaged: a storage is made of {type(content).__name__}; expected bytes")
    if b"_load_from_bytes" in content:
        raise Refused("a storage inside a storage, which no weights need; each level would double the work")
    buffer = mmap.mmap(-1, len(content))
    buffer[:] = content
    storage, _ = read_pickles(buffer)
    return storage  # type: ignore[return-value]  # rebuild_tensor refuses what is none


def _no_storage(key: str, dtype: torch.dtype, numel: int) -> Tensor:
    raise Refused("a bare pickle whose weights are in another file; ask for the file that torch.save wrote")


def _window(buffer: mmap.mmap, start: int, numel: int, dtype: torch.dtype) -> Tensor:
    """Return a flat tensor over a part of the buffer; a copy where the numbers do not start at multiples of their size."""
    if numel == 0:
        return torch.empty(0, dtype=dtype)
    window = torch.frombuffer(buffer, dtype=torch.uint8, offset=start, count=numel * dtype.itemsize)
    return (window.clone() if start % dtype.itemsize else window).view(dtype)


def check_size(buffer: mmap.mmap, expected: int):
    """Refuse a file that ends before `expected` bytes."""
    if len(buffer) < expected:
        raise Refused(f"truncated download? expected at least {expected:,} bytes, found {len(buffer):,}")


def _check_byte_order(written: str):
    if written != sys.byteorder:
        raise Refused(f"its numbers are {written}-endian, this machine's {sys.byteorder}-endian; save it again on a machine like this")
