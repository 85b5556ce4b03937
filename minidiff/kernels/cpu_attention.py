"""Attention in bfloat16 on a CPU without AMX: softmax(q k^T / sqrt(d)) v and its gradients, a tile of queries at a time.

Equal to `minidiff.attention.naive_attention`, which the tests hold it to. PyTorch's own fused kernel (2.11 to 2.14) multiplies tiles too
small for the processor's bfloat16 instructions; here every product is one matrix product of PyTorch's, of TILE logits, which stay in the
cache between their product and the softmax. With the logits S = q k^T / sqrt(d) of a tile of queries and all keys,

    m_n = max_j S_nj      P = softmax(S - m)      O = P v

A product in bfloat16 is summed in float32, but returned in bfloat16: a logit near 60 would be off by up to an eighth, and its weight by as
much. So S is computed twice: for m, and again as S - m, subtracted before rounding, which is exact where the weights are large. The
gradients, from dO, use the kept m:

    dV = P^T dO     dP = dO v^T     delta_n = sum_j P_nj dP_nj     dS = P (dP - delta)     dQ = dS k / sqrt(d)     dK = dS^T q / sqrt(d)

Left out: causal attention, which only the text encoders need, over few words.
"""

import math
from collections.abc import Iterator

import torch
from einops import rearrange
from jaxtyping import BFloat16
from torch import Tensor
from torch.autograd.function import once_differentiable

from minidiff.kernels.tiles import register_operation

FEWEST_KEYS = 257  # up to 256 all logits at once are as fast: the plain steps
TILE = 2**20  # logits at a time, 2 MiB


def unsupported(q: Tensor, k: Tensor, causal: bool) -> str | None:
    """Return why this module is not the one to compute it, or None if it is.

    Args:
        q, k, causal: as in `attention`; of the tensors only shape, dtype and device count.
    """
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return "only for bfloat16 on a CPU"
    if causal or k.shape[1] < FEWEST_KEYS:
        return f"only for {FEWEST_KEYS} keys or more, without a causal mask"
    if not torch.cpu._is_avx512_bf16_supported():  # there is no public way to ask
        return "the processor has no AVX512-BF16"
    if torch.cpu._is_amx_tile_supported():
        return "not measured with AMX"
    return None


def tiled_attention(
    q: BFloat16[Tensor, "B N D"], k: BFloat16[Tensor, "B L D"], v: BFloat16[Tensor, "B L D"], heads: int
) -> BFloat16[Tensor, "B N D"]:
    """Compute `naive_attention` in tiles: q and k are multiplied twice forward, and memory grows as N + L.

    Args:
        q, k, v, heads: as in `naive_attention`.
    """
    return _TiledAttention.apply(q, k, v, heads)


def _split_heads(heads: int, *tensors: Tensor) -> list[Tensor]:
    return [rearrange(x, "B N (h d) -> (B h) N d", h=heads).contiguous() for x in tensors]


def _merge_heads(heads: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(rearrange(x, "(B h) N d -> B N (h d)", h=heads) for x in tensors)


def _tiles(q: Tensor, k: Tensor) -> Iterator[tuple[int, slice]]:
    """Yield each head and each range of its queries whose logits are a tile."""
    rows = max(1, TILE // k.shape[1])
    for head in range(len(q)):
        for first in range(0, q.shape[1], rows):
            yield head, slice(first, first + rows)


def _forward(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Return O and the largest logits m, [B h, N, 1]."""
    q, k, v = _split_heads(heads, q, k, v)
    scale, nothing = 1 / math.sqrt(q.shape[-1]), q.new_zeros(1, 1)
    out, m = torch.empty_like(q), q.new_empty(*q.shape[:2], 1)
    for head, rows in _tiles(q, k):
        q_n, k_t = q[head, rows], k[head].T
        m[head, rows] = torch.addmm(nothing, q_n, k_t, beta=0, alpha=scale).amax(-1, keepdim=True)
        P = torch.addmm(m[head, rows], q_n, k_t, beta=-1, alpha=scale).softmax(-1)
        torch.mm(P, v[head], out=out[head, rows])
    return *_merge_heads(heads, out), m


def _backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, m: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = q.dtype
    q, k, v, dout = _split_heads(heads, q, k, v, dout)
    scale, nothing = 1 / math.sqrt(q.shape[-1]), q.new_zeros(1, 1)
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
    for head, rows in _tiles(q, k):
        q_n, dout_n = q[head, rows], dout[head, rows]
        P = torch.addmm(m[head, rows], q_n, k[head].T, beta=-1, alpha=scale).softmax(-1)
        dv[head] += P.T @ dout_n  # added up in float32: a sum of many roundings otherwise
        dS = torch._softmax_backward_data(dout_n @ v[head].T, P, -1, dtype)
        dq[head, rows] = torch.addmm(nothing, dS, k[head], beta=0, alpha=scale)
        dk[head] += torch.addmm(nothing, dS.T, q_n, beta=0, alpha=scale)
    return _merge_heads(heads, dq, dk.to(dtype), dv.to(dtype))  # pyright: ignore[reportReturnType]


def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(len(q) * heads, q.shape[1], 1)


def _backward_shapes(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, m: Tensor, heads: int) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        out, m = torch.ops.minidiff.cpu_attention(q, k, v, heads)
        ctx.save_for_backward(q, k, v, m)
        ctx.heads = heads
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        return *torch.ops.minidiff.cpu_attention_backward(dout, *ctx.saved_tensors, ctx.heads), None


register_operation("cpu_attention", _forward, _backward, shapes=_forward_shapes, backward_shapes=_backward_shapes)
