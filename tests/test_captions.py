"""Captions in each of the three ways, and one clear line for everything that is wrong; more of it in trainers/data/test_folder.py."""

import pytest

from minidiff.captions import CAPTION_SOURCES, check_caption, find_caption_sources, read_captions


@pytest.mark.parametrize(
    "name, text",
    [("a.txt", "a cat"), ("metadata.jsonl", '{"file_name": "a.png", "text": "a cat"}'), ("captions.json", '{"a.png": "a cat"}')],
)
def test_each_source_is_found_and_read(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert find_caption_sources(tmp_path) == ["NAME.txt" if name == "a.txt" else name]
    assert read_captions(tmp_path, [tmp_path / "a.png"]) == {"a.png": "a cat"}


def test_none_two_and_empty_ones_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no captions; give one for all pictures, or write NAME.txt"):
        read_captions(tmp_path, [tmp_path / "a.png"])
    (tmp_path / "a.txt").write_text("a cat")
    (tmp_path / "captions.json").write_text("{}")
    assert find_caption_sources(tmp_path) == [CAPTION_SOURCES[0], CAPTION_SOURCES[2]]
    with pytest.raises(ValueError, match="captions in NAME.txt and in captions.json; keep one of them"):
        read_captions(tmp_path, [tmp_path / "a.png"])
    with pytest.raises(ValueError, match="its caption is empty"):
        check_caption(tmp_path / "a.png", " ")
