"""Tables and numbers as they are read in Markdown and on the terminal."""

import pytest

from minidiff.markdown import format_bytes, format_duration, format_fixed, format_seconds, markdown_table, table_header, table_row


def test_tables_are_markdown():
    assert table_header(["a", "b"]) + "\n" + table_row([1, ""]) == "| a | b |\n| --- | --- |\n| 1 |  |"
    assert markdown_table(["a", "b"], [[1, ""]]) == "| a | b |\n| --- | --- |\n| 1 |  |"


def test_times_have_three_digits():
    assert [format_seconds(value) for value in (12.34, 1.0, 0.0123, 4.56e-5, 7e-8)] == ["12.3 s", "1 s", "12.3 ms", "45.6 µs", "0.07 µs"]


def test_bytes_have_the_unit_that_makes_them_short():
    assert [format_bytes(count) for count in (0, 4000, 1_234_000, 1_250_000_000)] == ["0 kB", "4 kB", "1.2 MB", "1.2 GB"]


def test_a_zero_has_no_minus():
    assert (format_fixed(-0.001, 2), format_fixed(-0.25, 1), format_fixed(2, 0)) == ("0.00", "-0.2", "2")


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.4, "0 s"), (99, "99 s"), (101, "2 min"), (3500, "58 min"), (3900, "1 h 5 min"), (90_000, "25 h 0 min")]
)
def test_durations_in_words(seconds, words):
    assert format_duration(seconds) == words
