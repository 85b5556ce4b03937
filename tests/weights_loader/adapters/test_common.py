"""A small file is found in its folder, and the error of one that does not fit names what is near and what is too much."""

import pytest

from weights_loader.adapters.common import misfit, weights_file

NAMES = ("a.safetensors", "a.bin", "b.safetensors")


def test_a_file_is_itself_and_a_folder_gives_the_first_of_the_names_it_has(tmp_path):
    assert weights_file(tmp_path / "x.bin", NAMES, "LoRA") == tmp_path / "x.bin"
    for name in ("b.safetensors", "a.bin"):
        (tmp_path / name).touch()
    assert weights_file(str(tmp_path), NAMES, "LoRA") == tmp_path / "a.bin"


def test_a_folder_without_any_is_named_for_what_it_is(tmp_path):
    with pytest.raises(ValueError, match="no LoRA in this folder; expected a file, or a folder with a.safetensors or b.safetensors"):
        weights_file(tmp_path, NAMES, "LoRA")
    (tmp_path / "model_index.json").touch()
    with pytest.raises(ValueError, match="a whole model, given as a LoRA"):
        weights_file(tmp_path, NAMES, "LoRA")


def test_a_misfit_shows_a_few_of_each_kind_and_counts_the_rest():
    said = misfit("does not fit", [f"layer.{i}.to_kk" for i in range(6)], ["layer.0.to_k", "other"], ["layer.1 is wide"])
    lines = said.split("\n")
    assert lines[:2] == ["does not fit", "  no layer layer.0.to_kk (nearest: layer.0.to_k)"]
    assert lines[5:] == ["  ... and 2 more", "  layer.1 is wide"]
