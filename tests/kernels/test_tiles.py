"""What the attention kernels share: head widths as two tiles, the product, what no kernel takes, and the package without Triton."""

import subprocess
import sys
from unittest import mock

import pytest
import torch

from minidiff.kernels import tiles
from minidiff.kernels.tiles import DEVICE, head_of, head_tiles, refusal, tl


def test_a_head_stands_in_the_least_columns_that_two_powers_of_two_hold():
    assert [head_tiles(d) for d in (8, 32, 40, 64, 80, 160)] == [(16, 0), (32, 0), (32, 16), (64, 0), (64, 16), (128, 32)]
    powers = [16, 32, 64, 128, 256]
    for d in range(8, 168, 8):
        least = min(a + b for a in powers for b in [0, *powers] if a + b >= d)
        assert sum(head_tiles(d)) == least
        assert head_tiles(d)[1] == 0 or least not in powers  # one tile where one will do


def test_kernels_run_in_the_interpreter_where_there_is_no_gpu():
    assert ("cuda" if torch.cuda.is_available() else "cpu") == DEVICE


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda q, k, v: (q, k.float(), v), "q, k and v differ: torch.float16 on .*, torch.float32 on"),
        (lambda q, k, v: (q, k[:, :, ::2], v[:, :, ::2]), r"shapes \(2, 6, 32\), \(2, 6, 16\) and \(2, 6, 16\); kernels take \[B, N, D\]"),
        (lambda q, k, v: (q, k[:1], v[:1]), r"shapes \(2, 6, 32\), \(1, 6, 32\)"),
        (lambda q, k, v: (q.mT.contiguous().mT, k, v), r"strides \(192, 1, 6\), .*; kernels take channels side by side"),
        (lambda q, k, v: [x.expand(70000, 6, 32) for x in (q[:1], k[:1], v[:1])], "batch 70000 and 2 heads; a kernel's grid ends at 65535"),
    ],
)
def test_the_reason_of_a_refusal_is_named(change, reason):
    q, k, v = torch.zeros(3, 2, 6, 32, dtype=torch.float16, device=DEVICE)
    assert refusal(q, k, v, 2) is None
    with pytest.raises(ValueError, match=reason):
        raise ValueError(refusal(*change(q, k, v), 2))


def test_tensors_elsewhere_are_refused_with_the_place():
    x = torch.zeros(1, 2, 32, device="meta")
    assert refusal(x, x, x, 1).startswith(f"tensors on meta; kernels run on {DEVICE}")


def test_more_elements_than_32_bits_count_are_refused():
    with mock.patch.object(tiles, "DEVICE", "meta"):  # where they take no memory
        most, x = torch.empty(1, 2**31 // 32 - 1, 32, device="meta"), torch.empty(1, 2**31 // 32, 32, device="meta")
        assert refusal(most, most, most, 1) is None
        assert refusal(x, x, x, 1) == "one row of the batch has 2^31 elements or more; kernels count in 32 bits"
        for q in (x[:, :1].expand_as(x), x[:, :1].expand(1, 2**31 // 32 + 1, 32)):  # it has 32 numbers in memory, its answer 2^31 or more
            assert q.stride(1) == 0 and refusal(q, most, most, 1) == refusal(x, x, x, 1)


def test_a_batch_may_have_more_elements_than_32_bits_count():
    with mock.patch.object(tiles, "DEVICE", "meta"):
        x = torch.empty(4, 2**30 // 32, 32, device="meta")
        assert x.numel() == 2**32 and refusal(x, x, x, 1) is None


@tiles.jit
def offsets_kernel(x, offsets, batch_stride, d: tl.constexpr):
    """How many bytes behind x each program's head begins."""
    program = tl.program_id(2) * tl.num_programs(1) + tl.program_id(1)
    tl.store(offsets + program, head_of(x, batch_stride, d).to(tl.int64) - x.to(tl.int64))


def test_heads_of_a_batch_with_more_elements_than_32_bits_count_begin_where_they_should():
    x, offsets = torch.zeros(1, dtype=torch.float16, device=DEVICE), torch.zeros(3, 2, dtype=torch.int64, device=DEVICE)
    offsets_kernel[1, 2, 3](x, offsets, 2**31 - 8, 40)  # nothing is read there
    assert offsets.tolist() == [[2 * (row * (2**31 - 8) + head * 40) for head in range(2)] for row in range(3)]


def test_without_triton_every_tensor_is_refused():
    x = torch.zeros(1, 2, 32, device=DEVICE)
    with mock.patch.object(tiles, "triton", None):
        assert refusal(x, x, x, 1) == "Triton is not installed"


def test_without_triton_the_kernels_are_still_imported():
    code = "import sys; sys.modules['triton'] = None\nimport minidiff.kernels.self_attention, minidiff.attention as a, torch\n"
    code += "x = torch.ones(1, 3, 16)\nprint(minidiff.kernels.self_attention.unsupported(x, x, x, 1), a.attention(x, x, x, 1).sum())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "Triton is not installed tensor(48.)", done.stderr
