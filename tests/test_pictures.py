"""Grids and PNG files: where each picture lands, the text beside it, and nothing left behind."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize, to_tensor

from minidiff.pictures import fit, grid, load_picture, save_png, to_pixels
from minidiff.pipeline import to_images


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


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


# --- opened -----------------------------------------------------------------------------------------------------------


def test_a_picture_is_turned_as_its_exif_data_say(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the top is at the right
    image = noise(8, 4)
    image.save(tmp_path / "x.png", exif=exif)
    turned = load_picture(tmp_path / "x.png")
    assert np.array_equal(turned, np.rot90(np.asarray(image), k=-1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_lies_on_white(tmp_path, mode):
    values = np.zeros((2, 2, 4), np.uint8)
    values[..., 3] = [[0, 255], [128, 255]]
    image = Image.fromarray(values)
    if mode == "P":
        image = Image.new("P", (2, 2), 0)
        image.putpalette([0, 0, 0, 0, 0, 0])
        image.putpixel((1, 0), 1)
        image.putpixel((1, 1), 1)
        image.save(tmp_path / "x.png", transparency=0)
        expected = [[255, 0], [255, 0]]
    else:
        image.convert(mode).save(tmp_path / "x.png")
        expected = [[255, 0], [127, 0]]  # 255 (1 - 128 / 255)
    loaded = load_picture(tmp_path / "x.png")
    assert loaded.mode == "RGB" and np.array_equal(np.asarray(loaded), np.repeat(np.array(expected)[..., None], 3, axis=2))


def test_sixteen_bits_of_grey_are_scaled_not_cut(tmp_path):
    Image.fromarray(np.array([[0, 257 * 100], [65535, 256]], np.uint16)).save(tmp_path / "x.png")
    assert np.array_equal(np.asarray(load_picture(tmp_path / "x.png"))[..., 0], [[0, 100], [255, 1]])


@pytest.mark.parametrize("mode, ending", [("L", "png"), ("1", "png"), ("P", "png"), ("CMYK", "jpg"), ("L", "webp")])
def test_other_kinds_of_picture_look_as_pillow_shows_them(tmp_path, mode, ending):
    noise(16, 16).convert(mode).save(tmp_path / f"x.{ending}")
    with Image.open(tmp_path / f"x.{ending}") as image:
        assert np.array_equal(load_picture(tmp_path / f"x.{ending}"), image.convert("RGB"))


def test_a_picture_of_ordinary_size_brings_no_warning(tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat")
    noise(16, 16).save(tmp_path / "x.png", pnginfo=info)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_picture(tmp_path / "x.png")


# --- fit --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width, height", [(96, 64), (64, 96), (64, 64), (16, 48)])
def test_fit_is_torchvisions_resize_and_centre_crop(width, height):
    image = noise(width, height).point(lambda value: 64 + value // 2)  # bicubic overshoots, and clipping depends on which axis comes first
    reference = center_crop(resize(image, 32, InterpolationMode.BICUBIC), 32)
    # One byte: Pillow rounds between its two passes, and their order is its own choice.
    torch.testing.assert_close(fit(image, 32), to_tensor(reference) * 2 - 1, rtol=0, atol=1.001 / 127.5)


def test_fit_gives_one_pixel_for_one_and_mirrors_them():
    image = noise(32, 32)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1
    assert torch.equal(fit(image, 32), pixels) and pixels.min() == -1 and pixels.max() == 1
    assert torch.equal(fit(image, 32, flip=True), pixels.flip(2))
    assert torch.equal(fit(noise(50, 32), 32, crop=(1.0, 0.3)), fit(noise(50, 32).crop((18, 0, 50, 32)), 32))


def test_fit_refuses_a_crop_outside():
    with pytest.raises(ValueError, match=r"crop \(0.5, 1.2\): both places must lie in 0..1"):
        fit(noise(8, 8), 8, crop=(0.5, 1.2))


def test_bytes_become_pixels_and_come_back():
    images = np.stack([np.asarray(noise(8, 4, seed)) for seed in range(2)])
    pixels = to_pixels(images)
    assert pixels.shape == (2, 3, 4, 8) and pixels.min() >= -1 and pixels.max() <= 1
    assert all(np.array_equal(np.asarray(back), image) for back, image in zip(to_images(pixels), images))
