"""Docstrings of public functions: each has one, and an `Args:` list names every argument where there are more than three."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MOST_WITHOUT_ARGS = 3
Definition = ast.FunctionDef | ast.ClassDef


def public(body: list[ast.stmt]) -> Iterator[Definition]:
    """Public functions and classes except Triton kernels, whose many arguments are the pointers, strides and block sizes of a launch."""
    for node in body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            if not any(ast.unparse(decorator).endswith("jit") for decorator in node.decorator_list):
                yield node


def arguments(function: ast.FunctionDef) -> list[str]:
    args = function.args
    names = [arg.arg for arg in (*args.posonlyargs, *args.args, args.vararg, *args.kwonlyargs, args.kwarg) if arg is not None]
    return [name for name in names if name not in ("self", "cls")]


def named(docstring: str) -> list[str]:
    """The arguments that the list under `Args:` explains; a line may name several, as "steps, sampler: ..."."""
    _, _, args = f"\n{docstring}".partition("\nArgs:\n")
    lines = re.findall(r"^ {4}(\w+(?:, \w+)*): \S", args.partition("\n\n")[0], re.MULTILINE)
    return [name for line in lines for name in line.split(", ")]


def without_docstring(source: str) -> list[str]:
    return [node.name for node in public(ast.parse(source).body) if not ast.get_docstring(node)]


def badly_explained(source: str) -> list[str]:
    """Functions and methods with many arguments whose list names fewer, or others."""
    top = list(public(ast.parse(source).body))
    methods = [method for node in top if isinstance(node, ast.ClassDef) for method in public(node.body)]
    functions = [node for node in (*top, *methods) if isinstance(node, ast.FunctionDef)]
    many = [function for function in functions if len(arguments(function)) > MOST_WITHOUT_ARGS]
    return [function.name for function in many if sorted(arguments(function)) != sorted(named(ast.get_docstring(function) or ""))]


FILES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for package in ("minidiff", "weights_loader")
    for path in sorted((ROOT / package).rglob("*.py"))
}


@pytest.mark.parametrize("file", FILES)
def test_every_public_function_says_what_it_does_and_explains_its_arguments(file):
    assert without_docstring(FILES[file]) == []
    assert badly_explained(FILES[file]) == []


def test_a_missing_docstring_and_a_missing_argument_would_be_found():
    source = '''
def silent(a): ...
def _private(a, b, c, d): ...
def few(a, b, c):
    """Do it."""
def whole(a, b, *, c=1, d=2):
    """Do it.

    Args:
        a, b: two tensors,
            of one shape: (B, C).
        c: a number.
        d: another.

    Raises ValueError: never.
    """
@triton.jit
def kernel(a, b, c, d): ...
class Machine:
    """Runs."""
    def run(self, a, b, c, d):
        """Run.

        Args:
            a, b, c: three of the four.
        """
    def stop(self, a, b, c, d):
        """Stop.

        Args:
            a, b, c, d: all of them.
            e: an argument that was removed.
        """
'''
    assert without_docstring(source) == ["silent"]
    assert badly_explained(source) == ["run", "stop"]


def test_the_test_reads_whole_packages():
    assert len(FILES) > 100
