"""The table of symbols: each word of the code stands in the lesson that is said to introduce it."""

import re

import pytest

from lessons.catalogue import HERE, find

TEXT = (HERE / "symbols.md").read_text()
ROWS = re.findall(r"^\| (.+) \| (.+) \| (.+) \| \[(\d\d)\]\(pages/(\d\d)\.md\) \|$", TEXT, flags=re.MULTILINE)


@pytest.mark.parametrize("row", ROWS, ids=[row[2] for row in ROWS])
def test_a_word_of_the_code_stands_in_the_code_or_text_of_its_lesson(row):
    *_, words, number, target = row
    source = find(number).path.read_text()
    assert number == target
    for word in re.findall(r"`(\w+)`", words):
        assert re.search(rf"\b{word}\b", source), f"{word} is not in lesson {number}"


def test_every_row_is_read_and_the_glossary_is_sorted():
    assert len(ROWS) == TEXT.count("](pages/") > 20
    words = re.findall(r"^- \*\*(.+?)\*\*: ", TEXT, flags=re.MULTILINE)
    assert words == sorted(words, key=str.lower) and len(words) >= 20
