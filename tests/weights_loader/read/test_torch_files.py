"""torch's own formats: the same tensors as torch.load gives, and a plain word for every file that is broken."""

import io
import pickle
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from weights_loader.read import read

DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
)
NEWER = (torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16)  # stored as bytes and a dtype; in zips only
FORMATS = ("zip", "legacy", "bare")


def save(value, path: Path, format: str):
    if format == "bare":
        path.write_bytes(pickle.dumps(value))
    else:
        torch.save(value, path, _use_new_zipfile_serialization=format == "zip")
    return path


def many_kinds() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(4, 6, generator=generator)
    tensors = {f"dtype.{dtype}": (torch.randn(3, 5, generator=generator) * 50).to(dtype) for dtype in DTYPES}
    return tensors | {
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "base": base,
        "row": base[2],
        "transposed": base.T,
        "every other": base[:, ::2],
        "one axis more": torch.tensor([1.0, 2.0]).expand(1, 2),
        "channels last": torch.randn(2, 3, 4, 5, generator=generator).to(memory_format=torch.channels_last),
        "parameter": nn.Parameter(torch.randn(3, generator=generator)),
    }


@pytest.mark.parametrize("format", FORMATS)
def test_every_tensor_equals_what_torch_load_gives(tmp_path, format):
    path = save(many_kinds(), tmp_path / "x.ckpt", format)
    theirs = pickle.loads(path.read_bytes()) if format == "bare" else torch.load(path, weights_only=True)
    ours = read(path).tensors
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype and ours[name].shape == tensor.shape and ours[name].stride() == tensor.stride(), name
        assert torch.equal(ours[name], tensor), name
        assert not ours[name].requires_grad


@pytest.mark.parametrize("dtype", NEWER, ids=str)
def test_newer_dtypes_are_read(dtype, tmp_path):
    numbers = torch.arange(12.0).reshape(3, 4).to(dtype)
    path = save({"state_dict": {"w": numbers, "column": numbers[:, 1]}}, tmp_path / "x.ckpt", "zip")
    tensors = read(path).tensors
    assert tensors["w"].dtype == dtype and torch.equal(tensors["w"].double(), numbers.double())
    assert torch.equal(tensors["column"].double(), numbers[:, 1].double())


@pytest.mark.parametrize("format", FORMATS)
def test_the_state_dict_of_a_module_is_read(tmp_path, format):
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    tensors = read(save(module.state_dict(), tmp_path / "x.pt", format)).tensors
    assert list(tensors) == list(module.state_dict())
    assert all(torch.equal(tensors[name], tensor) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("format", ["zip", "legacy"])  # pickle without torch.save stores one copy for each tensor
def test_tensors_that_share_a_storage_still_share_it(tmp_path, format):
    base = torch.arange(6.0)
    tensors = read(save({"a": base, "b": base[2:], "c": base.clone()}, tmp_path / "x.pt", format)).tensors
    tensors["a"][2] = 100
    assert tensors["b"][0] == 100 and tensors["c"][2] == 2


@pytest.mark.parametrize("format", FORMATS)
def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path, format):
    path = save({"a": torch.zeros(1000)}, tmp_path / "x.pt", format)
    before = path.read_bytes()
    read(path).tensors["a"].fill_(1)
    assert path.read_bytes() == before


@pytest.mark.parametrize("format", FORMATS)
def test_every_number_stands_at_a_multiple_of_its_size(tmp_path, format):
    for length in range(8):  # the name moves what comes after it
        tensors = read(save({"n" * length: torch.arange(3.0), "long": torch.arange(3)}, tmp_path / "x.pt", format)).tensors
        assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in tensors.values())


@pytest.mark.parametrize("format", FORMATS)
def test_a_whole_pickled_model_is_named_and_not_made(tmp_path, format):
    path = save(nn.Linear(2, 2), tmp_path / "x.pt", format)
    with pytest.raises(ValueError, match="no tensors in it.*torch.nn.modules.linear.Linear"):
        read(path)


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_cut_anywhere_is_told_as_such(tmp_path, format):
    path = save({"w": torch.arange(400.0), "v": torch.arange(9)}, tmp_path / "x.pt", format)
    whole = path.read_bytes()
    for size in (1, 3, 20, len(whole) // 2, len(whole) - 900, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"(truncated|expected more).*(found {size:,}|{size:,} bytes that begin)"):
            read(path)


def test_the_expected_size_is_told_where_the_file_still_shows_it(tmp_path):
    tensors = {"w": torch.zeros(250_000), "v": torch.zeros(250_000)}
    path = save(tensors, tmp_path / "new.pt", "zip")
    path.write_bytes(path.read_bytes()[:1_500_000])
    with pytest.raises(ValueError, match="truncated download. expected more than 2,000,000 bytes, found 1,500,000"):
        read(path)
    path = save(tensors, tmp_path / "old.pt", "legacy")
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:1_500_000])
    with pytest.raises(ValueError, match=f"truncated download. expected at least {size:,} bytes, found 1,500,000"):
        read(path)


@pytest.mark.parametrize("format", FORMATS)
def test_a_file_with_wrong_bytes_is_read_or_refused_but_never_crashes(tmp_path, format):
    path = save({"state_dict": {"w": torch.arange(4.0), "v": torch.arange(9).reshape(3, 3)}}, tmp_path / "x.pt", format)
    whole = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for place in torch.randint(len(whole), (4,), generator=generator):
            damaged[place] = int(torch.randint(256, (1,), generator=generator))
        path.write_bytes(damaged)
        try:
            for tensor in read(path).tensors.values():
                tensor.sum()
        except ValueError:
            refused += 1
    assert 20 < refused < 400, "the damage should stop some files and not all"


def rewrite_zip(path: Path, change: dict[str, bytes | None], compression=zipfile.ZIP_STORED):
    """Replace entries (by the end of their name) of a zip, or with None leave them out."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in entries.items():
            content = next((new for end, new in change.items() if name.endswith(end)), content)
            if content is not None:
                archive.writestr(name, content)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data/0": None}, "storage 0 is missing"),
        ({"data/0": bytes(15)}, "storage 0 has 15 bytes, too few for 4 numbers"),
        ({"byteorder": b"big"}, "its numbers are big-endian, this machine's little"),
        ({"data.pkl": None}, "torch.save did not write"),
        ({"byteorder": None, ".format_version": None, "serialization_id": None}, None),  # as torch 1.6 to 2.0 wrote them
    ],
)
def test_a_zip_with_wrong_entries_is_refused(tmp_path, change, message):
    path = save({"w": torch.arange(4.0)}, tmp_path / "x.pt", "zip")
    rewrite_zip(path, change)
    if message is None:
        assert torch.equal(read(path).tensors["w"], torch.arange(4.0))
    else:
        with pytest.raises(ValueError, match=message):
            read(path)


def test_a_compressed_zip_and_torchscript_are_refused_by_name(tmp_path):
    path = save({"w": torch.arange(4.0)}, tmp_path / "x.pt", "zip")
    rewrite_zip(path, {}, zipfile.ZIP_DEFLATED)
    with pytest.raises(ValueError, match="is compressed"):
        read(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"N.")
        archive.writestr("x/constants.pkl", b"N.")
    with pytest.raises(ValueError, match="TorchScript"):
        read(path)


def legacy_file(storage_id: tuple, keys: list, little_endian=True) -> bytes:
    """A legacy file by hand with one storage of four float32; the id is pickled as torch does."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return storage_id if value is legacy_file else None

    parts = io.BytesIO()
    for value in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": little_endian}):
        pickle.dump(value, parts, 2)
    Pickler(parts, 2).dump({"w": legacy_file})
    pickle.dump(keys, parts, 2)
    return parts.getvalue() + struct.pack("<q4f", 4, 0, 1, 2, 3)


@pytest.mark.parametrize(
    "storage_id, keys, little_endian, message",
    [
        (("storage", torch.FloatStorage, "7", "cpu", 4, None), ["7"], True, None),
        (("storage", torch.FloatStorage, "7", "cpu", 4, None), ["7"], False, "big-endian"),
        (("storage", torch.FloatStorage, "7", "cpu", 4, None), ["8"], True, "does not fit its tensors"),
        (("storage", torch.FloatStorage, "7", "cpu", 4, None), [], True, "does not fit its tensors"),
        (("storage", torch.FloatStorage, "7", "cpu", 4, None), 5, True, "does not fit its tensors"),
        (("storage", torch.FloatStorage, "7", "cpu", 5, None), ["7"], True, "truncated download"),
        (("storage", torch.FloatStorage, "7", "cpu", -1, None), ["7"], True, "-1 elements"),
        (("storage", torch.FloatStorage, "7", "cpu", 4, ("9", 0, 2)), ["7"], True, "a view of another"),
        (("storage", torch.nn.Linear, "7", "cpu", 4, None), ["7"], True, "a storage of type"),
        (("storage", torch.FloatStorage, ("7",), "cpu", 4, None), ["7"], True, "a storage of type"),
        (("storage",), ["7"], True, "damaged"),
    ],
)
def test_a_legacy_file_with_wrong_parts_is_refused(tmp_path, storage_id, keys, little_endian, message):
    (tmp_path / "x.pt").write_bytes(legacy_file(storage_id, keys, little_endian))
    if message is None:
        assert torch.equal(read(tmp_path / "x.pt").tensors["w"], torch.arange(4.0))
    else:
        with pytest.raises(ValueError, match=message):
            read(tmp_path / "x.pt")


MEASURE = """
import sys, torch
from weights_loader.read import read
def megabytes():
    return {line.split(":")[0]: int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("Rss")}
torch.ones(1).sum()
before = megabytes()
tensors = read(sys.argv[1]).tensors
opened = megabytes()
assert sum(float(tensor.sum()) for tensor in tensors.values()) == 0
used = megabytes()
print(opened["RssFile"] - before["RssFile"], used["RssFile"] - before["RssFile"], used["RssAnon"] - before["RssAnon"])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("format", ["zip", "safetensors"])
def test_the_weights_stay_in_the_file_until_they_are_used_and_are_never_copied(tmp_path, format):
    from safetensors.torch import save_file

    tensors = {f"w{i}": torch.zeros(1024, 1024) for i in range(50)}  # 200 MiB
    path = tmp_path / "x"
    save_file(tensors, path) if format == "safetensors" else save(tensors, path, format)
    root = Path(__file__).parents[3]
    printed = subprocess.run([sys.executable, "-c", MEASURE, path], cwd=root, capture_output=True, text=True, check=True).stdout
    opened, file_pages, copies = map(float, printed.split())
    # Libraries that Python loads meanwhile are file pages too: some 10 MiB.
    assert opened < 20 and 190 < file_pages < 220 and copies < 10
