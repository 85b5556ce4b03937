"""Folders of pictures: captions from every source, pictures of every kind, and one clear line for everything that is wrong."""

import json

import numpy as np
import pytest
from PIL import Image

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


@pytest.mark.parametrize("name", ["x.jfif", "x.jpe", "x.ppm", "x.tga", "x.jp2", "x.gif", "x.tif", "no ending"])
def test_a_picture_is_known_by_what_is_in_it(folder, name):
    format = {"": "PNG", ".jfif": "JPEG", ".jpe": "JPEG", ".jp2": "JPEG2000", ".tif": "TIFF"}.get((folder / name).suffix)
    noise(48, 48).save(folder / name, format=format)
    assert name in [example.path.name for example in read_folder(folder, size=32, caption="x")]


def test_every_other_entry_is_named(folder):
    (folder / "phone.HEIC").write_bytes(b"x")
    (folder / "x.jxl").write_bytes(b"\xff\x0a")
    (folder / "x.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")  # Pillow would run a program for it
    (folder / "link.png").symlink_to(folder / "nowhere.png")
    (folder / "notes").write_text("hello")
    with pytest.warns(UserWarning, match=r"not read, .*: link\.png \(a link to nothing\), .*phone\.HEIC, x\.eps, x\.jxl; save pictures"):
        assert len(read_folder(folder, size=32, caption="x")) == 3


def test_captions_that_are_there_and_not_read_are_said(folder):
    (folder / "a.txt").write_text("an apple")
    with pytest.warns(UserWarning, match=r"its captions \(NAME\.txt\) are not read, for one is given; --captions reads them"):
        read_folder(folder, size=32, caption="x")


def test_a_small_file_that_asks_for_gigabytes_is_refused(folder):
    Image.new("1", (9000, 9000)).save(folder / "bomb.png")
    assert (folder / "bomb.png").stat().st_size < 20_000
    with pytest.raises(ValueError, match=r"bomb\.png: .*9000 x 9000 pixels; at most 64 megapixels are read"):
        read_folder(folder, size=32, caption="x")


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
