"""The learner's blanks: answers pass, blanks and typical mistakes fail, each mistake with a sentence of its own."""

import subprocess
import sys

import jupytext
import pytest
import torch

from lessons.__main__ import main
from lessons.catalogue import entries
from lessons.exercises import BLANK, complaint, difference, exercises, written_functions

EXERCISES = [
    pytest.param(entry, exercise, id=f"{entry.number} {name}") for entry in entries() for name, exercise in exercises(entry.name).items()
]


def command(monkeypatch, capsys, *args) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["lessons", *map(str, args)])
    return main(), *capsys.readouterr()


def named(function, name: str):
    """A function under the name that the check looks it up by."""

    def written(*args, **kwargs):
        return function(*args, **kwargs)

    written.__name__ = name
    return written


@pytest.mark.parametrize("entry, exercise", EXERCISES)
def test_the_answer_passes(entry, exercise):
    assert complaint(entry.name, exercise.answer) is None


@pytest.mark.parametrize("entry, exercise", EXERCISES)
def test_each_typical_mistake_has_a_sentence_of_its_own(entry, exercise):
    assert len(exercise.wrong) >= 3
    said = [complaint(entry.name, named(function, exercise.answer.__name__)) for function, _ in exercise.wrong]
    assert None not in said, f"{exercise.wrong[said.index(None)][0].__name__} passes"
    for (function, words), sentence in zip(exercise.wrong, said):
        assert words in sentence, f"{function.__name__}: {sentence}"
        assert sum(words in other for other in said) == 1, f"{words!r} is not its own"
        assert "\n" not in sentence


@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.name) for entry in entries()])
def test_untouched_blanks_fail_from_the_file_itself(entry, monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys, "check", entry.number)
    assert code == 1
    assert out.splitlines() == [f"{name}: {BLANK}" for name in exercises(entry.name)]


@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.name) for entry in entries()])
def test_the_file_of_answers_passes(entry, monkeypatch, capsys):
    solutions = entry.path.parent / "solutions" / entry.path.name
    code, out, _ = command(monkeypatch, capsys, "check", entry.number, solutions)
    assert code == 0 and out.splitlines() == [f"{name}: right" for name in exercises(entry.name)]


def test_what_was_written_into_a_notebook_is_checked_too(tmp_path, monkeypatch, capsys):
    lesson = next(entry for entry in entries() if entry.number == "01")
    notebook = jupytext.read(lesson.path, fmt="py:percent")
    for cell in notebook.cells:
        cell.source = cell.source.replace("    # YOUR CODE, about 2 lines", "    return x_0 + eps[:, :1]")
    jupytext.write(notebook, tmp_path / "mine.ipynb")
    code, out, _ = command(monkeypatch, capsys, "check", "01", tmp_path / "mine.ipynb")
    assert code == 1 and out.startswith("q_sample: gives ") and ", expected " in out


def test_only_imports_and_definitions_of_a_file_are_run(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import math\nfrom math import sin\nraise SystemExit\ndef f(x):\n    return math.pi * g(x)\ndef g(x):\n    return x\n"
    )
    functions = written_functions(tmp_path / "mine.py")
    assert set(functions) == {"f", "g"} and functions["f"](2) > 6


@pytest.mark.parametrize(
    "source, words",
    [("def q_sample(:\n", "mine.py, line 1: invalid syntax"), ("def other():\n    pass\n", "q_sample: not in the file; write a function")],
)
def test_a_file_that_is_no_lesson_is_told_apart(source, words, tmp_path, monkeypatch, capsys):
    (tmp_path / "mine.py").write_text(source)
    code, out, err = command(monkeypatch, capsys, "check", "01", tmp_path / "mine.py")
    assert code > 0 and words in out + err


def test_an_exception_is_told_with_its_line_and_ends_nothing():
    def q_sample(alpha_bar, x_0, t, eps):
        a = alpha_bar[t]
        return a.no_such_thing()

    assert complaint("01_adding_noise", q_sample).startswith("AttributeError in its line 3: ")


@pytest.mark.parametrize(
    "got, expected, words",
    [
        (None, torch.zeros(2), BLANK),
        ([0.0], torch.zeros(2), "gives a list, expected a tensor of shape [2]"),
        (torch.zeros(3), torch.zeros(2), "gives shape [3], expected [2]"),
        (torch.zeros(2).double(), torch.zeros(2), "gives torch.float64, expected torch.float32"),
        (torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0]]), "gives 2 at [0, 1], expected 3"),
        (torch.tensor([1.0, torch.nan]), torch.ones(2), "gives nan at [1], expected 1"),
        (0.5, 0.25, "gives 0.5, expected 0.25"),
        ([1, 2], [2, 1], "gives [1, 2], expected [2, 1]"),
    ],
)
def test_a_difference_is_told_with_shapes_or_values(got, expected, words):
    assert difference(got, expected) == words
    assert difference(expected, expected) is None


def test_a_known_mistake_is_told_by_its_name_but_never_of_a_right_answer():
    mistakes = {"one too large": torch.ones(2), "the same": torch.zeros(2)}
    assert difference(torch.ones(2), torch.zeros(2), mistakes) == "one too large"
    assert difference(torch.zeros(2), torch.zeros(2), mistakes) is None
    assert difference(2, 1, {"twice": 2}) == "twice"
    assert difference([2], [1], {"other": [2]}) == "other"


def test_the_command_line_of_the_lessons_says_what_it_can_do():
    shown = subprocess.run(
        [sys.executable, "-m", "lessons", "--help"], capture_output=True, text=True, check=True, cwd=entries()[0].path.parents[1]
    )
    assert all(word in shown.stdout for word in ("build", "check", "map"))
