"""The rules of conftest.py: threads, network, skipped tests in continuous integration, slow tests, the parity table."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.parity.check import markdown

ROOT = Path(__file__).parent.parent

SAMPLE = """
import pytest
import torch

def test_passes(record_property):
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32  # or float32 is not float32 on a GPU
    record_property("parity", ("U-Net", "diffusers", "float32", 1.5e-6))

@pytest.mark.skip(reason="because")
def test_skipped(): pass

def test_skips_itself():
    pytest.skip("out of luck")

@pytest.mark.gpu
def test_on_a_gpu():
    pytest.skip("no driver")

@pytest.mark.slow
def test_slow():
    pytest.skip("no time")

@pytest.mark.xfail
def test_expected_to_fail(): assert False
"""


def printed(folder: Path, *options: str, ci: bool) -> str:
    """What pytest prints for the two files under the project's conftest and options, in a process of its own."""
    (folder / "test_sample.py").write_text(SAMPLE)
    (folder / "test_without_library.py").write_text("import pytest\npytest.importorskip('no_such_library')\n")
    environment = {name: value for name, value in os.environ.items() if name != "CI" and not name.startswith("PYTEST")}
    environment |= {"CI": "true"} if ci else {}
    command = [sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "-p", "tests.conftest"]
    command += ["-p", "no:cacheprovider", "--continue-on-collection-errors", "-rA", *options, str(folder)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment).stdout


@pytest.fixture(scope="module")
def in_ci(tmp_path_factory) -> str:
    return printed(tmp_path_factory.mktemp("ci"), "-m", "", ci=True)


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory) -> str:
    return printed(tmp_path_factory.mktemp("elsewhere"), "-n", "1", "--parity-table", ci=False)


def test_one_thread_a_process_and_no_network():
    assert torch.get_num_threads() == 1
    assert os.environ["OMP_NUM_THREADS"] == os.environ["HF_HUB_OFFLINE"] == "1"


def test_a_skipped_test_fails_in_continuous_integration_unless_marked_gpu_or_slow(in_ci):
    # A test that skips itself fails, one that its mark or its file skips is an error of its preparation.
    assert "1 failed, 1 passed, 2 skipped, 1 xfailed, 2 errors" in in_ci
    for reason in ("because", "out of luck", "no_such_library"):
        assert reason in in_ci
    assert in_ci.count("only tests marked gpu or slow may be") >= 3


def test_elsewhere_a_skipped_test_is_only_skipped_and_slow_ones_are_left_out(elsewhere):
    assert "1 passed, 4 skipped, 1 xfailed" in elsewhere  # test_slow is not among the skipped
    assert "test_slow" not in elsewhere


def test_the_parity_table_is_printed_also_by_pytest_xdist(elsewhere, in_ci):
    line = "| U-Net | diffusers | 1.5e-06 |  | `"
    assert line in elsewhere
    assert line not in in_ci  # where it was not asked for


def test_the_parity_table_shows_the_largest_error_of_each_part():
    found = [("float32", 1e-6), ("float32", 2e-6), ("float64", 0.0)]
    rows = [(("U-Net", "diffusers", dtype, error), "tests/test_x.py::test_y[a]") for dtype, error in found]
    assert markdown(rows).splitlines()[2:] == ["| U-Net | diffusers | 2.0e-06 | 0 | `tests/test_x.py` |"]
