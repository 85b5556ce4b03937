"""The memory of a process, as one load of a checkpoint is measured by."""

import sys

import pytest
import torch

from minidiff.bench.load import fill_page_cache
from minidiff.bench.load_worker import ProcessMemory

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
MB = 2**20


def test_memory_is_what_comes_on_top_and_its_peak_is_seen():
    kept = torch.ones(8 * MB)  # 32 MB from before, which do not count
    with ProcessMemory() as memory:
        passing = torch.ones(32 * MB)
        memory.done.wait(0.1)  # time for the watcher to look
        del passing
        rest = torch.ones(16 * MB)
    resident_peak, resident, anonymous_peak, anonymous = memory.above()
    # Some MB of slack: the interpreter and the allocator take and give back memory of their own.
    assert abs(anonymous_peak - 128 * MB) < 8 * MB and abs(anonymous - 64 * MB) < 8 * MB
    assert abs(resident_peak - 128 * MB) < 8 * MB and abs(resident - 64 * MB) < 8 * MB
    assert kept.numel() + rest.numel() == 24 * MB


def test_pages_of_a_file_are_resident_but_not_anonymous(tmp_path):
    path = tmp_path / "zeros"
    path.write_bytes(bytes(64 * MB))
    fill_page_cache(path)
    with ProcessMemory() as memory:
        mapped = torch.from_file(str(path), shared=False, size=16 * MB)
        assert mapped.sum() == 0
    resident_peak, _, anonymous_peak, _ = memory.above()
    assert abs(resident_peak - 64 * MB) < 8 * MB and anonymous_peak < 8 * MB
