"""What holds for every test: one thread a process, no network, skipped tests that fail in continuous integration, the parity table.

The shape annotations are checked too: the option --jaxtyping-packages in pyproject.toml hooks the imports.
"""

import os

# Before torch is imported, and for processes that tests start. pytest-xdist starts one process a core.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

# Without a GPU, Triton's kernels run in its interpreter. Triton asks for this when it is imported, so nothing above may import it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from importlib.util import find_spec

import pytest

if find_spec("beartype"):  # without it the option fails by itself; `minidiff bench gpu` runs tests without the option
    import tests.typecheck  # noqa: F401  the option names it, but only this imports it
from tests.parity.check import markdown

torch.set_num_threads(1)
# float32 is IEEE's on a GPU too, as tolerances expect: by default cuDNN's convolutions round inputs to TF32, with 10 bits of mantissa.
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

EXCUSED = ("gpu", "slow")  # marks of tests that continuous integration may skip


def pytest_addoption(parser):
    parser.addoption("--parity-table", action="store_true", help="print the largest errors against the reference libraries as Markdown")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.get_closest_marker("forks") is None)  # the others keep their order
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    excused = hasattr(report, "wasxfail") or any(item.get_closest_marker(mark) for mark in EXCUSED)
    return report if excused else _refuse_skip(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return _refuse_skip((yield))


def _refuse_skip(report):
    """In continuous integration a test that did not run has not passed."""
    if report.skipped and os.environ.get("CI"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome = "failed"
        report.longrepr = f"{reason}\nThis was skipped with CI set: only tests marked {' or '.join(EXCUSED)} may be."
    return report


def pytest_terminal_summary(terminalreporter):
    if terminalreporter.config.option.parity_table:
        reports = [report for report in terminalreporter.getreports("passed") if report.when == "call"]
        rows = [(value, report.nodeid) for report in reports for name, value in report.user_properties if name == "parity"]
        terminalreporter.write_line(markdown(rows))
