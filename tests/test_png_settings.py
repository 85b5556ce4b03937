import time

import pytest

from minidiff.png_settings import parse_parameters, picture_settings

NUMBERS = "Steps: 3, Sampler: ddim, Size: 64x32, Model: tiny"


@pytest.mark.parametrize(
    "text, expected",
    [
        (f"a cat\n{NUMBERS}", ("a cat", (64, 32))),
        (f"a cat\nNegative prompt: a dog\n{NUMBERS}", ("a cat", (64, 32))),
        (f"a cat\non a hill\nNegative prompt: a dog,\na car\n{NUMBERS}", ("a cat\non a hill", (64, 32))),
        (f"\n{NUMBERS}", ("", (64, 32))),
        (f"a cat\nSteps: many, Size: any\n{NUMBERS}", ("a cat\nSteps: many, Size: any", (64, 32))),
        ("a cat\nSteps: 3, Sampler: ddim", None),
        (NUMBERS, None),
        ("", None),
        ("a cat\nSteps: 3, Size: " + "1" * 5000 + "x3", None),
        (picture_settings("a cat", "a dog", {"Steps": 3, "Size": "64x32"}), ("a cat", (64, 32))),
    ],
)
def test_prompt_and_size_are_read(text, expected):
    assert parse_parameters(text) == expected


@pytest.mark.parametrize("line", ["Negative prompt: a\n", "Steps: 1\n", "Steps: Size: \n", "\n", "Size: 1"])
def test_reading_takes_time_in_proportion_to_the_length(line):
    start = time.process_time()
    parse_parameters("a cat\n" + line * 300_000)
    assert time.process_time() - start < 5  # a pattern that backtracks takes hours
