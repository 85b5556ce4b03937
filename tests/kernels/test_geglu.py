"""GEGLU's kernel: against float64, in Triton's interpreter where there is no GPU; as an operation of PyTorch's; compiled for GPUs."""

import pytest
import torch

from minidiff.blocks import geglu
from minidiff.kernels import tiles
from minidiff.kernels.geglu import fused_geglu, unsupported
from tests.kernels.compile_kernels import built

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The answer is rounded once, by half a unit in the last of 8, 11 and 24 digits. float32 has a few roundings more before; where 1 + erf
# nears 0, they are of 1: an error of 6e-8 times gate and value.
CLOSE = {
    torch.bfloat16: dict(rtol=2**-8 if DEVICE == "cuda" else 2**-7, atol=1e-5),  # the interpreter cuts off where a GPU rounds
    torch.float16: dict(rtol=2**-11, atol=1e-5),
    torch.float32: dict(rtol=1e-5, atol=1e-5),
}


def noise(*shape, dtype=torch.float32, seed=0, scale=1.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).to(DEVICE, dtype)


def expected(x, dy):
    """y and dx in float64, from PyTorch's operations."""
    x = x.double().requires_grad_()
    y = geglu(x)
    return y, torch.autograd.grad(y, x, dy.double())[0]


def ours(x, dy):
    x = x.clone().requires_grad_()
    y = fused_geglu(x)
    return y, torch.autograd.grad(y, x, dy)[0]


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("shape", [(2,), (1, 1, 16), (3, 5, 26), (2, 9, 1024), (2050,)])  # less and more than a program's 1024
def test_values_and_gradients_are_those_of_float64(shape, dtype):
    x, dy = noise(*shape, dtype=dtype), noise(*shape[:-1], shape[-1] // 2, dtype=dtype, seed=1)
    for got, wanted in zip(ours(x, dy), expected(x, dy), strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), wanted, **CLOSE[dtype])


@pytest.mark.parametrize("dtype", CLOSE)
def test_gates_far_from_0_either_pass_or_close(dtype):
    gate = torch.tensor([-100.0, -30.0, -6.0, -1.0, 0.0, 1.0, 6.0, 30.0, 100.0, 256.0]).to(DEVICE, dtype)
    x, dy = torch.cat([noise(10, dtype=dtype), gate]), noise(10, dtype=dtype, seed=1)
    (y, dx), (y_64, dx_64) = ours(x, dy), expected(x, dy)
    torch.testing.assert_close(y.double(), y_64, **CLOSE[dtype])
    torch.testing.assert_close(dx.double(), dx_64, **CLOSE[dtype])
    assert torch.equal(y[:2], torch.zeros_like(y[:2])), "the gate is shut"
    assert torch.equal(y[-1], x[9] * gate[-1]), "it is open, and a power of two"


def test_the_same_inputs_give_the_same_bits():
    x, dy = noise(4, 7, 600, dtype=torch.bfloat16), noise(4, 7, 300, dtype=torch.bfloat16, seed=1)
    first = ours(x, dy)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, ours(x, dy), strict=True))


def test_it_is_an_operation_of_pytorchs():
    """opcheck: the schema, the shapes without numbers, and tracing for torch.compile."""
    torch.library.opcheck(torch.ops.minidiff.geglu, (noise(3, 5, 26),))
    torch.library.opcheck(torch.ops.minidiff.geglu_backward, (noise(3, 5, 13), noise(3, 5, 26)))


@pytest.mark.parametrize(
    "x, reason",
    [
        (torch.zeros(2, 4, dtype=torch.float64, device=DEVICE), "float64"),
        (torch.zeros(2, 5, device=DEVICE), "a value and a gate side by side"),
        (torch.zeros(0, 4, device=DEVICE), "a value and a gate side by side"),
        (torch.zeros(4, 2, device=DEVICE).T, "contiguous"),
        (torch.zeros(2, 4, device="meta"), "on meta"),
        (torch.zeros(1, device=DEVICE).expand(2**31), "strides"),
    ],
)
def test_what_it_does_not_take_is_refused_with_the_reason(x, reason):
    assert reason in unsupported(x)
    if x.device.type != "meta":
        with pytest.raises(ValueError, match=f"fused GEGLU: .*{reason}"):
            fused_geglu(x)


def test_more_elements_than_32_bits_count_are_refused(monkeypatch):
    monkeypatch.setattr(tiles, "DEVICE", "meta")  # where they take no memory
    assert unsupported(torch.empty(2**30 - 1, 2, device="meta")) is None
    assert "2^31 elements or more" in unsupported(torch.empty(2**30, 2, device="meta"))


def both_ways(tokens, F, dtype=torch.bfloat16, B=2):
    y = fused_geglu(torch.empty(B, tokens, 2 * F, dtype=dtype).requires_grad_())
    y.backward(torch.empty_like(y))


# For tests/kernels/compile_kernels.py: four times the widths of SD 1.5 and 2.1 (one kernel a width, whatever the tokens), and of the bundled model.
CASES = {
    "SD, 64 x 64 cells": lambda: both_ways(4096, 1280),
    "SD, 32 x 32": lambda: both_ways(1024, 2560),
    "SD, 16 x 16": lambda: both_ways(256, 5120),
    "SD, 64 x 64, fp16": lambda: both_ways(4096, 1280, torch.float16),
    "SD, 64 x 64, fp32": lambda: both_ways(4096, 1280, torch.float32),
    "bundled, 16 x 16": lambda: both_ways(256, 256),
    "bundled, 4 x 4": lambda: both_ways(16, 640),
}


@pytest.mark.parametrize("capability", [80, 90, *(pytest.param(other, marks=pytest.mark.slow) for other in (86, 89, 100, 120))])
def test_compiled_it_reads_16_bytes_at_a_time_and_spills_nothing(capability):
    kernels = built("tests.kernels.test_geglu", capability)
    assert {kernel.kernel for kernel in kernels} == {"forward_kernel", "backward_kernel"} and len(kernels) >= 10
    for kernel in kernels:
        assert kernel.narrow_loads == 0 and kernel.wide_loads >= 2, kernel
        assert kernel.stack == 0, kernel
