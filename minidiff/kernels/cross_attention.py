"""Cross-attention in Triton: softmax(q k^T / sqrt(d)) v of many queries and at most 256 keys, and its gradients, each in one pass.

In Stable Diffusion: latent cells look at the words of the prompt, 4096 queries at 77 keys at 512 x 512 pixels. Equal to
`minidiff.attention.naive_attention`, which the tests hold it to. The names are those of self_attention.py: N queries, L keys,

    S = q k^T / sqrt(d)      m_n = max_j S_nj      l_n = sum_j exp(S_nj - m_n)      P = exp(S - m) / l      O = P v

What differs is that all keys and values of a head fit into one multiprocessor (77 x 40 numbers of each). Whole rows of S are at hand,
so the softmax is the textbook's (Vaswani et al. 2017, eq. 1): m and l are known at once, and nothing is rescaled as blocks of keys come
in. The backward pass has whole rows, too: it computes them once more, which costs less than to keep anything but q, k and v. From dO:

    dV = P^T dO     dP = dO v^T     delta_n = sum_j P_nj dP_nj     dS = P (dP - delta)     dQ = dS k / sqrt(d)     dK = dS^T q / sqrt(d)

Forward, a program has BLOCK_N queries. There are enough of them to fill a GPU.
Backward, a program has a strip of queries, BLOCK_N at a time: it writes their dQ and sums what they add to dK and dV. There are at most
MOST_STRIPS strips of a head, each a program; what each summed goes through memory, and a second kernel adds the strips in one order.
(Kernels made for as many keys as queries divide the keys among programs in the backward pass: 77 keys are one program a head.)

Left out: masks of keys (the text encoder pads with tokens that are looked at as all others are) and dropout.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from minidiff.kernels import choices, tiles
from minidiff.kernels.tiles import (
    LOG2_E,
    card_of,
    device_of,
    dot_add,
    dot_heads,
    head_constants,
    head_of,
    head_tiles,
    jit,
    launch_options,
    load_head,
    refusal,
    register_operation,
    store_head,
    strides_of,
    tl,
    triton,
    zeros_head,
)

MOST_KEYS = 256
MOST_BYTES = 64 * 1024  # of a head's keys, padded; as much again for its values: threads of an A100 can share 163 KiB
MOST_STRIPS = 16  # times 8 heads: a program for each of the 132 multiprocessors of an H200, even at batch 1
ADDED = 1024  # numbers of dK and dV that a program adds up


@jit
def forward_kernel(
    q,
    k,
    v,
    out,
    N,
    L,
    q_batch,
    q_token,
    k_batch,
    k_token,
    v_batch,
    v_token,
    scale: tl.constexpr,
    d: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    L_1: tl.constexpr,
    L_2: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """O of BLOCK_N queries. The keys stand in two tiles, L_1 and L_2 (see `key_tiles`); scale: log2(e) / sqrt(d)."""
    width = tl.num_programs(1) * d  # of all heads: the token stride of what is contiguous
    q, k, v, out = head_of(q, q_batch, d), head_of(k, k_batch, d), head_of(v, v_batch, d), head_of(out, N * width, d)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    keys_1, keys_2 = tl.arange(0, L_1), L_1 + tl.arange(0, L_2)
    q = load_head(q, rows, N, q_token, d, D_1, D_2, False)  # a pair: two tiles of columns
    k_1, k_2 = load_head(k, keys_1, L, k_token, d, D_1, D_2, False), load_head(k, keys_2, L, k_token, d, D_1, D_2, False)
    v_1, v_2 = load_head(v, keys_1, L, v_token, d, D_1, D_2, False), load_head(v, keys_2, L, v_token, d, D_1, D_2, False)

    # S = q k^T / sqrt(d), in base 2: scaled after the maximum, so that S - m is one multiply-add an entry
    qk_1 = tl.where(keys_1[None, :] < L, dot_heads(*q, *k_1, D_2), float("-inf"))
    qk_2 = tl.where(keys_2[None, :] < L, dot_heads(*q, *k_2, D_2), float("-inf"))
    # m = max_j S_j    p = exp(S - m)    l = sum_j p_j
    m = tl.maximum(tl.max(qk_1, 1), tl.max(qk_2, 1)) * scale
    p_1, p_2 = tl.exp2(qk_1 * scale - m[:, None]), tl.exp2(qk_2 * scale - m[:, None])
    l = tl.sum(p_1, 1) + tl.sum(p_2, 1)
    # O = p v / l
    pv = dot_add(p_1.to(q[0].dtype), *v_1, *zeros_head(BLOCK_N, D_1, D_2), D_2)
    pv = dot_add(p_2.to(q[0].dtype), *v_2, *pv, D_2)
    store_head(out, pv[0] / l[:, None], pv[1] / l[:, None], rows, N, width, d, D_1, D_2)


@jit
def backward_kernel(
    q,
    k,
    v,
    dout,
    dq,
    dk_strips,
    dv_strips,
    N,
    L,
    q_batch,
    q_token,
    k_batch,
    k_token,
    v_batch,
    v_token,
    scale: tl.constexpr,
    d: tl.constexpr,
    D_1: tl.constexpr,
    D_2: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STRIP: tl.constexpr,
    NEED_DQ: tl.constexpr,
    NEED_DK: tl.constexpr,
    NEED_DV: tl.constexpr,
):
    """dQ of a strip of STRIP queries, BLOCK_N at a time, and what they add to dK and dV of all keys (BLOCK_L: L, padded).

    Everything is computed transposed, [keys, queries], as the products with dO and q want it. Queries beyond N are 0, and so is their dO:
    they add nothing. dk_strips and dv_strips: float32 [strips, B, L, h d].
    """
    width = tl.num_programs(1) * d
    q, k, v = head_of(q, q_batch, d), head_of(k, k_batch, d), head_of(v, v_batch, d)
    dout, dq = head_of(dout, N * width, d), head_of(dq, N * width, d)
    keys = tl.arange(0, BLOCK_L)
    k = load_head(k, keys, L, k_token, d, D_1, D_2, False)
    v = load_head(v, keys, L, v_token, d, D_1, D_2, False)

    to_e = scale / LOG2_E  # 1 / sqrt(d)
    dk, dv = zeros_head(BLOCK_L, D_1, D_2), zeros_head(BLOCK_L, D_1, D_2)
    for first in range(0, STRIP, BLOCK_N):
        rows = tl.program_id(0) * STRIP + first + tl.arange(0, BLOCK_N)
        q_n = load_head(q, rows, N, q_token, d, D_1, D_2, False)
        dout_n = load_head(dout, rows, N, width, d, D_1, D_2, False)
        # S = q k^T / sqrt(d)    P = exp(S - m) / l: the forward pass once more, with one division a query
        qk = tl.where(keys[:, None] < L, dot_heads(*k, *q_n, D_2), float("-inf"))
        p = tl.exp2(qk * scale - (tl.max(qk, 0) * scale)[None, :])
        p *= (1 / tl.sum(p, 0))[None, :]
        # dV = P^T dO
        if NEED_DV:
            dv = dot_add(p.to(q_n[0].dtype), *dout_n, *dv, D_2)
        # dP = dO v^T    delta = sum_j P_j dP_j    dS = P (dP - delta)
        if NEED_DQ or NEED_DK:
            dp = dot_heads(*v, *dout_n, D_2)
            ds = (p * (dp - tl.sum(p * dp, 0)[None, :])).to(q_n[0].dtype)
            # dK = dS^T q, still without its 1 / sqrt(d)
            if NEED_DK:
                dk = dot_add(ds, *q_n, *dk, D_2)
            # dQ = dS k / sqrt(d): last, as it takes the most registers and then q and dO are done with
            if NEED_DQ:
                dq_n = dot_add(tl.trans(ds), *k, *zeros_head(BLOCK_N, D_1, D_2), D_2)
                store_head(dq, dq_n[0] * to_e, dq_n[1] * to_e, rows, N, width, d, D_1, D_2)

    strip = tl.program_id(0).to(tl.int64) * tl.num_programs(2) * L * width
    if NEED_DK:
        store_head(head_of(dk_strips + strip, L * width, d), dk[0] * to_e, dk[1] * to_e, keys, L, width, d, D_1, D_2)
    if NEED_DV:
        store_head(head_of(dv_strips + strip, L * width, d), *dv, keys, L, width, d, D_1, D_2)


@jit
def add_strips_kernel(strips, total, size, count, MOST_STRIPS: tl.constexpr, ADDED: tl.constexpr):
    """total_i = strips_0i + strips_1i + ... of `count` strips, from left to right: the same bits in every run, unlike atomic additions."""
    i = tl.program_id(0) * ADDED + tl.arange(0, ADDED)
    added = tl.zeros([ADDED], tl.float32)
    for strip in tl.static_range(MOST_STRIPS):  # unrolled, so that all are on their way from memory at once
        added += tl.load(strips + strip * size.to(tl.int64) + i, mask=(i < size) & (strip < count), other=0.0)
    tl.store(total + i, added.to(total.dtype.element_ty), mask=i < size)


def key_tiles(L: int) -> tuple[int, int]:
    """Split a number of keys into two powers of two, each at least 16, with the smallest sum that holds it: 77 -> (64, 16), not 128.

    In the forward pass keys are columns of S, of which any multiple of 8 is as good; the work is that of 80 keys. In the backward pass
    they are the rows of dK and dV: 16 a warp, which is why there a last 16 rows would cost all warps as much as 128 do.
    """
    below = max(16, 1 << (L - 1).bit_length() >> 1)
    return below, max(16, 1 << max(L - below - 1, 0).bit_length())


def padded_keys(L: int) -> int:
    """Return the power of two, at least 16, that holds that many keys: 77 -> 128."""
    return max(16, 1 << (L - 1).bit_length())


@dataclass(frozen=True)
class Blocks:
    """How a kernel's work is divided: queries that a program has at a time, warps, and blocks that are on their way from memory at once.

    More queries mean fewer times that keys are read, fewer mean more programs and fewer registers: 16 rows a warp (queries forward, keys
    backward) keep S, P and the sums in at most 255 registers a thread. one_pass: whether both dK and dV fit; if not, dV is a launch
    of its own.
    """

    queries: int
    warps: int
    stages: int
    one_pass: bool = True


def strip_length(N: int, block: int) -> int:
    """Return the queries of a strip, so that N of them are at most MOST_STRIPS strips: 1, 2, 3, 4, 6, 8, 12, 16, ... blocks.

    The kernel is compiled for this number: as a run-time argument it would cost registers that heads 80 wide do not have. So few lengths
    are enough for all N, two for each doubling, and no new size of pictures waits long for the compiler.
    """
    needed = triton.cdiv(triton.cdiv(N, block), MOST_STRIPS)
    power = 1 << (needed - 1).bit_length()
    return block * (power * 3 // 4 if power >= 4 and needed <= power * 3 // 4 else power)


def forward_blocks(d: int, dtype: torch.dtype) -> Blocks:
    """Return how the forward pass is divided for heads d wide."""
    if dtype == torch.float32:  # without tensor cores: a thread needs whole rows of q and k in registers
        return Blocks(32, 8 if d > 64 else 4, 1)
    return Blocks(64, 8 if d > 96 else 4, 1)


def backward_blocks(L: int, d: int, dtype: torch.dtype, capability: tuple[int, int]) -> Blocks:
    """Return how the backward pass is divided.

    Args:
        L: keys.
        d: width of a head.
        dtype: of keys and values.
        capability: of the card, such as (9, 0).
    """
    size = padded_keys(L) * sum(head_tiles(d))  # numbers of dK, and of dV
    if dtype == torch.float32:
        return Blocks(16, 8, 1, size <= 64 * 64)
    if size <= 64 * 64:
        return Blocks(32, 4, 2)
    if size <= 128 * 64:
        return Blocks(32, 8, 2)
    # Of 32 queries the 255 registers were a few too few, or just enough, by Triton's version. For 12.0 it needs more of them.
    return Blocks(16, 8, 1, size <= 128 * (64 if capability >= (12, 0) else 80))


def fused_cross_attention(
    q: Float[Tensor, "B N D"], k: Float[Tensor, "B L D"], v: Float[Tensor, "B L D"], heads: int
) -> Float[Tensor, "B N D"]:
    """Compute softmax(q k^T / sqrt(d)) v in one kernel.

    The same inputs give the same bits, forward and backward. The answer is contiguous.

    Args:
        q, k, v: as in `naive_attention`, L at most 256, in float16, bfloat16 or float32. They may be views of one fused projection: the
            strides of batch and tokens are free.
        heads: number of heads; divides D.

    Raises ValueError for what `unsupported` names.
    """
    if reason := unsupported(q, k, v, heads):
        raise ValueError(f"fused cross-attention: {reason}")
    return run_cross_attention(q, k, v, heads)


def run_cross_attention(
    q: Float[Tensor, "B N D"], k: Float[Tensor, "B L D"], v: Float[Tensor, "B L D"], heads: int
) -> Float[Tensor, "B N D"]:
    """Compute `fused_cross_attention` of tensors that `unsupported` was asked about, without asking again.

    Args:
        q, k, v, heads: as in `fused_cross_attention`.
    """
    return _CrossAttention.apply(q, k, v, heads)


def unsupported(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> str | None:
    """Return why `fused_cross_attention` does not take these tensors, as the end of a sentence; None if it does.

    Args:
        q, k, v, heads, causal: as in `fused_self_attention`.
    """
    if causal:
        return "causal; a prompt has no order among latent cells, use self-attention"
    if reason := refusal(q, k, v, heads):
        return reason
    L, d = k.shape[1], k.shape[2] // heads
    if L > MOST_KEYS:
        return f"{L} keys; this kernel has all keys of a head at once, at most {MOST_KEYS}"
    size = padded_keys(L) * sum(head_tiles(d)) * k.element_size()
    if size > MOST_BYTES:
        return (
            f"{L} keys of heads {d} wide take {size // 1024} KiB in {k.dtype}, padded; "
            f"this kernel has all keys of a head at once, in {MOST_BYTES // 1024} KiB"
        )
    if q.device.type == "cuda":
        card = card_of(q.device)
        if (needed := shared_memory(L, d, k.dtype, card.capability)) > card.shared_memory:
            return (
                f"{L} keys of heads {d} wide in {k.dtype} take up to {needed // 1024} KiB of shared memory; "
                f"{card.name} has {card.shared_memory // 1024} KiB a program"
            )
    if k.numel() >= 2**31:
        return "2^31 keys' elements or more; the kernel that adds their gradients counts in 32 bits"
    return None


def shared_memory(L: int, d: int, dtype: torch.dtype, capability: tuple[int, int]) -> int:
    """Return the most bytes of shared memory that a program takes, which it does in the backward pass.

    All keys and values, a block of queries and their dO, and dS between two products; tests compile the kernels and hold them to it. The
    tensor cores of 9.0 and 10.0 read 16-bit numbers from shared memory, copies of all of it at worst.

    Args:
        L: keys.
        d: width of a head.
        dtype: of keys and values.
        capability: of the card, such as (9, 0).
    """
    keys, width, queries = padded_keys(L), sum(head_tiles(d)), backward_blocks(L, d, dtype, capability).queries
    numbers = 2 * keys * width + 2 * queries * width + keys * queries
    return numbers * dtype.itemsize * (2 if dtype.itemsize == 2 and capability[0] in (9, 10) else 1)


def _forward(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    out, (B, N, D), L = _forward_shape(q, k, v, heads), q.shape, k.shape[1]
    chosen = choices.find("cross", q, (N, L, heads, D // heads)).blocks
    blocks = Blocks(*chosen["forward"]) if "forward" in chosen else forward_blocks(D // heads, q.dtype)
    with device_of(q):
        forward_kernel[triton.cdiv(N, blocks.queries), heads, B](
            q,
            k,
            v,
            out,
            N,
            L,
            *strides_of(q, k, v),
            *head_constants(D // heads),
            *key_tiles(L),
            blocks.queries,
            **launch_options(blocks.warps, blocks.stages),
        )
    return out


def _forward_shape(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    return q.new_empty(q.shape)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int, need_dq: bool, need_dk: bool, need_dv: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV; empty where they are not needed."""
    dq, dk, dv = _backward_shapes(dout, q, k, v, heads, need_dq, need_dk, need_dv)
    (B, N, D), L = q.shape, k.shape[1]
    blocks = backward_blocks(L, D // heads, q.dtype, tiles.capability_of(q))  # of these `shared_memory` knows what they take
    strip = strip_length(N, blocks.queries)
    strips = triton.cdiv(N, strip)
    dout = dout.contiguous()
    dk_strips, dv_strips = (x.new_empty((strips, *x.shape), dtype=torch.float32) for x in (dk, dv))
    passes = [(need_dq, need_dk, need_dv)] if blocks.one_pass else [(need_dq, need_dk, False), (False, False, need_dv)]
    with device_of(q):
        for needed in passes:
            if any(needed):
                backward_kernel[strips, heads, B](
                    q,
                    k,
                    v,
                    dout,
                    dq,
                    dk_strips,
                    dv_strips,
                    N,
                    L,
                    *strides_of(q, k, v),
                    *head_constants(D // heads),
                    padded_keys(L),
                    blocks.queries,
                    strip,
                    *needed,
                    **launch_options(blocks.warps, blocks.stages),
                )
        for partial, total in ((dk_strips, dk), (dv_strips, dv)):
            if total.numel():
                add_strips_kernel[(triton.cdiv(total.numel(), ADDED),)](partial, total, total.numel(), strips, MOST_STRIPS, ADDED)
    return dq, dk, dv


def _backward_shapes(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, heads: int, need_dq: bool, need_dk: bool, need_dv: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.shape if needed else (0,)) for x, needed in ((q, need_dq), (k, need_dk), (v, need_dv)))
    return dq, dk, dv


class _CrossAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.heads = heads
        return torch.ops.minidiff.cross_attention(q, k, v, heads)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        need_q, need_k, need_v = ctx.needs_input_grad[:3]
        dq, dk, dv = torch.ops.minidiff.cross_attention_backward(dout, *ctx.saved_tensors, ctx.heads, need_q, need_k, need_v)
        return dq if need_q else None, dk if need_k else None, dv if need_v else None, None


register_operation("cross_attention", _forward, _backward, shapes=_forward_shape, backward_shapes=_backward_shapes)
