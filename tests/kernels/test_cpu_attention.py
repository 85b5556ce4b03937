"""Attention in tiles on a CPU against float64, and as an operation of PyTorch's. Runs on every processor; which ones choose it is in test_dispatch.py."""

import pytest
import torch

from minidiff.kernels import cpu_attention
from minidiff.kernels.cpu_attention import tiled_attention
from minidiff.kernels.dispatch import fused_attention
from tests.kernels.exact_attention import KINDS, answer_and_gradients, exact_and_allowed, inputs, rms

HEADS = 2


def tensors(N: int, L: int, d: int, kind: str = "normal") -> list[torch.Tensor]:
    return [x.cpu() for x in inputs(2, N, L, HEADS * d, torch.bfloat16, kind, d)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("N", "L", "d", "tile"), [(300, 300, 40, 7000), (64, 300, 64, 2**20), (65, 257, 80, 100), (300, 290, 40, 290 * 300)]
)
def test_results_and_gradients_are_off_by_the_roundings_that_bfloat16_cannot_do_without(monkeypatch, kind, N, L, d, tile):
    monkeypatch.setattr(cpu_attention, "TILE", tile)  # 23 queries and the rest; all at once; one, though it is larger; all, exactly
    given = tensors(N, L, d, kind)
    found = answer_and_gradients(tiled_attention, *given, HEADS)
    for name, x, (exact, allowed) in zip(("O", "dQ", "dK", "dV"), found, exact_and_allowed(*given, HEADS, rounded_products=True)):
        assert x.dtype == torch.bfloat16 and x.shape == exact.shape
        assert ((x.double() - exact).abs() <= allowed).all(), name


def test_large_logits_cost_no_exactness():
    """In bfloat16 a logit of 60 is off by up to 1/8, and its weight by 13 %; what is rounded is its distance from the largest."""
    given = tensors(300, 300, 40, "logits around 60")
    exact = exact_and_allowed(*given, HEADS)[0][0]
    ours, theirs = (rms(x, exact) for x in (tiled_attention(*given[:3], HEADS), fused_attention("pytorch", *given[:3], HEADS)))
    assert ours < 2 * theirs  # P and S - m are rounded, where PyTorch rounds P alone
    assert ours < rms(fused_attention_of_rounded_logits(*given[:3]), exact) / 4


def fused_attention_of_rounded_logits(q, k, v):
    q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
    return ((q * q.shape[-1] ** -0.5 @ k.mT).softmax(-1) @ v).transpose(1, 2).flatten(-2)


def test_strided_inputs_give_what_contiguous_ones_give_and_are_left_as_they_are():
    q, k, v, dout = tensors(300, 300, 40)
    fused = torch.cat([q, k, v], dim=-1)
    views = fused.chunk(3, dim=-1)
    for x, y in zip(
        answer_and_gradients(tiled_attention, *views, dout, HEADS), answer_and_gradients(tiled_attention, q, k, v, dout, HEADS)
    ):
        assert torch.equal(x, y)
    assert torch.equal(fused, torch.cat([q, k, v], dim=-1))


def test_it_is_an_operation_that_torch_compile_and_fake_tensors_see_through():
    q, k, v, dout = tensors(30, 300, 40)
    torch.library.opcheck(torch.ops.minidiff.cpu_attention.default, (q, k, v, HEADS))
    _, m = torch.ops.minidiff.cpu_attention(q, k, v, HEADS)
    torch.library.opcheck(torch.ops.minidiff.cpu_attention_backward.default, (dout, q, k, v, m, HEADS))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (dict(dtype=torch.float32), "only for bfloat16 on a CPU"),
        (dict(device="meta"), "only for bfloat16 on a CPU"),
        (dict(L=256), "only for 257 keys or more"),
        (dict(causal=True), "only for 257 keys or more, without a causal mask"),
    ],
)
def test_what_it_is_not_for(changes, reason):
    given = dict(L=300, dtype=torch.bfloat16, device="cpu", causal=False) | changes
    causal, L = given.pop("causal"), given.pop("L")
    assert reason in cpu_attention.unsupported(torch.empty(1, L, 80, **given), torch.empty(1, L, 80, **given), causal)
