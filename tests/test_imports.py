"""Imports that stand inside a function, or are for the type checker alone: each finds its module and every name, though it may hardly ever run."""

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
Import = ast.Import | ast.ImportFrom


def late_imports(node: ast.AST, late: bool = False) -> Iterator[Import]:
    """The imports that do not run when the file is imported, but for those that may fail: under `try`, with an answer to ImportError."""
    for child in ast.iter_child_nodes(node):
        if late and isinstance(child, Import):
            yield child
        elif not (isinstance(child, ast.Try) and any("ImportError" in ast.unparse(handler) for handler in child.handlers)):
            later = (
                isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
                or isinstance(child, ast.If)
                and ast.unparse(child.test) == "TYPE_CHECKING"
            )
            yield from late_imports(child, late or later)


def missing(found: Import, package: str) -> list[str]:
    """The modules and names that the import would not find, each with why."""
    failed = []
    for name in (alias.name for alias in found.names):
        try:
            if isinstance(found, ast.Import):
                importlib.import_module(name)
                continue
            module = importlib.import_module("." * found.level + (found.module or ""), package)
            if not hasattr(module, name):
                importlib.import_module(f"{module.__name__}.{name}")  # a module of the package
        except ImportError as error:
            failed.append(f"line {found.lineno}: {ast.unparse(found)}: {error}")
    return failed


FILES = {
    str(path.relative_to(ROOT)): imports
    for package in ("minidiff", "weights_loader", "lessons")
    for path in sorted((ROOT / package).rglob("*.py"))
    if (imports := list(late_imports(ast.parse(path.read_text(encoding="utf-8")))))
}


@pytest.mark.parametrize("file", FILES)
def test_every_import_that_runs_late_finds_what_it_asks_for(file):
    if file == "minidiff/cli/play.py":
        pytest.importorskip("gradio", reason="Gradio is not installed: pip install -e '.[play]'")
    package = ".".join(Path(file).parent.parts)
    assert [line for found in FILES[file] for line in missing(found, package)] == []


def test_an_import_of_what_is_not_there_would_be_found():
    source = """
import nowhere_at_the_top
def function():
    from minidiff.samplers import sample, samples
    import nowhere
    from . import pipeline, pipelines
    def inner():
        from .kernels.dispatch import active_backend, active_backends
    try:
        import perhaps
    except ImportError:
        pass
if TYPE_CHECKING:
    from minidiff.config import Nothing
"""
    said = [line for found in late_imports(ast.parse(source)) for line in missing(found, "minidiff")]
    assert [line.split(":")[0] for line in said] == ["line 4", "line 5", "line 6", "line 8", "line 14"]


def test_most_imports_of_the_command_line_are_such():
    assert len(FILES) > 15 and len(FILES["minidiff/cli/evaluate.py"]) > 15
