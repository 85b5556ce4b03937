"""The learner's blanks: answers pass, blanks and typical mistakes fail, each mistake with a sentence of its own."""

import inspect
import math
import re
import subprocess
import sys
from types import FunctionType

import jupytext
import pytest
import torch
from einops import rearrange
from matplotlib import pyplot as plt

from lessons.__main__ import main
from lessons.catalogue import entries, find
from lessons.exercises import BLANK, HINT, NO_RETURN, complaint, difference, exercises, explain, written_functions
from tests.lessons.text import SETTLED

EXERCISES = [
    pytest.param(entry, exercise, id=f"{entry.number} {name}") for entry in entries() for name, exercise in exercises(entry.name).items()
]


def command(monkeypatch, capsys, *args) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["lessons", *map(str, args)])
    return main(), *capsys.readouterr()


def named(function, name: str):
    """The function under the name that the check looks it up by."""
    return FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)


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


OWN_WORDS = (
    "The size of tensor",
    "cannot be multiplied",
    "object is not callable",
    "is not defined",
    "must be Tensor",
    "unsupported operand",
)


@pytest.mark.parametrize("entry, exercise", EXERCISES)
def test_no_message_is_a_number_alone_or_pytorchs_own(entry, exercise):
    for function, _ in exercise.wrong:
        sentence = complaint(entry.name, named(function, exercise.answer.__name__))
        assert not any(words in sentence for words in OWN_WORDS), sentence
        assert len(re.findall("[a-z]{3,}", sentence)) >= 5, sentence


@pytest.mark.parametrize("entry, exercise", [p for p in EXERCISES if p.values[1].library])
def test_the_librarys_own_function_passes_as_well(entry, exercise):
    assert complaint(entry.name, named(exercise.library, exercise.answer.__name__)) is None


@pytest.mark.parametrize("entry, exercise", [p for p in EXERCISES if p.values[0].number in SETTLED])
def test_something_appears_when_a_blank_is_right_and_it_comes_from_the_function(entry, exercise):
    """The function is called for it: one that fails makes it fail."""

    def broken(*args):
        raise RuntimeError("called")

    assert exercise.number and re.search(r"\d", exercise.number(exercise.answer))
    for appears in filter(None, (exercise.number, exercise.picture)):
        with pytest.raises(RuntimeError, match="called"):
            appears(broken)
    if exercise.picture:
        plt.close(exercise.picture(exercise.answer))


@pytest.mark.parametrize("number", SETTLED)
def test_a_lesson_has_two_or_three_blanks_of_two_to_eight_lines(number):
    blanks = exercises(find(number).name)
    assert len(blanks) in (2, 3)
    for exercise in blanks.values():
        lines = inspect.getsource(exercise.answer).strip().splitlines()[1:]
        assert 2 <= len(lines) <= 8, exercise.answer.__name__


@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.name) for entry in entries()])
def test_untouched_blanks_fail_from_the_file_itself(entry, monkeypatch, capsys):
    code, out, _ = command(monkeypatch, capsys, "check", entry.number)
    assert code == 1
    assert out.splitlines() == [f"{name}: {BLANK}" for name in exercises(entry.name)]


@pytest.mark.parametrize("entry", [pytest.param(entry, id=entry.name) for entry in entries()])
def test_the_file_of_answers_passes(entry, monkeypatch, capsys):
    solutions = entry.path.parent / "solutions" / entry.path.name
    code, out, _ = command(monkeypatch, capsys, "check", entry.number, solutions)
    assert code == 0 and [line for line in out.splitlines() if line[0] != " "] == [f"{name}: right" for name in exercises(entry.name)]


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

    said = complaint("01_adding_noise", q_sample)
    assert said.startswith("stops in its line 3, `return a.no_such_thing()`: a ") and "has no 'no_such_thing'" in said


def raised(function) -> str:
    with pytest.raises(Exception) as caught:
        function()
    return explain(caught.value, function)


@pytest.mark.parametrize(
    "function, words",
    [
        (lambda: torch.zeros(3) + torch.zeros(4), "along axis 0 one has 3 entries, the other 4"),
        (lambda: torch.zeros(2, 3) @ torch.zeros(2, 3), "a matrix product does not fit, 2x3 times 2x3"),
        (lambda: torch.zeros(2, 3, 4) @ torch.zeros(2, 5, 4), "the left ones have 4 columns, the right ones 5 rows"),
        (lambda: rearrange(torch.zeros(2, 3), "B N (h d) -> B h N d", h=2), "hold it against what is left of `->`"),
        (lambda: (one := torch.ones(1, requires_grad=True).square().sum(), one.backward(), one.backward()), "needs a loss of its own"),
        (lambda: no_such_name, "the name 'no_such_name' is not known here"),
        (lambda: torch.zeros(3)(1), "an entry of a table is taken with [ ]"),
        (lambda: torch.sqrt(2.0), "was given a plain float: take the root with ** 0.5"),
        (lambda: torch.maximum(torch.zeros(2), torch.zeros(2, 2).max(dim=1)), ".amax(dim=...), which gives the values alone"),
        (lambda: math.exp([1.0]), "one number at a time, and this is a list"),
        (lambda: math.exp(1000.0), "an exponential is too large"),
        (lambda: torch.zeros(3)[3], "entry 3 of an axis of 3 is asked for"),
        (lambda: [].pop(), "more is taken from a list than"),
        (lambda: list(range(1))[2], "an entry behind the last one"),
        (lambda: torch.zeros(3).shape / 2.0, "which have no such operation"),
        (lambda: complaint("01_adding_noise"), "called without 1 of its arguments"),
        (lambda: BLANK.upper(1), "with a TypeError"),
        (lambda: torch.zeros(3).view(2, 2), "it has another number of entries"),
    ],
)
def test_errors_of_the_torch_that_is_installed_are_put_into_words(function, words):
    assert words in raised(function)


def test_a_function_that_forgets_to_return_or_changes_its_arguments_is_told_so():
    def q_sample(alpha_bar, x_0, t, eps):
        x_0.mean()

    assert complaint("01_adding_noise", q_sample) == NO_RETURN

    def q_sample(alpha_bar, x_0, t, eps):
        x_0 += eps
        return x_0

    assert complaint("01_adding_noise", q_sample).startswith("changes its argument x_0 in place")


def test_a_sum_with_a_wrong_factor_names_the_term():
    a, b = torch.randn(2, 10, generator=torch.Generator().manual_seed(0))
    said = difference(2 * a + 3 * b, 2 * a + 4 * b, terms={"x_t": a, "eps": b})
    assert said == "multiplies eps by 3, expected 4: look at the factor of that term"
    assert "x_t by 1, expected 2 and eps by 3, expected 4" in difference(a + 3 * b, 2 * a + 4 * b, terms={"x_t": a, "eps": b})
    assert HINT in difference(a * b, 2 * a + 4 * b, terms={"x_t": a, "eps": b})  # no sum of these at all


@pytest.mark.parametrize(
    "got, expected, words",
    [
        (None, torch.zeros(2), BLANK),
        ([0.0], torch.zeros(2), "gives a list, expected a tensor of shape [2]; look at what `return` hands back"),
        (torch.zeros(3), torch.zeros(2), "gives shape [3], expected [2]; follow the shapes line by line, from the arguments on"),
        (torch.zeros(2).double(), torch.zeros(2), "gives torch.float64, expected torch.float32; keep the type of the arguments"),
        (torch.tensor([[1.0, 2.0]]), torch.tensor([[1.0, 3.0]]), f"gives 2 at [0, 1], expected 3; {HINT}"),
        (
            torch.tensor([1.0, torch.nan]),
            torch.ones(2),
            "gives values that are infinite or no number: look for a division by zero or the root of something negative",
        ),
        (0.5, 0.25, f"gives 0.5, expected 0.25; {HINT}"),
        ([1, 2], [2, 1], f"gives [1, 2], expected [2, 1]; {HINT}"),
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
    assert all(word in shown.stdout for word in ("pages", "build", "check", "map"))
