"""What is wrong with what a learner wrote, in one sentence.

solutions/NN_name.py holds, for each blank of a lesson, an Exercise: the answer, a check, and typical wrong answers. A check runs the
function on small inputs and hands the result to `difference`.
"""

import ast
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FunctionType

import torch
from torch import Tensor

BLANK = "not written yet: it returns None; put its lines below `# YOUR CODE`"


@dataclass(frozen=True)
class Exercise:
    """One blank.

    answer: what belongs there; it bears the blank's name. check(function): None, or what is wrong.
    wrong: typical wrong answers, each with words that its message, and no other's, contains.
    """

    answer: Callable
    check: Callable[[Callable], str | None]
    wrong: tuple[tuple[Callable, str], ...]


def exercises(name: str) -> dict[str, Exercise]:
    """The exercises of a lesson by the names of their functions, in the lesson's order."""
    return {exercise.answer.__name__: exercise for exercise in import_module(f"lessons.solutions.{name}").EXERCISES}


def complaint(lesson: str, written: Callable) -> str | None:
    """What is wrong with a learner's function, or None: never an exception."""
    try:
        return exercises(lesson)[written.__name__].check(written)
    except Exception as error:
        return f"{type(error).__name__} in its line {_line(error, written)}: {error}"


def difference(got, expected, mistakes: Mapping[str, object] | None = None, of: str = "", tolerance: float = 1e-4) -> str | None:
    """What is wrong with a result, or None.

    expected: a tensor, a number, or anything else, which must then be equal. mistakes: sentences, each with the result that its mistake
    would give. of: which input it is the result of, "at t = 999". tolerance: relative and absolute, for tensors and numbers.
    """
    at = f" {of}" if of else ""
    if got is None:
        return BLANK
    if isinstance(expected, float | int) and isinstance(got, float | int):
        got, expected = torch.tensor(float(got)), torch.tensor(float(expected))
        mistakes = {sentence: torch.tensor(float(value)) for sentence, value in (mistakes or {}).items()}
    if not isinstance(expected, Tensor):
        for sentence, value in (mistakes or {}).items():
            if got == value != expected:
                return sentence
        return None if got == expected else f"gives {got!r}{at}, expected {expected!r}"
    if not isinstance(got, Tensor):
        return f"gives a {type(got).__name__}{at}, expected a tensor of shape {list(expected.shape)}"
    for sentence, value in (mistakes or {}).items():
        if _close(got, value, tolerance) and not _close(value, expected, tolerance):
            return sentence
    if got.shape != expected.shape:
        return f"gives shape {list(got.shape)}{at}, expected {list(expected.shape)}"
    if got.dtype != expected.dtype:
        return f"gives {got.dtype}{at}, expected {expected.dtype}"
    if _close(got, expected, tolerance):
        return None
    error = torch.where(got.isfinite(), (got - expected).abs(), torch.inf)
    where = [int(i) for i in torch.unravel_index(error.argmax(), error.shape)]
    place = f" at {where}" if where else ""
    return f"gives {got[tuple(where)]:.4g}{place}{at}, expected {expected[tuple(where)]:.4g}"


def written_functions(path: Path) -> dict[str, FunctionType]:
    """The functions of a lesson's script or notebook. Only its imports and definitions are run, not the lesson.

    Raises ValueError for a file that is no Python.
    """
    import jupytext

    notebook = jupytext.read(path, fmt="py:percent" if path.suffix == ".py" else None)
    source = path.read_text() if path.suffix == ".py" else jupytext.writes(notebook, fmt="py:percent")
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise ValueError(f"{path.name}, line {error.lineno}: {error.msg}") from None
    tree.body = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom | ast.FunctionDef | ast.ClassDef)]
    namespace = {"__name__": "lesson"}
    exec(compile(tree, str(path), "exec"), namespace)
    return {name: value for name, value in namespace.items() if isinstance(value, FunctionType) and value.__module__ == "lesson"}


def _close(a: object, b: object, tolerance: float) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def _line(error: Exception, written: Callable) -> int:
    """The line of the learner's function in which it happened, counted from its `def`."""
    line, trace = 1, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is written.__code__:
            line = trace.tb_lineno - written.__code__.co_firstlineno + 1
        trace = trace.tb_next
    return line
