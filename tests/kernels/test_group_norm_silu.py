"""The kernels of GroupNorm and SiLU: against float64, in Triton's interpreter without a GPU; as an operation of PyTorch's; compiled."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from minidiff.kernels import group_norm_silu, tiles
from minidiff.kernels.group_norm_silu import fused_group_norm_silu, unsupported
from tests.kernels.compile_kernels import built

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS = 1e-5
# Answers are rounded once, by half a unit in the last of 8, 11 and 24 digits; in float32 some thousand terms near 1 are added before.
CLOSE = {
    torch.bfloat16: dict(rtol=2**-8 if DEVICE == "cuda" else 2**-7, atol=1e-5),  # the interpreter cuts off where a GPU rounds
    torch.float16: dict(rtol=2**-11, atol=1e-5),
    torch.float32: dict(rtol=1e-5, atol=1e-5),
}


def noise(*shape, dtype=torch.float32, seed=0):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)
    return x.to(memory_format=torch.channels_last) if x.ndim == 4 else x


def inputs(B, C, H, W, dtype=torch.float32):
    """x, weight, bias, dy."""
    weight, bias = 1 + 0.3 * noise(C, seed=1), 0.5 * noise(C, seed=2)
    return 0.7 + noise(B, C, H, W, dtype=dtype), weight.to(dtype), bias.to(dtype), noise(B, C, H, W, dtype=dtype, seed=3)


def expected(x, weight, bias, dy, groups, silu=True):
    """y, dx, dweight, dbias in float64, from PyTorch's operations."""
    x, weight, bias = (t.double().requires_grad_() for t in (x, weight, bias))
    y = F.group_norm(x, groups, weight, bias, EPS)
    y = F.silu(y) if silu else y
    return y, *torch.autograd.grad(y, (x, weight, bias), dy.double())


def ours(x, weight, bias, dy, groups, silu=True):
    x, weight, bias = (t.clone().requires_grad_() for t in (x, weight, bias))
    y = fused_group_norm_silu(x, groups, weight, bias, EPS, silu)
    return y, *torch.autograd.grad(y, (x, weight, bias), dy)


def assert_close(got, wanted, dtype, n=1):
    """n: how many terms of size 1 were added up for each number, whose roundings add up too."""
    assert got.dtype == dtype
    close = CLOSE[dtype]
    torch.testing.assert_close(got.double(), wanted.detach(), rtol=close["rtol"], atol=close["atol"] * n**0.5)


# (channels, groups) of the bundled model (text's 160 / 32, a VAE's 24 / 8), of Stable Diffusion (320, 960, 2560 of 32), and odd ones.
SHAPES = [
    (1, 64, 32, 5, 7),
    (2, 160, 32, 4, 4),
    (3, 24, 8, 9, 3),
    (2, 320, 32, 3, 5),
    (1, 960, 32, 2, 2),
    (1, 2560, 32, 1, 3),
    (2, 6, 3, 1, 1),
    (1, 5, 1, 17, 3),
    (2, 300, 1, 2, 3),
]


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("B, C, groups, H, W", SHAPES)
def test_values_and_gradients_are_those_of_float64(B, C, groups, H, W, silu):
    arguments = inputs(B, C, H, W)
    got, wanted = ours(*arguments, groups, silu), expected(*arguments, groups, silu)
    for name, a, b in zip(("y", "dx", "dweight", "dbias"), got, wanted, strict=True):
        assert_close(a, b, torch.float32, n=B * H * W if name.startswith("d") else 1)
    assert got[0].is_contiguous(memory_format=torch.channels_last) and got[1].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("B, C, groups, H, W", [SHAPES[1], SHAPES[3]])
def test_16_bits_are_rounded_at_the_end_only(B, C, groups, H, W, dtype):
    arguments = inputs(B, C, H, W, dtype)
    for a, b in zip(ours(*arguments, groups), expected(*arguments, groups), strict=True):
        assert_close(a, b, dtype, n=B * H * W)


@pytest.fixture
def many_strips(monkeypatch):
    """Small tiles and few strips, so that a small picture has several strips of several tiles, the last of them shorter."""
    monkeypatch.setattr(group_norm_silu, "TILE", 256)
    monkeypatch.setattr(group_norm_silu, "MOST_STRIPS", 5)
    monkeypatch.setattr(group_norm_silu, "MOST_CHANNELS", 16)


@pytest.mark.parametrize("B, C, groups, H, W", [(2, 24, 8, 9, 7), (1, 40, 4, 11, 5), (2, 5, 1, 13, 6)])
def test_strips_and_chunks_join_to_the_whole(many_strips, B, C, groups, H, W):
    arguments = inputs(B, C, H, W)
    (strips, chunks, _), _, constants = group_norm_silu._division(arguments[0], groups)
    assert strips > 2 and constants["TILES"] > 1 and H * W % (constants["TILES"] * constants["ROWS"])
    assert chunks > 1 or groups == 1
    for a, b in zip(ours(*arguments, groups), expected(*arguments, groups), strict=True):
        assert_close(a, b, torch.float32, n=B * H * W)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # beyond the picture, where nothing is kept
@pytest.mark.parametrize("mean", [1e3, -1e4])
def test_a_large_mean_costs_no_digits_but_those_of_the_input(many_strips, mean):
    """float32 at 1e4 has steps of 1e-3. The difference of mean(x^2) and mean(x)^2, at 1e8, would have steps of 8, for a variance of 1."""
    x, weight, bias, dy = inputs(2, 24, 9, 7)
    x = x + mean
    (y, dx, *_), (y_64, dx_64, *_) = ours(x, weight, bias, dy, 8), expected(x, weight, bias, dy, 8)
    step = abs(mean) * 2**-23
    torch.testing.assert_close(y.double(), y_64, rtol=1e-5, atol=4 * step)  # mean and x - mean are rounded; times weight up to 2
    torch.testing.assert_close(dx.double(), dx_64, rtol=1e-5, atol=8 * step)


def test_one_group_may_have_a_mean_and_spread_unlike_its_neighbours(many_strips):
    x, weight, bias, dy = inputs(1, 24, 9, 7)
    scale = torch.tensor([1e-2, 1.0, 1e2, 1e4, 1.0, 1.0, 1.0, 1.0], device=DEVICE).repeat_interleave(3)[:, None, None]
    x = (x * scale + 3 * scale).to(memory_format=torch.channels_last)
    y, y_64 = ours(x, weight, bias, dy, 8)[0], expected(x, weight, bias, dy, 8)[0]
    torch.testing.assert_close(y.double(), y_64, **CLOSE[torch.float32])


def test_constant_channels_become_the_bias():
    x, weight, bias, _ = inputs(2, 24, 5, 7)
    x[:, :6] = 3.0  # two groups of three
    y = fused_group_norm_silu(x, 8, weight, bias, EPS, False)
    assert torch.equal(y[:, :6], bias[:6, None, None].expand(2, 6, 5, 7))


def test_a_picture_of_the_batch_knows_nothing_of_the_others():
    x, weight, bias, _ = inputs(3, 24, 5, 7)
    assert torch.equal(fused_group_norm_silu(x[1:2], 8, weight, bias, EPS), fused_group_norm_silu(x, 8, weight, bias, EPS)[1:2])


def test_the_same_inputs_give_the_same_bits(many_strips):
    arguments = inputs(2, 20, 7, 5)
    first = ours(*arguments, 4)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(first, ours(*arguments, 4), strict=True))


def test_frozen_weights_get_no_gradient_and_the_input_the_same():
    x, weight, bias, dy = inputs(2, 24, 5, 7)
    _, dx, _, _ = ours(x, weight, bias, dy, 8)
    leaf = x.clone().requires_grad_()
    fused_group_norm_silu(leaf, 8, weight, bias, EPS).backward(dy)
    assert torch.equal(leaf.grad, dx)


def test_gradients_may_come_in_another_layout():
    x, weight, bias, dy = inputs(2, 24, 5, 7)
    for a, b in zip(ours(x, weight, bias, dy, 8), ours(x, weight, bias, dy.contiguous(), 8), strict=True):
        assert torch.equal(a, b)


def test_weights_may_be_float32_beside_16_bits():
    x, weight, bias, _ = inputs(1, 24, 5, 7)
    y = fused_group_norm_silu(x.bfloat16(), 8, weight, bias, EPS)
    wanted = F.silu(F.group_norm(x.bfloat16().double(), 8, weight.double(), bias.double(), EPS))
    assert_close(y, wanted, torch.bfloat16)


@pytest.mark.parametrize("trained", [True, False])
def test_it_is_an_operation_of_pytorchs(trained):
    """opcheck: the schema, the shapes without numbers, and tracing for torch.compile."""
    x, weight, bias, dy = inputs(2, 24, 5, 7)
    arguments = (x, 8, weight, bias, EPS, True)
    torch.library.opcheck(torch.ops.minidiff.group_norm_silu, arguments)
    _, mean, rstd = torch.ops.minidiff.group_norm_silu(*arguments)
    torch.library.opcheck(torch.ops.minidiff.group_norm_silu_backward, (dy, x, 8, weight, bias, mean, rstd, True, trained))


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(x=torch.zeros(2, 24, 5, 7, dtype=torch.float64, device=DEVICE)), "float64"),
        (dict(x=torch.zeros(2, 24, 5, 7, device=DEVICE)), "channels-last"),
        (dict(groups=7), "multiple of the groups"),
        (dict(groups=0), "multiple of the groups"),
        (dict(weight=torch.ones(23, device=DEVICE)), "the weight; the kernel takes 24 numbers"),
        (dict(bias=torch.ones(48, device=DEVICE)[::2]), "the bias; the kernel takes 24 numbers"),
        (dict(x=noise(1, 2049, 1, 1), groups=1, weight=noise(2049), bias=noise(2049)), "2048"),
    ],
)
def test_what_it_does_not_take_is_refused_with_the_reason(change, reason):
    x, weight, bias, _ = inputs(2, 24, 5, 7)
    arguments = dict(x=x, groups=8, weight=weight, bias=bias) | change
    assert reason in unsupported(**arguments)
    with pytest.raises(ValueError, match=f"fused GroupNorm and SiLU: .*{reason}"):
        inspect.unwrap(fused_group_norm_silu)(**arguments, eps=EPS)
    assert unsupported(x, 8, None, bias) is not None  # a norm without weights


def test_pictures_of_more_elements_than_32_bits_count_are_refused_and_batches_are_not(monkeypatch):
    monkeypatch.setattr(tiles, "DEVICE", "meta")  # where they take no memory
    weight = torch.empty(32, device="meta")
    for shape, refused in (((3, 32, 2**13, 2**12), False), ((1, 32, 2**13, 2**13), True)):
        x = torch.empty(shape, device="meta", memory_format=torch.channels_last)
        reason = unsupported(x, 8, weight, weight)
        assert (reason is not None) == refused and (not refused or "2^31 elements in a picture" in reason)


def both_ways(C, H, W, dtype=torch.bfloat16, groups=32, silu=True, B=2):
    x = torch.empty(B, C, H, W, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    weight, bias = (torch.empty(C, dtype=dtype).requires_grad_() for _ in range(2))
    y = fused_group_norm_silu(x, groups, weight, bias, EPS, silu)
    y.backward(torch.empty_like(y))


# For tests/kernels/compile_kernels.py: the widths and sizes of SD 1.5 and 2.1 (at 512 and 768 pixels) and of the bundled model.
CASES = {
    "SD, 320 at 64 x 64": lambda: both_ways(320, 64, 64),
    "SD, 320 at 64 x 64, no SiLU": lambda: both_ways(320, 64, 64, silu=False),
    "SD, 320 at 96 x 96": lambda: both_ways(320, 96, 96),
    "SD, 320 at 64 x 64, fp32": lambda: both_ways(320, 64, 64, torch.float32),
    "SD, 960 at 64 x 64": lambda: both_ways(960, 64, 64),
    "SD, 640 at 32 x 32": lambda: both_ways(640, 32, 32),
    "SD, 1920 at 32 x 32": lambda: both_ways(1920, 32, 32),
    "SD, 1280 at 16 x 16": lambda: both_ways(1280, 16, 16),
    "SD, 2560 at 8 x 8": lambda: both_ways(2560, 8, 8),
    "SD's VAE, 512 at 64 x 64": lambda: both_ways(512, 64, 64),
    "SD's VAE, 128 at 512 x 512": lambda: both_ways(128, 512, 512, B=1),
    "bundled, 64 at 16 x 16": lambda: both_ways(64, 16, 16),
    "bundled, 160 at 4 x 4": lambda: both_ways(160, 4, 4),
}


@pytest.mark.parametrize("capability", [90, *(pytest.param(other, marks=pytest.mark.slow) for other in (80, 86, 89, 100, 120))])
def test_compiled_it_reads_16_bytes_at_a_time_and_spills_nothing(capability):
    kernels = built("tests.kernels.test_group_norm_silu", capability)
    assert {kernel.kernel for kernel in kernels} == {"statistics_kernel", "normalise_kernel", "sums_kernel", "gradient_kernel"}
    for kernel in kernels:
        assert kernel.wide_loads >= 4, kernel
        assert kernel.narrow_loads <= 2, kernel  # weight and bias: once a program
        # For 10.0 Triton 3.8 keeps 8 bytes of two kernels in memory, with registers to spare: slower, not wrong.
        assert kernel.stack <= (8 if capability == 100 else 0), kernel
