"""One door for every kind of file: detection by content, the wrapper, shards, folders, and what is said of the rest."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from weights_loader.read import find_weights, read

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.arange(2, dtype=torch.float16)}


def same(tensors: dict, expected: dict) -> bool:
    return tensors.keys() == expected.keys() and all(
        torch.equal(tensors[name], tensor) and tensors[name].dtype == tensor.dtype for name, tensor in expected.items()
    )


# ------------------------------------------------------------------------------------------------------------ safetensors


def test_safetensors_gives_tensors_and_metadata(tmp_path):
    dtypes = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn)
    tensors = {str(dtype): torch.arange(6).reshape(2, 3).to(dtype) for dtype in dtypes} | {
        "scalar": torch.tensor(3),
        "none": torch.empty(0, 2),
    }
    save_file(tensors, tmp_path / "x", {"format": "pt", "note": "é"})
    checkpoint = read(str(tmp_path / "x"))
    assert same(checkpoint.tensors, tensors)
    assert checkpoint.metadata == {"format": "pt", "note": "é"}
    assert checkpoint.notes == () and checkpoint.tree is checkpoint.tensors and checkpoint.path == tmp_path / "x"


def test_writing_to_a_safetensors_tensor_leaves_the_file_alone(tmp_path):
    save_file(WEIGHTS, tmp_path / "x")
    before = (tmp_path / "x").read_bytes()
    read(tmp_path / "x").tensors["a.weight"].fill_(5)
    assert (tmp_path / "x").read_bytes() == before


def test_a_truncated_safetensors_file_is_told_with_both_sizes(tmp_path):
    save_file(WEIGHTS, tmp_path / "x")
    whole = (tmp_path / "x").read_bytes()
    header_end = 8 + int.from_bytes(whole[:8], "little")
    for size, expected in ((9, header_end), (header_end - 1, header_end), (header_end, len(whole)), (len(whole) - 1, len(whole))):
        (tmp_path / "x").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=f"x: truncated download. expected at least {expected:,} bytes, found {size:,}$"):
            read(tmp_path / "x")


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    "header, numbers",
    [
        ({"w": entry(dtype="F7")}, 8),
        ({"w": entry(shape=(3,))}, 8),
        ({"w": entry(shape=(-2,))}, 8),
        ({"w": entry(), "v": entry()}, 8),  # two tensors at one place
        ({"w": entry(), "v": entry(offsets=(4, 12))}, 12),  # overlapping
        ({"w": entry(offsets=(8, 0))}, 8),
        ({"w": entry(offsets=(-8, 0))}, 8),
        ({"w": entry(offsets=(4, 12))}, 12),  # a hole
        ({"w": entry()}, 100),  # more numbers than tensors
        ({"w": entry(offsets=("0", "8"))}, 8),
        ({"w": entry(offsets=())}, 8),
        ({"w": {}}, 8),
        ({"w": 3}, 8),
        ({"w": entry(), "__metadata__": {"a": 1}}, 8),
        (b'{"w": ', 8),
        (b"{" * 100_000, 8),
        (b'{"\xff": 1}', 8),
    ],
)
def test_a_wrong_safetensors_header_is_refused(tmp_path, header, numbers):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text + bytes(numbers))
    with pytest.raises(ValueError, match="x: damaged: it begins as a safetensors file"):
        read(tmp_path / "x")


# --------------------------------------------------------------------------------------------------------- torch's objects


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors", ".txt", ""])
def test_the_name_of_a_file_does_not_matter(tmp_path, suffix):
    path = tmp_path / f"model{suffix}"
    for write in (
        lambda: save_file(WEIGHTS, path),
        lambda: torch.save(WEIGHTS, path),
        lambda: torch.save(WEIGHTS, path, _use_new_zipfile_serialization=False),
        lambda: path.write_bytes(pickle.dumps(WEIGHTS)),
    ):
        write()
        assert same(read(path).tensors, WEIGHTS)


def test_the_state_dict_wrapper_is_taken_off_and_what_was_beside_it_is_told(tmp_path):
    beside = {"global_step": 470000, "optimizer_states": [{"exp_avg": torch.ones(3)}]}
    torch.save({"state_dict": {"state_dict": WEIGHTS, "epoch": 2}, **beside}, tmp_path / "x.ckpt")
    checkpoint = read(tmp_path / "x.ckpt")
    assert same(checkpoint.tensors, WEIGHTS) and checkpoint.metadata == {}
    assert checkpoint.notes == (
        "'global_step' stands beside the state dict: 470000.",
        "'optimizer_states' stands beside the state dict: a list of 1.",
        "'epoch' stands beside the state dict: 2.",
    )


def test_nested_small_files_come_flat_and_as_the_tree_they_are(tmp_path):
    vector, layers = torch.arange(4.0), [torch.ones(2), torch.zeros(2)]
    torch.save({"string_to_param": {"*": vector}, "name": "cat", "step": None, "layers": layers, 3: vector}, tmp_path / "x.pt")
    checkpoint = read(tmp_path / "x.pt")
    assert list(checkpoint.tensors) == ["string_to_param.*", "layers.0", "layers.1", "3"]
    assert torch.equal(checkpoint.tree["string_to_param"]["*"], vector) and checkpoint.tree["name"] == "cat"
    assert checkpoint.notes == ("'name' is not a tensor: 'cat'.", "'step' is not a tensor: None.")


def test_a_list_of_tensors_is_numbered(tmp_path):
    torch.save([torch.ones(2), torch.zeros(1)], tmp_path / "x.pt")
    assert list(read(tmp_path / "x.pt").tensors) == ["0", "1"]


def test_two_tensors_of_one_name_are_refused(tmp_path):
    torch.save({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="two tensors have the name 'a.b'"):
        read(tmp_path / "x.pt")


# --------------------------------------------------------------------------------------------------------------- shards


def sharded(folder, names=("model-1.safetensors", "model-2.safetensors")):
    save_file({"a.weight": WEIGHTS["a.weight"]}, folder / names[0], {"format": "pt"})
    save_file({"a.bias": WEIGHTS["a.bias"]}, folder / names[1])
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 28}, "weight_map": dict(zip(WEIGHTS, names))}, indent=2))
    return index


def test_an_index_and_its_shards_are_one_checkpoint(tmp_path):
    index = sharded(tmp_path)
    for path in (index, tmp_path):
        checkpoint = read(path)
        assert same(checkpoint.tensors, WEIGHTS) and checkpoint.metadata == {"format": "pt"} and checkpoint.path == index


def test_a_shard_that_is_missing_or_wrong_is_named(tmp_path):
    index = sharded(tmp_path)
    save_file({"other": torch.ones(1)}, tmp_path / "model-2.safetensors")
    with pytest.raises(ValueError, match="1 tensors of the index are in no shard, first a.bias"):
        read(index)
    (tmp_path / "model-2.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="model-2.safetensors: the file is empty"):
        read(index)
    (tmp_path / "model-2.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="1 of 2 shards are not beside it, first model-2.safetensors"):
        read(index)


@pytest.mark.parametrize("text", ["{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": []}}', "{", '{"a": "b"}'])
def test_other_json_is_no_index(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json: JSON, but not the index"):
        read(tmp_path / "config.json")


def test_an_index_may_not_name_files_elsewhere(tmp_path):
    (tmp_path / "x.json").write_text('{"weight_map": {"a": "../secret.bin"}}')
    with pytest.raises(ValueError, match="outside its folder: '../secret.bin'"):
        read(tmp_path / "x.json")


# --------------------------------------------------------------------------------------------------------------- folders


def test_a_folder_gives_full_precision_before_fp16_and_safetensors_before_pickles(tmp_path):
    order = [
        "diffusion_pytorch_model.safetensors",
        "diffusion_pytorch_model.bin",
        "diffusion_pytorch_model.safetensors.index.fp16.json",
        "pytorch_model.fp16.bin",
    ]
    for name in order + ["config.json", "diffusion_pytorch_model.non_ema.safetensors"]:
        (tmp_path / name).touch()
    for name in order:
        assert find_weights(tmp_path).name == name
        (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match="no weights in this folder .it holds config.json, diffusion_pytorch_model.non_ema"):
        find_weights(tmp_path)


def test_an_empty_folder_and_a_whole_diffusers_model_are_told_apart(tmp_path):
    with pytest.raises(FileNotFoundError, match="it holds nothing"):
        read(tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="a whole diffusers model"):
        read(tmp_path)


# ---------------------------------------------------------------------------------------------------------- not checkpoints


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 4265146304\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html>\n<html>", "a web page"),
        (b"<HTML><body>404", "a web page"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "a picture, not weights; words that web interfaces hide"),
        (b"GGUF\3\0\0\0" + bytes(100), "a GGUF file of stable-diffusion.cpp, which is not read; give the .safetensors"),
        (b"\x1f\x8b\x08" + bytes(100), "a packed archive, not weights; unpack it first"),
        (b"Rar!\x1a\x07\x01" + bytes(100), "a packed archive"),
        (b"Entry not found", "truncated download, or no checkpoint. 15 bytes that begin with b'Entry not fo'"),
        (b"PK" + bytes(100), "truncated download, or no checkpoint"),
        (bytes(1000), "truncated download, or no checkpoint"),
        (bytes(257) + b"ustar" + bytes(300), "a tar archive"),
        (b"N.", "no tensors in it"),
        (pickle.dumps({"epoch": 3}), "no tensors in it; 'epoch' is not a tensor: 3."),
    ],
)
def test_what_is_no_checkpoint_is_named_for_what_it_is(tmp_path, content, message):
    (tmp_path / "model.ckpt").write_bytes(content)
    with pytest.raises(ValueError, match=f"model.ckpt: {message}"):
        read(tmp_path / "model.ckpt")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone.ckpt: no such file"):
        read(tmp_path / "gone.ckpt")


def test_a_state_dict_that_holds_itself_has_an_end(tmp_path):
    weights = {"epoch": 1}
    weights["state_dict"] = weights
    (tmp_path / "x.ckpt").write_bytes(pickle.dumps(weights, protocol=2))
    with pytest.raises(ValueError, match="no tensors in it"):
        read(tmp_path / "x.ckpt")


def test_weights_beside_and_inside_a_state_dict_are_all_kept_but_a_few_are_told(tmp_path):
    torch.save({**{name: torch.ones(1) for name in "acde"}, "state_dict": {"b": torch.zeros(1)}}, tmp_path / "x.ckpt")
    assert set(read(tmp_path / "x.ckpt").tensors) == {*"acde", "state_dict.b"}
    torch.save({"ema_loss": torch.ones(2), "state_dict": {"b": torch.zeros(1)}}, tmp_path / "x.ckpt")
    checkpoint = read(tmp_path / "x.ckpt")
    assert set(checkpoint.tensors) == {"b"} and checkpoint.notes == ("'ema_loss' stands beside the state dict: a tensor of shape (2,).",)


def test_numbers_among_the_tensors_are_kept_by_name(tmp_path):
    torch.save({"w": torch.ones(1), "a": {"alpha": 4}, "half": 0.5, "on": True, "huge": 2**100}, tmp_path / "x.pt")
    assert read(tmp_path / "x.pt").numbers == {"a.alpha": 4.0, "half": 0.5}


def test_many_things_that_are_no_tensors_are_told_in_a_few_notes(tmp_path):
    torch.save({"w": torch.ones(1), "history": list(range(1000))}, tmp_path / "x.pt")
    notes = read(tmp_path / "x.pt").notes
    assert len(notes) == 41 and notes[-1] == "... and 960 more things that are no tensors."


@pytest.mark.parametrize("name", ["x.json", "y.json"])
def test_an_index_is_no_shard(name, tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"weight_map": {"a": name}}))
    (tmp_path / "y.json").write_text(json.dumps({"weight_map": {"a": "x.json"}}))
    with pytest.raises(ValueError, match="an index, named as one of the shards of another"):
        read(tmp_path / "x.json")


def test_a_header_longer_than_any_models_is_refused_before_it_is_read(tmp_path):
    text = b'{"w":' + b" " * 26_000_000 + b"{}}"
    (tmp_path / "x").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(ValueError, match="a header of 26,000,016 bytes, more than any model's"):
        read(tmp_path / "x")


def test_what_is_neither_file_nor_folder_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: neither a file nor a folder"):
        read(tmp_path / "pipe")
