"""Grids and PNG files: where each picture lands, the text beside it, and nothing left behind."""

import pytest
from PIL import Image

from minidiff.pictures import grid, save_png


def pictures(count, size=(3, 2)):
    return [Image.new("RGB", size, (10 * i, 0, 0)) for i in range(count)]


@pytest.mark.parametrize(
    "count, columns, expected", [(2, None, (2, 1)), (3, None, (2, 2)), (5, None, (3, 2)), (9, None, (3, 3)), (8, 4, (4, 2)), (3, 1, (1, 3))]
)
def test_a_grid_is_read_like_a_page(count, columns, expected):
    sheet = grid(pictures(count), columns)
    wide, high = expected
    assert sheet.size == (3 * wide, 2 * high)
    for cell in range(wide * high):
        x, y = 3 * (cell % wide), 2 * (cell // wide)
        colour = (10 * cell, 0, 0) if cell < count else (255, 255, 255)
        assert sheet.crop((x, y, x + 3, y + 2)).getcolors() == [(6, colour)], cell


def test_a_single_picture_is_its_own_grid():
    (picture,) = pictures(1)
    assert grid([picture]) is picture


def test_no_pictures_and_pictures_of_several_sizes_are_refused():
    with pytest.raises(ValueError, match="at least one"):
        grid([])
    with pytest.raises(ValueError, match=r"sizes \[\(3, 2\), \(4, 4\)\]"):
        grid([*pictures(1), *pictures(1, (4, 4))])


@pytest.mark.parametrize("text", ["a cat\nSteps: 30, Seed: 7", "une pêche, 桃, 🍑", ""])
def test_the_text_comes_back_from_the_file(tmp_path, text):
    path = tmp_path / "picture.png"
    (picture,) = pictures(1)
    save_png(picture, path, text)
    with Image.open(path) as read:
        assert read.format == "PNG" and read.text["parameters"] == text
        assert read.tobytes() == picture.tobytes()
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]


def test_without_settings_there_is_no_text(tmp_path):
    save_png(pictures(1)[0], tmp_path / "picture.PNG")
    with Image.open(tmp_path / "picture.PNG") as read:
        assert read.text == {}


def test_a_failure_leaves_the_old_picture_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "picture.png"
    save_png(pictures(1)[0], path)
    before = path.read_bytes()

    def full_disk(self, target, **options):
        target.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_png(pictures(2)[1], path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_other_names_and_missing_folders_are_refused(tmp_path):
    with pytest.raises(ValueError, match="written as PNG; name it picture.png"):
        save_png(pictures(1)[0], tmp_path / "picture.jpg")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        save_png(pictures(1)[0], tmp_path / "nowhere" / "picture.png")
    assert list(tmp_path.iterdir()) == []
