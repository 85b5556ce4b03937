"""Says in one sentence what is wrong with what a learner wrote.

solutions/NN_name.py holds an Exercise for each blank of a lesson: the answer, a check, and slips that learners make. A check runs the
function on small inputs and hands the result to `difference`, which knows each slip by the result that it gives. What no slip explains is
taken apart: `difference` names the term whose factor is off, and `explain` puts PyTorch's errors into plain words.
"""

import ast
import dis
import linecache
import re
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import FunctionType

import torch
from matplotlib.figure import Figure
from torch import Tensor

BLANK = "not written yet: it returns None; put its lines below `# YOUR CODE`"
NO_RETURN = "computes something and returns None: its last line has to be `return` with the result"
HINT = "no slip that we know gives this: hold each term of your lines against the text above the blank"

# Errors that learners meet, as patterns of PyTorch's and Python's messages, and what they mean.
ERRORS = (
    (
        r"size of tensor a \((\d+)\) must match the size of tensor b \((\d+)\) at non-singleton dimension (\d+)",
        "two tensors that do not fit are combined: along axis {2} one has {0} entries, the other {1}; print both shapes, then add an axis "
        "of 1 with [:, None] or take one entry of a table with [t]",
    ),
    (
        r"(?:mat1 and mat2 shapes cannot be multiplied|inconsistent tensor size).*?(?:\((\d+x\d+) and (\d+x\d+)\))",
        "a matrix product does not fit, {0} times {1}: the last axis of the left must be as long as the first of the right; "
        ".T turns a matrix round",
    ),
    (
        r"Expected size for first two dimensions of batch2 tensor to be: \[\d+, (\d+)\] but got: \[\d+, (\d+)\]",
        "a product of stacked matrices does not fit: the left ones have {0} columns, the right ones {1} rows; "
        ".transpose(-1, -2) swaps the last two axes",
    ),
    (
        r"rearrange-reduction pattern",
        "rearrange was given a pattern that does not fit the tensor: print the tensor's shape and hold it against what is left of `->`",
    ),
    (r"backward through the graph a second time", "backward() is called twice on the same loss: each step needs a loss of its own"),
    (r"name '(\w+)' is not defined", "the name {0!r} is not known here: use the arguments' names and what the lesson has imported"),
    (r"(?:local variable|variable) '(\w+)'", "{0!r} is used before a line gave it a value"),
    (r"'(\w+)' object is not callable", "round brackets call a function, and this is a {0}: an entry of a table is taken with [ ]"),
    (
        r"must be Tensor, not torch\.return_types\.(max|min)",
        ".{0}(dim=...) gives two things, the values and their places: take .a{0}(dim=...), which gives the values alone",
    ),
    (r"must be Tensor, not (\w+)", "torch's function was given a plain {0}: take the root with ** 0.5, which knows numbers and tensors"),
    (r"must be real number, not (\w+)", "math's functions take one number at a time, and this is a {0}: call them inside the loop"),
    (r"math range error", "an exponential is too large to be a number: subtract the largest exponent from all of them first"),
    (r"index (\d+) is out of bounds for dimension (\d+) with size (\d+)", "entry {0} of an axis of {2} is asked for; they count from 0"),
    (r"pop from empty list", "more is taken from a list than was put on it: count both"),
    (r"index out of range|list index out of range", "an entry behind the last one is asked for; they count from 0"),
    (
        r"unsupported operand type\(s\) for (\S+): '([\w.]+)' and '([\w.]+)'",
        "{0} is put between a {1} and a {2}, which have no such operation",
    ),
    (r"'(\w+)' object has no attribute '(\w+)'", "a {0} has no {1!r}: look up its name, or what this value is"),
    (r"missing (\d+) required positional", "a function is called without {0} of its arguments"),
    (r"takes (\d+) positional arguments? but (\d+)", "a function of {0} arguments is called with {1}"),
    (
        r"view size is not compatible|invalid for input of size (\d+)",
        "a tensor cannot be cut into this shape: it has another number of entries",
    ),
    (r"not enough values to unpack|too many values to unpack", "a result is taken apart into another number of names than it has parts"),
)


@dataclass(frozen=True)
class Exercise:
    """One blank.

    answer: what belongs there; it has the blank's name.
    check(function): None, or what is wrong.
    wrong: slips that learners make, each with words that its message, and no other's, contains.
    library: the library's own function with the same arguments; the lesson uses it while the blank is empty or wrong.
    number(function): a sentence with a number that the learner's function gives; it appears when the function is right.
    picture(function): a figure that the function draws, likewise.
    """

    answer: Callable
    check: Callable[[Callable], str | None]
    wrong: tuple[tuple[Callable, str], ...]
    library: Callable | None = None
    number: Callable[[Callable], str] | None = None
    picture: Callable[[Callable], Figure] | None = None


class Misuse(Exception):
    """A fault of the learner's function that a check meets on its way; its text is what is said."""


def exercises(name: str) -> dict[str, Exercise]:
    """Return the exercises of a lesson by the names of their functions, in the lesson's order."""
    return {exercise.answer.__name__: exercise for exercise in import_module(f"lessons.solutions.{name}").EXERCISES}


def complaint(lesson: str, written: Callable) -> str | None:
    """Return what is wrong with a learner's function, or None; never raise."""
    exercise = exercises(lesson)[written.__name__]
    if _untouched(written):
        return BLANK
    try:
        said = exercise.check(_watched(written))
    except Misuse as misuse:
        return str(misuse)
    except Exception as error:
        return explain(error, written)
    return NO_RETURN if said == BLANK else said


def explain(error: Exception, written: Callable) -> str:
    """Return in plain words what an exception in a learner's function means, with the line it happened in."""
    number, line = _line(error, written)
    place = f"stops in its line {number}" + (f", `{line}`" if line else "")
    for pattern, meaning in ERRORS:
        found = re.search(pattern, str(error))
        if found:
            return f"{place}: {meaning.format(*found.groups())}"
    first = str(error).strip().splitlines()[0] if str(error).strip() else "no message"
    return f"{place}, with a {type(error).__name__} ({first}): print the shapes of what goes into this line"


def difference(
    got: object,
    expected: object,
    mistakes: Mapping[str, object] | None = None,
    of: str = "",
    tolerance: float = 1e-4,
    terms: Mapping[str, Tensor] | None = None,
) -> str | None:
    """Return what is wrong with a result, or None.

    Args:
        got: what the learner's function gave
        expected: a tensor, a number, or anything else, which must then be equal
        mistakes: sentences, each with the result that its slip would give
        of: which input it is the result of, "at t = 999"
        tolerance: relative and absolute, for tensors and numbers
        terms: tensors of which the result should be a sum with factors; a factor that is off is named
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
        return None if got == expected else f"gives {got!r}{at}, expected {expected!r}; {HINT}"
    if not isinstance(got, Tensor):
        return f"gives a {type(got).__name__}{at}, expected a tensor of shape {list(expected.shape)}; look at what `return` hands back"
    for sentence, value in (mistakes or {}).items():
        if _close(got, value, tolerance) and not _close(value, expected, tolerance):
            return sentence
    if got.shape != expected.shape:
        return f"gives shape {list(got.shape)}{at}, expected {list(expected.shape)}; follow the shapes line by line, from the arguments on"
    if got.dtype != expected.dtype:
        return f"gives {got.dtype}{at}, expected {expected.dtype}; keep the type of the arguments"
    if _close(got, expected, tolerance):
        return None
    if not got.isfinite().all():
        return f"gives values that are infinite or no number{at}: look for a division by zero or the root of something negative"
    return _wrong_factor(got, expected, terms or {}, at) or _first_difference(got, expected, at)


def written_functions(path: Path) -> dict[str, FunctionType]:
    """Return the functions of a lesson's script or notebook. Only its imports and definitions are run, not the lesson.

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
    namespace, name = {"__name__": "lesson"}, f"<{path}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)  # for `explain`, which quotes the line
    exec(compile(tree, name, "exec"), namespace)
    return {name: value for name, value in namespace.items() if isinstance(value, FunctionType) and value.__module__ == "lesson"}


def _wrong_factor(got: Tensor, expected: Tensor, terms: Mapping[str, Tensor], at: str) -> str | None:
    """Name the terms whose factors are off, if the result is a sum of them at all."""
    if not terms or any(term.shape != got.shape for term in terms.values()):
        return None
    columns = torch.stack([term.flatten() for term in terms.values()], dim=1).double()
    found, right = (torch.linalg.lstsq(columns, result.flatten().double()[:, None]).solution for result in (got, expected))
    if (columns @ found - got.flatten().double()[:, None]).norm() > 1e-3 * got.norm().double():
        return None
    said = [f"{name} by {float(f):.3g}, expected {float(r):.3g}" for name, f, r in zip(terms, found, right) if abs(f - r) > 1e-3]
    return (
        f"multiplies {' and '.join(said)}{at}: look at the factor of {'each of them' if len(said) > 1 else 'that term'}" if said else None
    )


def _first_difference(got: Tensor, expected: Tensor, at: str) -> str:
    where = [int(i) for i in torch.unravel_index((got - expected).abs().argmax(), got.shape)]
    place = f" at {where}" if where else ""
    return f"gives {got[tuple(where)]:.4g}{place}{at}, expected {expected[tuple(where)]:.4g}; {HINT}"


def _close(a: object, b: object, tolerance: float) -> bool:
    if not (isinstance(a, Tensor) and isinstance(b, Tensor)) or a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def _untouched(written: Callable) -> bool:
    """Whether the function has nothing but a docstring."""
    code = getattr(written, "__code__", None)
    if code is None or not set(code.co_consts) <= {written.__doc__, None}:
        return False
    return {step.opname for step in dis.get_instructions(code)} <= {"RESUME", "NOP", "LOAD_CONST", "RETURN_VALUE", "RETURN_CONST"}


def _watched(written: Callable) -> Callable:
    """The function, with its tensors looked at before and after: one that is changed in place is another one for the caller as well."""

    def watched(*args):
        before = [arg.clone() if isinstance(arg, Tensor) else None for arg in args]

        def look():
            for name, arg, was in zip(written.__code__.co_varnames, args, before):
                if was is not None and not torch.equal(arg, was):
                    raise Misuse(
                        f"changes its argument {name} in place, which changes it for the caller too: make a new tensor, without += and the like"
                    )

        result = written(*args)
        if isinstance(result, Generator):
            return _followed(result, look)
        look()
        return result

    return watched


def _followed(steps: Generator, look: Callable[[], None]) -> Generator:
    for step in steps:
        yield step
        look()


def _line(error: Exception, written: Callable) -> tuple[int, str]:
    """The line of the learner's function in which it happened, counted from its `def`, and its text where that can be found."""
    number, trace, text = 1, error.__traceback__, ""
    while trace is not None:
        if trace.tb_frame.f_code is written.__code__:
            number = trace.tb_lineno - written.__code__.co_firstlineno + 1
            text = linecache.getline(written.__code__.co_filename, trace.tb_lineno).strip()
        trace = trace.tb_next
    return number, text
