"""Files that appear whole or not at all, and that safetensors itself reads back."""

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from weights_loader import write
from weights_loader.read import read
from weights_loader.write import DTYPES, new_folder, write_safetensors, write_torch


def test_safetensors_itself_reads_back_every_dtype_shape_and_stride(tmp_path):
    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in DTYPES} | {
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "transposed": base.T,
        "part": base[1:3, ::2],
        "tied": base,
        "grad": torch.nn.Parameter(base[0].clone()),
        'quoted "é"\n': base[1],
    }
    write_safetensors(tmp_path / "x.safetensors", tensors, {"format": "pt", "note": '{"a": "é"}'})
    for loaded in (load_file(tmp_path / "x.safetensors"), read(tmp_path / "x.safetensors").tensors):
        assert loaded.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert loaded[name].dtype == tensor.dtype and torch.equal(loaded[name], tensor), name
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": '{"a": "é"}'}


def test_numbers_start_at_multiples_of_their_size(tmp_path):
    write_safetensors(tmp_path / "x", {"a": torch.ones(3, dtype=torch.uint8), "b": torch.ones(3), "c": torch.ones(3, dtype=torch.float64)})
    assert all(tensor.data_ptr() % tensor.element_size() == 0 for tensor in read(tmp_path / "x").tensors.values())


def test_the_same_input_gives_the_same_bytes_in_whatever_order(tmp_path):
    tensors = {f"w{i}": torch.full((3,), float(i)) for i in range(9)}
    metadata = {f"key{i}": str(i) for i in range(9)}
    write_safetensors(tmp_path / "a", tensors, metadata)
    write_safetensors(tmp_path / "b", dict(reversed(tensors.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_without_metadata_or_tensors_the_file_is_valid(tmp_path):
    write_safetensors(tmp_path / "x", {})
    assert load_file(tmp_path / "x") == {}
    write_safetensors(tmp_path / "x", {"w": torch.ones(2)})
    assert read(tmp_path / "x").metadata == {}


def test_what_goes_in_is_not_changed(tmp_path):
    tensors, metadata = {"b": torch.ones(2, 3).T, "a": torch.ones(1)}, {"z": "1", "y": "2"}
    write_safetensors(tmp_path / "x", tensors, metadata)
    assert list(tensors) == ["b", "a"] and list(metadata) == ["z", "y"] and tensors["b"].stride() == (1, 3)


def test_a_file_can_replace_the_one_its_tensors_were_read_from(tmp_path):
    path = tmp_path / "x"
    write_safetensors(path, {"w": torch.arange(100_000.0)})
    tensors = read(path).tensors
    write_safetensors(path, {"w": tensors["w"] + 1, "old": tensors["w"]})
    assert torch.equal(tensors["w"], torch.arange(100_000.0))
    assert torch.equal(read(path).tensors["w"], torch.arange(100_000.0) + 1)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [b"the old file", None])
def test_a_write_that_fails_midway_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, error, old):
    path = tmp_path / "x.safetensors"
    if old:
        path.write_bytes(old)
    written, whole = [], write.tensor_bytes

    def fail_at_the_second(tensor):
        if written:
            assert len(list(tmp_path.iterdir())) == 1 + bool(old), "the failure should come when the file is begun"
            raise error
        written.append(tensor)
        return whole(tensor)

    monkeypatch.setattr(write, "tensor_bytes", fail_at_the_second)
    with pytest.raises(type(error)):
        write_safetensors(path, {"a": torch.ones(1000), "z": torch.ones(1000)})
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == ([old] if old else [])


def test_the_numbers_are_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, name=name, real=real: (calls.append(name), real(*args))[1])
    write_safetensors(tmp_path / "x", {"w": torch.ones(2)})
    assert calls == ["fsync", "replace"]


@pytest.mark.parametrize(
    "tensors, metadata, message",
    [
        ({"w": torch.ones(1, dtype=torch.complex64)}, None, "'w' is torch.complex64; safetensors has F64"),
        # After a good entry: the checker of annotations, which tests may run under, looks at the first only.
        ({"w": torch.ones(1), 3: torch.ones(1)}, None, "tensor name 3"),
        ({"__metadata__": torch.ones(1)}, None, "keeps for itself"),
        ({"w": torch.ones(1)}, {"good": "text", "steps": 3}, "metadata 'steps': 3; safetensors keeps text only"),
    ],
)
def test_what_the_format_cannot_hold_is_refused_before_anything_is_written(tmp_path, tensors, metadata, message):
    with pytest.raises(ValueError, match=message):
        write_safetensors(tmp_path / "x", tensors, metadata)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_as_target_or_none_around_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match="a folder; give the name of a file"):
        write_safetensors(tmp_path, {})
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        write_safetensors(tmp_path / "none" / "x", {})
    with pytest.raises(FileNotFoundError, match="there is no folder"), new_folder(tmp_path / "none" / "x"):
        pass


@pytest.mark.parametrize("empty_target", [False, True])
def test_a_folder_appears_when_it_is_complete(tmp_path, empty_target):
    target = tmp_path / "model"
    if empty_target:
        target.mkdir()
    with new_folder(target) as folder:
        (folder / "unet").mkdir()
        write_safetensors(folder / "unet" / "x", {"w": torch.ones(2)})
        assert not (target / "unet").exists()
    assert torch.equal(read(target / "unet" / "x").tensors["w"], torch.ones(2))
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), new_folder(tmp_path / "model") as folder:
        (folder / "half").write_text("half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_never_overwritten_by_a_folder(tmp_path):
    (tmp_path / "file").write_text("kept")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("kept")
    for name in ("file", "model"):
        with pytest.raises(ValueError, match=f"{name}: exists already"), new_folder(tmp_path / name):
            raise AssertionError("the body must not run")
    assert (tmp_path / "model" / "weights").read_text() == (tmp_path / "file").read_text() == "kept"


def test_torch_reads_back_a_dict_of_tensors_and_text_and_so_do_we(tmp_path):
    base = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    tree = {"name": "<cat>", "step": None, "string_to_param": {"*": torch.nn.Parameter(base[:2])}, "u": base.T[:3, :4]}
    write_torch(tmp_path / "x.pt", tree)
    for back in (torch.load(tmp_path / "x.pt", weights_only=True), read(tmp_path / "x.pt").tree):
        assert back["name"] == "<cat>" and back["step"] is None
        assert torch.equal(back["string_to_param"]["*"], base[:2]) and torch.equal(back["u"], base.T[:3, :4])
    assert (tmp_path / "x.pt").stat().st_size < 600 * 4, "not the whole storage of a part"
    assert list(tmp_path.iterdir()) == [tmp_path / "x.pt"]


def test_a_torch_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    write_torch(tmp_path / "x.pt", {"w": torch.ones(2)})
    old = (tmp_path / "x.pt").read_bytes()
    with pytest.raises(Exception, match="pickle"):
        write_torch(tmp_path / "x.pt", {"w": torch.zeros(2), "function": lambda: None})
    assert (tmp_path / "x.pt").read_bytes() == old and list(tmp_path.iterdir()) == [tmp_path / "x.pt"]
    with pytest.raises(FileNotFoundError, match="there is no folder .*nowhere; make it first"):
        write_torch(tmp_path / "nowhere" / "x.pt", {})


def test_what_a_killed_save_left_of_a_folder_is_cleared_by_the_next_one(tmp_path):
    leftover = tmp_path / ".model.0123abcd.tmp"
    (leftover / "unet").mkdir(parents=True)
    (leftover / "unet" / "weights").write_bytes(bytes(100))
    (tmp_path / ".model-2.0123abcd.tmp").mkdir()  # of another place
    with new_folder(tmp_path / "model") as outer:
        assert not leftover.exists()
        with new_folder(tmp_path / "model"):
            assert outer.exists(), "that one is at work"
        (tmp_path / "model").rmdir()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".model-2.0123abcd.tmp", "model"]
