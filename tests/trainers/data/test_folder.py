"""Folders of pictures: captions from every source, pictures of every kind, and one clear line for everything that is wrong."""

import json
import warnings

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import center_crop, resize, to_tensor

from minidiff.pictures import fit, load_picture
from minidiff.trainers.data.folder import Example, check_distinct, read_folder


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8))


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.jpg", "c.webp"):
        noise(40, 32).save(tmp_path / name)
    return tmp_path


# --- folders ----------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_by_name_with_one_caption(folder):
    (folder / ".hidden.png").write_bytes(b"no picture")
    (folder / "notes.md").write_text("no picture either")
    noise(40, 40).save(folder / "D.BMP")
    assert read_folder(folder, size=32, caption="a  photo of\nsks dog") == [
        Example(folder / name, "a photo of sks dog") for name in ("D.BMP", "a.jpg", "b.png", "c.webp")
    ]


def test_a_caption_can_be_a_function_of_the_path(folder):
    assert [example.caption for example in read_folder(folder, size=32, caption=lambda path: f"a {path.stem}")] == ["a a", "a b", "a c"]


def write_captions(folder, kind, captions):
    if kind == "NAME.txt":
        for name, text in captions.items():
            (folder / name).with_suffix(".txt").write_text(text + "\n", encoding="utf-8-sig")
    elif kind == "metadata.jsonl":
        (folder / kind).write_text("\n".join(json.dumps({"file_name": name, "text": text}) for name, text in captions.items()) + "\n\n")
    else:
        (folder / kind).write_text(json.dumps(captions))


KINDS = ("NAME.txt", "metadata.jsonl", "captions.json")


@pytest.mark.parametrize("kind", KINDS)
def test_captions_of_every_source_are_the_same(folder, kind):
    captions = {"c.webp": "a café", "a.jpg": "an apple", "b.png": "a bird"}
    write_captions(folder, kind, captions)
    assert {example.path.name: example.caption for example in read_folder(folder, size=32)} == captions


def test_a_line_of_json_may_have_any_letter_in_it(folder):
    """Python's splitlines also parts a text at Unicode's own line ends, which JSON allows inside a string."""
    rows = [{"file_name": name, "text": "an\u2028apple"} for name in ("a.jpg", "b.png", "c.webp")]
    (folder / "metadata.jsonl").write_text("\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert read_folder(folder, size=32)[0].caption == "an apple"
    assert {example.caption for example in read_folder(folder, size=32, caption="a thing")} == {"a thing"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_picture_needs_a_caption_and_every_caption_a_picture(folder, kind):
    write_captions(folder, kind, {"a.jpg": "an apple", "b.png": "a bird"})
    with pytest.raises(ValueError, match=r"c\.webp: no caption in .*; 1 of 3 pictures have none"):
        read_folder(folder, size=32)
    write_captions(folder, kind, {"a.jpg": "an apple", "b.png": "a bird", "c.webp": "a cat", "d.png": "a dog"})
    with pytest.raises(ValueError, match=r"d\.(txt: a caption without its picture|png', which is no picture of the folder)"):
        read_folder(folder, size=32)
    for extra in folder.glob("d.*"):
        extra.unlink()
    write_captions(folder, kind, {"a.jpg": "an apple", "b.png": "  ", "c.webp": "a cat"})
    with pytest.raises(ValueError, match=r"b\.png: its caption is empty"):
        read_folder(folder, size=32)


def test_captions_that_cannot_be_read_say_where(folder):
    with pytest.raises(ValueError, match=r"no captions; give one for all pictures, or write NAME\.txt, metadata\.jsonl, captions\.json"):
        read_folder(folder, size=32)
    (folder / "captions.json").write_text("[1]")
    with pytest.raises(ValueError, match=r'captions\.json: expected one object \{"file name": "caption"'):
        read_folder(folder, size=32)
    (folder / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "x"}\n{"file_name": "b.png"}')
    with pytest.raises(ValueError, match=r"captions in metadata\.jsonl and in captions\.json; keep one of them"):
        read_folder(folder, size=32)
    (folder / "captions.json").unlink()
    with pytest.raises(ValueError, match=r'metadata\.jsonl, line 2: expected \{"file_name"'):
        read_folder(folder, size=32)
    (folder / "metadata.jsonl").write_text('{"file_name"')
    with pytest.raises(ValueError, match=r"metadata\.jsonl, line 1: no JSON"):
        read_folder(folder, size=32)
    (folder / "metadata.jsonl").write_bytes(b'{"file_name": "a.jpg", "text": "caf\xe9"}')
    with pytest.raises(ValueError, match=r"metadata\.jsonl: not UTF-8 .*save it as UTF-8"):
        read_folder(folder, size=32)


def test_folders_that_hold_nothing_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(FileNotFoundError, match="missing: no such folder"):
        read_folder(tmp_path / "missing", size=32, caption="x")
    with pytest.raises(NotADirectoryError, match="file is a file; give the folder"):
        read_folder(tmp_path / "file", size=32, caption="x")
    with pytest.raises(ValueError, match=r"empty: no picture in it; expected files that end in \.png"):
        read_folder(tmp_path / "empty", size=32, caption="x")


def test_sub_folders_are_passed_over_with_a_warning(folder):
    (folder / "more").mkdir()
    with pytest.warns(UserWarning, match="its sub-folders are not read: more"):
        assert len(read_folder(folder, size=32, caption="x")) == 3


def test_pictures_of_other_formats_are_passed_over_with_a_warning(folder):
    (folder / "phone.HEIC").write_bytes(b"x")
    with pytest.warns(UserWarning, match=r"of formats that are not read: phone\.HEIC; save them as \.png"):
        assert len(read_folder(folder, size=32, caption="x")) == 3


def test_two_concepts_in_one_folder_are_refused(tmp_path):
    (tmp_path / "cat").mkdir()
    (tmp_path / "dog").mkdir()
    check_distinct([tmp_path / "cat", tmp_path / "dog"])
    with pytest.raises(ValueError, match="cat: given twice"):
        check_distinct([tmp_path / "cat", tmp_path / "dog" / ".." / "cat"])


# --- pictures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["cut off", "empty", "text", "header only"])
@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.webp", "x.bmp"])
def test_a_broken_picture_is_named(folder, kind, name):
    noise(64, 64).save(folder / name)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes({"cut off": whole[: len(whole) // 2], "empty": b"", "text": b"hello", "header only": whole[:30]}[kind])
    with pytest.raises(ValueError, match=rf"{name}: not a picture that can be read"):
        read_folder(folder, size=32, caption="x")


def test_a_tiny_picture_is_named_and_half_the_size_will_do(folder):
    read_folder(folder, size=64, caption="x")
    with pytest.raises(ValueError, match=r"a\.jpg: 40 x 32 pixels are too few to learn 66 x 66 from; give at least 33 a side"):
        read_folder(folder, size=66, caption="x")


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
