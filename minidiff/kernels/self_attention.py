"""Self-attention in Triton: softmax(q k^T / sqrt(d)) v of any number of tokens, and its gradients, without the N x L matrix in memory.

In Stable Diffusion: latent cells look at each other (U-Net, 4096 tokens at 512 x 512 pixels, the largest share of all attention) and words
look at the words before them (text encoder, causal). Equal to `minidiff.attention.naive_attention`, which the tests hold it to.

Dao 2023, "FlashAttention-2", algorithms 1 and 2, in its names. Rows of S are queries (N of them), columns are keys (L):

    S = q k^T / sqrt(d)      P = exp(S - LSE)      O = P v      LSE_n = log(sum_j exp(S_nj))

Forward, the online softmax. A program has BLOCK_N queries in its registers and walks over the keys, BLOCK_L at a time. For each row it
keeps

    m   the largest logit so far
    l   the sum so far of exp(S - m)
    O   the sum so far of exp(S - m) v

When a block of keys raises m to m', what was summed before is too large by exp(m' - m): l and O are multiplied by alpha = exp(m - m').
At the end O / l is the answer, and LSE = m + log(l) is kept: with it P can be computed again, block by block.

Backward. From dO, with delta_n = sum_c dO_nc O_nc (which is sum_j P_nj dP_nj, what the softmax takes off):

    dV = P^T dO      dP = dO v^T      dS = P * (dP - delta)      dQ = dS k / sqrt(d)      dK = dS^T q / sqrt(d)

dV and dK are sums over queries: a program has BLOCK_L keys and walks over the queries. dQ is a sum over keys: a program has BLOCK_N queries
and walks over the keys. Two kernels that each compute P and dP, rather than one whose programs add to each other's dQ: that order, and so
the rounding, would differ from run to run. Where nobody needs dQ, or dK and dV, its kernel does not run.

Logits are kept in base 2, S log2(e), as the hardware's exponential is 2^x; LSE is in that base too. Sums are float32; P and dS are rounded
to the dtype of the inputs for their products, as tensor cores want. A head stands in two tiles of columns (tiles.py): x_1, and x_2 =
nothing where D_2 = 0.
Left out: dropout, other masks, sequences of different lengths, and dividing one head's keys among programs, which pays for very few queries
only.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from minidiff.kernels import choices, tiles
from minidiff.kernels.tiles import (
    LOG2_E,
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


@jit
def seen(s, rows, keys, L, CAUSAL: tl.constexpr, EVEN: tl.constexpr):
    """S, or q k^T, with -inf, of which the exponential is 0, at keys that a query does not see and beyond L (EVEN: there are none)."""
    if CAUSAL:
        s = tl.where((keys[None, :] <= rows[:, None]) & (keys[None, :] < L), s, float("-inf"))
    elif not EVEN:
        s = tl.where(keys[None, :] < L, s, float("-inf"))
    return s


@jit
def numbers_of(x, N):
    """Point at this program's head in a float32 [B, h, N]: one number per token."""
    return x + (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * N


@jit
def forward_kernel(
    q,
    k,
    v,
    out,
    lse,
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
    CAUSAL: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """O and LSE of BLOCK_N queries. EVEN: L is a multiple of BLOCK_L; scale: log2(e) / sqrt(d)."""
    width = tl.num_programs(1) * d  # of all heads: the token stride of what is contiguous
    q, k, v, out = head_of(q, q_batch, d), head_of(k, k_batch, d), head_of(v, v_batch, d), head_of(out, N * width, d)
    start = tl.program_id(0) * BLOCK_N
    rows = start + tl.arange(0, BLOCK_N)
    q_1, q_2 = load_head(q, rows, N, q_token, d, D_1, D_2, False)

    m = tl.full([BLOCK_N], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_N], tl.float32)
    o_1, o_2 = zeros_head(BLOCK_N, D_1, D_2)
    end = L
    if CAUSAL:
        end = tl.minimum(L, start + BLOCK_N)  # no query of this block sees further
    for first in range(0, end, BLOCK_L):
        keys = first + tl.arange(0, BLOCK_L)
        k_1, k_2 = load_head(k, keys, L, k_token, d, D_1, D_2, EVEN)
        # S = q k^T / sqrt(d): scaled after the maximum, so that S - m' is one multiply-add an entry
        qk = seen(dot_heads(q_1, q_2, k_1, k_2, D_2), rows, keys, L, CAUSAL, EVEN)
        # m' = max(m, max_j S_j)    p = exp(S - m')    alpha = exp(m - m')
        m_new = tl.maximum(m, tl.max(qk, 1) * scale)
        p = tl.exp2(qk * scale - m_new[:, None])
        alpha = tl.exp2(m - m_new)
        # l' = alpha l + sum_j p_j    O' = alpha O + p v
        l = l * alpha + tl.sum(p, 1)
        v_1, v_2 = load_head(v, keys, L, v_token, d, D_1, D_2, EVEN)
        o_1, o_2 = dot_add(p.to(v_1.dtype), v_1, v_2, o_1 * alpha[:, None], o_2 * alpha[:, None], D_2)
        m = m_new

    # O / l    LSE = m + log(l)
    store_head(out, o_1 / l[:, None], o_2 / l[:, None], rows, N, width, d, D_1, D_2)
    tl.store(numbers_of(lse, N) + rows, m + tl.log2(l), mask=rows < N)


@jit
def delta_kernel(out, dout, delta, N, d: tl.constexpr, D_1: tl.constexpr, D_2: tl.constexpr, BLOCK_N: tl.constexpr):
    """delta_n = sum_c dO_nc O_nc of BLOCK_N queries."""
    width = tl.num_programs(1) * d
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_1, o_2 = load_head(head_of(out, N * width, d), rows, N, width, d, D_1, D_2, False)
    do_1, do_2 = load_head(head_of(dout, N * width, d), rows, N, width, d, D_1, D_2, False)
    total = tl.sum(o_1.to(tl.float32) * do_1.to(tl.float32), 1)
    if D_2 > 0:
        total += tl.sum(o_2.to(tl.float32) * do_2.to(tl.float32), 1)
    tl.store(numbers_of(delta, N) + rows, total, mask=rows < N)


@jit
def dk_dv_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dk,
    dv,
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
    CAUSAL: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """dK and dV of BLOCK_L keys, from all queries, BLOCK_N at a time. EVEN: N is a multiple of BLOCK_N.

    S and dP are computed transposed, [keys, queries], as their products with dO and q want them. Queries beyond N and keys beyond L
    are 0: the former add nothing, the latter's sums are not stored.
    """
    width = tl.num_programs(1) * d
    q, k, v, dout = head_of(q, q_batch, d), head_of(k, k_batch, d), head_of(v, v_batch, d), head_of(dout, N * width, d)
    lse, delta = numbers_of(lse, N), numbers_of(delta, N)
    start = tl.program_id(0) * BLOCK_L
    keys = start + tl.arange(0, BLOCK_L)
    k_1, k_2 = load_head(k, keys, L, k_token, d, D_1, D_2, False)
    v_1, v_2 = load_head(v, keys, L, v_token, d, D_1, D_2, False)

    dk_1, dk_2 = zeros_head(BLOCK_L, D_1, D_2)
    dv_1, dv_2 = zeros_head(BLOCK_L, D_1, D_2)
    begin = 0
    if CAUSAL:
        begin = start // BLOCK_N * BLOCK_N  # earlier queries do not see these keys
    for first in range(begin, N, BLOCK_N):
        rows = first + tl.arange(0, BLOCK_N)
        q_1, q_2 = load_head(q, rows, N, q_token, d, D_1, D_2, EVEN)
        do_1, do_2 = load_head(dout, rows, N, width, d, D_1, D_2, EVEN)
        lse_n = tl.load(lse + rows, mask=rows < N, other=0.0)
        delta_n = tl.load(delta + rows, mask=rows < N, other=0.0)
        # P^T = exp(S^T - LSE)
        s = dot_heads(k_1, k_2, q_1, q_2, D_2) * scale
        if CAUSAL:
            s = tl.where(keys[:, None] <= rows[None, :], s, float("-inf"))
        p = tl.exp2(s - lse_n[None, :])
        # dV = P^T dO
        dv_1, dv_2 = dot_add(p.to(do_1.dtype), do_1, do_2, dv_1, dv_2, D_2)
        # dP^T = v dO^T    dS^T = P^T * (dP^T - delta)
        ds = p * (dot_heads(v_1, v_2, do_1, do_2, D_2) - delta_n[None, :])
        # dK = dS^T q, still without its 1 / sqrt(d)
        dk_1, dk_2 = dot_add(ds.to(q_1.dtype), q_1, q_2, dk_1, dk_2, D_2)

    to_e = scale / LOG2_E  # 1 / sqrt(d)
    store_head(head_of(dk, L * width, d), dk_1 * to_e, dk_2 * to_e, keys, L, width, d, D_1, D_2)
    store_head(head_of(dv, L * width, d), dv_1, dv_2, keys, L, width, d, D_1, D_2)


@jit
def dq_kernel(
    q,
    k,
    v,
    dout,
    lse,
    delta,
    dq,
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
    CAUSAL: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    """dQ of BLOCK_N queries, from all keys, BLOCK_L at a time. EVEN: L is a multiple of BLOCK_L."""
    width = tl.num_programs(1) * d
    q, k, v, dout = head_of(q, q_batch, d), head_of(k, k_batch, d), head_of(v, v_batch, d), head_of(dout, N * width, d)
    start = tl.program_id(0) * BLOCK_N
    rows = start + tl.arange(0, BLOCK_N)
    q_1, q_2 = load_head(q, rows, N, q_token, d, D_1, D_2, False)
    do_1, do_2 = load_head(dout, rows, N, width, d, D_1, D_2, False)
    lse_n = tl.load(numbers_of(lse, N) + rows, mask=rows < N, other=0.0)
    delta_n = tl.load(numbers_of(delta, N) + rows, mask=rows < N, other=0.0)

    dq_1, dq_2 = zeros_head(BLOCK_N, D_1, D_2)
    end = L
    if CAUSAL:
        end = tl.minimum(L, start + BLOCK_N)
    for first in range(0, end, BLOCK_L):
        keys = first + tl.arange(0, BLOCK_L)
        k_1, k_2 = load_head(k, keys, L, k_token, d, D_1, D_2, EVEN)
        v_1, v_2 = load_head(v, keys, L, v_token, d, D_1, D_2, EVEN)
        # P = exp(S - LSE)
        s = dot_heads(q_1, q_2, k_1, k_2, D_2) * scale
        p = tl.exp2(seen(s, rows, keys, L, CAUSAL, EVEN) - lse_n[:, None])
        # dP = dO v^T    dS = P * (dP - delta)    dQ = dS k, still without its 1 / sqrt(d)
        ds = p * (dot_heads(do_1, do_2, v_1, v_2, D_2) - delta_n[:, None])
        dq_1, dq_2 = dot_add(ds.to(k_1.dtype), k_1, k_2, dq_1, dq_2, D_2)

    to_e = scale / LOG2_E
    store_head(head_of(dq, N * width, d), dq_1 * to_e, dq_2 * to_e, rows, N, width, d, D_1, D_2)


@dataclass(frozen=True)
class Blocks:
    """How a kernel's work is divided. queries, keys: rows and columns of the block of S that a program has at a time.

    More of the side that a program keeps (queries forward and in dQ, keys in dK and dV) means fewer times that the other side is read; less
    means more programs, for the 132 multiprocessors of an H200 (108 of an A100), and fewer registers. 16 rows a warp keep a block of S and
    the sums in at most 255 registers a thread. stages: how many blocks of the side that is walked over are on their way from memory at
    once.
    """

    queries: int
    keys: int
    warps: int
    stages: int


def blocks_of(kernel: str, N: int, d: int, dtype: torch.dtype, capability: tuple[int, int]) -> Blocks:
    """Return how a kernel is divided for a number of tokens.

    Args:
        kernel: "forward", "dk_dv" or "dq".
        N: tokens on the side that a program keeps.
        d: channels of a head.
        dtype: of q, k and v.
        capability: of the card, such as (9, 0).
    """
    short = N < 1024
    if dtype == torch.float32:  # without tensor cores: a thread needs whole rows of q and k in registers
        return Blocks(32, 32, 4, 1) if d < 64 else Blocks(32, 16, 8, 1) if kernel == "dq" else Blocks(16, 32, 8, 1)
    if kernel == "forward":
        return Blocks(64, 32, 4, 3) if d > 96 else Blocks(64, 64, 4, 3) if short else Blocks(128, 64, 8, 3)
    needs_more = capability >= (12, 0)  # registers
    if kernel == "dk_dv":  # two sums of d columns in registers
        width = d + 16 if needs_more else d
        return Blocks(16, 64, 8, 2) if width > 96 else Blocks(32, 64, 4, 2) if short or width > 80 else Blocks(64, 64, 4, 2)
    return Blocks(64, 32 if d > 96 or needs_more and d <= 32 else 64, 4, 2)


def fused_self_attention(
    q: Float[Tensor, "B N D"], k: Float[Tensor, "B L D"], v: Float[Tensor, "B L D"], heads: int, causal: bool = False
) -> Float[Tensor, "B N D"]:
    """Compute softmax(q k^T / sqrt(d)) v in one kernel.

    The same inputs give the same bits, forward and backward. The answer is contiguous.

    Args:
        q, k, v: as in `naive_attention`, in float16, bfloat16 or float32. They may be views of one fused projection: the strides of batch
            and tokens are free.
        heads: number of heads; divides D.
        causal: let query n see keys 0..n only.

    Raises ValueError for what `unsupported` names.
    """
    if reason := unsupported(q, k, v, heads, causal):
        raise ValueError(f"fused self-attention: {reason}")
    return run_self_attention(q, k, v, heads, causal)


def run_self_attention(
    q: Float[Tensor, "B N D"], k: Float[Tensor, "B L D"], v: Float[Tensor, "B L D"], heads: int, causal: bool = False
) -> Float[Tensor, "B N D"]:
    """Compute `fused_self_attention` of tensors that `unsupported` was asked about, without asking again.

    Args:
        q, k, v, heads, causal: as in `fused_self_attention`.
    """
    return _SelfAttention.apply(q, k, v, heads, causal)


def unsupported(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> str | None:
    """Return why `fused_self_attention` does not take these tensors, as the end of a sentence; None if it does.

    Args:
        q, k, v, heads, causal: as in `fused_self_attention`.
    """
    return refusal(q, k, v, heads)


def _forward(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool) -> tuple[Tensor, Tensor]:
    """O [B, N, D] and LSE [B, h, N]."""
    out, lse = _forward_shapes(q, k, v, heads, causal)
    N, L, d = q.shape[1], k.shape[1], q.shape[2] // heads
    chosen = choices.find("self", q, (N, L, heads, d)).blocks
    blocks = Blocks(*chosen["forward"]) if "forward" in chosen else blocks_of("forward", N, d, q.dtype, tiles.capability_of(q))
    with device_of(q):
        forward_kernel[triton.cdiv(N, blocks.queries), heads, len(q)](
            q,
            k,
            v,
            out,
            lse,
            N,
            L,
            *strides_of(q, k, v),
            *head_constants(d),
            causal,
            L % blocks.keys == 0,
            blocks.queries,
            blocks.keys,
            **launch_options(blocks.warps, blocks.stages),
        )
    return out, lse


def _forward_shapes(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[0], heads, q.shape[1]), dtype=torch.float32)


def _backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, heads: int, causal: bool, need_dq: bool, need_dk_dv: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dQ, dK and dV; empty where they are not needed."""
    dq, dk, dv = _backward_shapes(dout, q, k, v, out, lse, heads, causal, need_dq, need_dk_dv)
    N, L, d = q.shape[1], k.shape[1], q.shape[2] // heads
    delta, dout = torch.empty_like(lse), dout.contiguous()
    chosen = choices.find("self", q, (N, L, heads, d)).blocks
    with device_of(q):
        delta_kernel[triton.cdiv(N, 32), heads, len(q)](out, dout, delta, N, d, *head_tiles(d), 32)
        if need_dk_dv:
            blocks = Blocks(*chosen["dk_dv"]) if "dk_dv" in chosen else blocks_of("dk_dv", L, d, q.dtype, tiles.capability_of(q))
            dk_dv_kernel[triton.cdiv(L, blocks.keys), heads, len(q)](
                q,
                k,
                v,
                dout,
                lse,
                delta,
                dk,
                dv,
                N,
                L,
                *strides_of(q, k, v),
                *head_constants(d),
                causal,
                N % blocks.queries == 0,
                blocks.queries,
                blocks.keys,
                **launch_options(blocks.warps, blocks.stages),
            )
        if need_dq:
            blocks = Blocks(*chosen["dq"]) if "dq" in chosen else blocks_of("dq", N, d, q.dtype, tiles.capability_of(q))
            dq_kernel[triton.cdiv(N, blocks.queries), heads, len(q)](
                q,
                k,
                v,
                dout,
                lse,
                delta,
                dq,
                N,
                L,
                *strides_of(q, k, v),
                *head_constants(d),
                causal,
                L % blocks.keys == 0,
                blocks.queries,
                blocks.keys,
                **launch_options(blocks.warps, blocks.stages),
            )
    return dq, dk, dv


def _backward_shapes(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, heads: int, causal: bool, need_dq: bool, need_dk_dv: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shapes = q.shape if need_dq else (0,), k.shape if need_dk_dv else (0,), v.shape if need_dk_dv else (0,)
    return q.new_empty(shapes[0]), k.new_empty(shapes[1]), v.new_empty(shapes[2])


class _SelfAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool) -> Tensor:
        out, lse = torch.ops.minidiff.self_attention(q, k, v, heads, causal)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.heads, ctx.causal = heads, causal
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        need_q, need_k, need_v = ctx.needs_input_grad[:3]
        dq, dk, dv = torch.ops.minidiff.self_attention_backward(dout, *ctx.saved_tensors, ctx.heads, ctx.causal, need_q, need_k or need_v)
        return dq if need_q else None, dk if need_k else None, dv if need_v else None, None, None


register_operation("self_attention", _forward, _backward, shapes=_forward_shapes, backward_shapes=_backward_shapes)
