"""Which pictures of a folder are measured, and the prompts that stand in them."""

import pytest
from PIL import Image

from minidiff.evaluation.folder import find_drawn_pictures, read_prompts
from minidiff.pictures import save_png
from minidiff.png_settings import is_grid, read_settings


def picture(path, parameters=None, size=(64, 48)):
    save_png(Image.new("RGB", size, "green"), path, parameters)
    return path


@pytest.mark.parametrize(
    "parameters, prompt",
    [
        ("a cat\nSteps: 20, Sampler: Euler a, Size: 64x48, Model: x", "a cat"),
        ("a cat,\non a mat\nNegative prompt: dogs\nSteps: 20, Size: 64x48", "a cat,\non a mat"),
        ("Size: 1x1 of a cat\nSteps: 20, Seed: 3, Size: 64x48, Version: 1.9", "Size: 1x1 of a cat"),
    ],
)
def test_prompt_and_size_are_read_as_web_interfaces_write_them(tmp_path, parameters, prompt):
    assert read_settings(picture(tmp_path / "a.png", parameters)) == (prompt, (64, 48))


def test_other_text_and_files_that_are_no_pictures_say_nothing(tmp_path):
    assert read_settings(picture(tmp_path / "a.png", "a cat")) is None
    assert read_settings(picture(tmp_path / "b.png")) is None
    (tmp_path / "c.png").write_bytes(b"no picture")
    assert read_settings(tmp_path / "c.png") is None


def test_prompts_inside_count_only_if_all_have_one_and_captions_come_first(tmp_path):
    paths = [picture(tmp_path / f"{i}.png", f"cat {i}\nSteps: 1, Size: 64x48") for i in range(2)]
    assert read_prompts(tmp_path, paths) == ["cat 0", "cat 1"]
    picture(tmp_path / "1.png")
    with pytest.warns(UserWarning, match="1 of 2 pictures do not say their prompt, so none is read"):
        assert read_prompts(tmp_path, paths) == []
    for i in range(2):
        (tmp_path / f"{i}.txt").write_text(f"dog {i}")
    assert read_prompts(tmp_path, paths) == ["dog 0", "dog 1"]
    (tmp_path / "1.txt").write_text(" ")
    with pytest.raises(ValueError, match="1.png: its caption is empty"):
        read_prompts(tmp_path, paths)


@pytest.mark.parametrize(
    "size, settings, passed_over",
    [
        ((128, 48), "Size: 64x48", True),
        ((128, 96), "Size: 64x48, Seed: 3", True),
        ((64, 48), "Size: 64x48", False),
        ((128, 96), "Size: 64x48, Hires upscale: 2", False),
        ((96, 72), "Size: 64x48", False),
        ((128, 96), "Seed: 3", False),
    ],
)
def test_a_grid_is_told_from_a_picture_that_was_enlarged(tmp_path, size, settings, passed_over):
    assert is_grid(picture(tmp_path / "a.png", f"a cat\nSteps: 20, {settings}", size)) == passed_over


def test_a_folder_without_pictures_is_named(tmp_path):
    with pytest.raises(ValueError, match="no picture in it; give a folder with"):
        find_drawn_pictures(tmp_path)
