import hashlib
import re

import pytest
import torch

import weights_loader
from tests.checkpoints import family_model, ldm_tensors
from weights_loader.read import verify
from weights_loader.write import write_safetensors

TENSORS = {"w": torch.arange(1000.0), "v": torch.arange(9)}


def flip(path, place):
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_changed_number_in_a_zip_is_found(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save(TENSORS, path)
    assert verify(path) == (f"{path}: every entry has its checksum",)
    flip(path, path.read_bytes().index(TENSORS["w"].numpy().tobytes()) + 100)
    with pytest.raises(ValueError, match="x.ckpt: damaged: Bad CRC-32 for file .*data/0"):
        verify(path)


def test_a_checksum_in_the_metadata_of_a_safetensors_file_is_compared(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, TENSORS)
    assert verify(path) == (f"{path}: no checksum in it",)
    content = path.read_bytes()
    data = content[8 + int.from_bytes(content[:8], "little") :]
    for key, before in (("sshs_model_hash", ""), ("modelspec.hash_sha256", "0x")):
        write_safetensors(path, TENSORS, {key: before + hashlib.sha256(data).hexdigest()})
        assert verify(path) == (f"{path}: the numbers are those of its {key}",)
        flip(path, -3)
        assert f"not the numbers of its {key}" in verify(path)[0]


def test_the_files_of_a_folder_and_formats_without_a_checksum_are_named(tmp_path):
    torch.save(TENSORS, tmp_path / "a.bin", _use_new_zipfile_serialization=False)
    write_safetensors(tmp_path / "b.safetensors", TENSORS)
    (tmp_path / "config.json").write_text("{}")
    assert [line.rpartition(": ")[2] for line in verify(tmp_path)] == ["no checksum in this format", "no checksum in it"]


def test_inspect_and_convert_find_damaged_numbers(tmp_path):
    sd = family_model("SD 1")
    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": ldm_tensors(sd)}, path)
    weight = sd.unet.conv_out.weight.detach().numpy().tobytes()
    flip(path, path.read_bytes().index(weight) + 5)
    for use in (
        lambda: weights_loader.inspect(path, verify=True),
        lambda: weights_loader.convert(path, tmp_path / "out.safetensors"),
    ):
        with pytest.raises(ValueError, match=r"model.ckpt: damaged: Bad CRC-32.*download it again"):
            use()
    assert not (tmp_path / "out.safetensors").exists()


def test_inspect_says_what_the_checksums_show(tmp_path):
    weights_loader.save(family_model("SD 1"), tmp_path / "model.safetensors")
    assert re.search(
        "note .*model.safetensors: no checksum in it", str(weights_loader.inspect(tmp_path / "model.safetensors", verify=True))
    )
