"""Attention: every place of Stable Diffusion where one position looks at others.

    text encoder   words look at the words before them           (causal self-attention)
    U-Net          latent cells look at each other               (self-attention)
                   latent cells look at the words of the prompt  (cross-attention)
    VAE            latent cells look at each other, one head     (self-attention)

All four are softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, "Attention is all you need", eq. 1). It is written out in
`attention_by_hand`, to be read and to be recorded. `attention` gives the same by the way that is `chosen`: also by fused kernels, PyTorch's
or those of kernels/, which never build the N x L matrix in memory. The tests hold all equal.
"""

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from minidiff.kernels import cross_attention, self_attention

ATTENTION = ("auto", "by_hand", "pytorch", "triton")
_asked_for = "auto"  # in the whole process: autograd works in threads of its own, and torch.compile guards on it
_tried: dict[torch.device, bool] = {}  # whether our kernels run there


def attention_weights(q: Float[Tensor, "B N D"], k: Float[Tensor, "B L D"], heads: int, causal: bool = False) -> Float[Tensor, "B h N L"]:
    """How much each of N queries looks at each of L keys; every row sums to 1.

    The D channels hold `heads` heads of d = D / heads side by side. `causal` lets query n see keys 0..n only.
    """
    q, k = (rearrange(x, "B N (h d) -> B h N d", h=heads) for x in (q, k))
    logits = q / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2)  # scaled first: half precision ends at 65504
    if causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(later, -torch.inf)
    return logits.softmax(dim=-1)


def attention_by_hand(
    q: Float[Tensor, "B N D"], k: Float[Tensor, "B L D"], v: Float[Tensor, "B L D"], heads: int, causal: bool = False
) -> Float[Tensor, "B N D"]:
    """softmax(q k^T / sqrt(d)) v, head by head, in plain steps: memory grows as N x L."""
    weights = attention_weights(q, k, heads, causal)
    v = rearrange(v, "B L (h d) -> B h L d", h=heads)
    return rearrange(weights @ v, "B h N d -> B N (h d)")


@contextmanager
def attention_backend(name: str) -> Iterator[None]:
    """Within the block attention is worked out as the name says, and with "triton" GroupNorm + SiLU and GEGLU too (see blocks.py).

    auto: what is fastest for the device and the shape; by_hand: the plain steps; pytorch: PyTorch's fused kernels; triton: those of
    kernels/, and a ValueError where none takes the tensors. Results are the same but for rounding. A backward pass that computes parts
    again (checkpointing) belongs into the block too. Raises ValueError for another name.
    """
    global _asked_for
    if name not in ATTENTION:
        raise ValueError(f"attention {name!r} unknown; choose {', '.join(ATTENTION)}")
    before, _asked_for = _asked_for, name
    try:
        yield
    finally:
        _asked_for = before


def backend() -> str:
    """The name that `attention_backend` was given last, "auto" without it."""
    return _asked_for


def chosen(q: Float[Tensor, "B N D"], k: Float[Tensor, "B L D"], v: Float[Tensor, "B L D"], heads: int, causal: bool = False) -> str:
    """How `attention` works this out: "by_hand", "pytorch", or by our kernel for "self"- or "cross"-attention.

    Raises ValueError where our kernels were asked for by name and none takes these tensors, with the reason.
    """
    if _asked_for in ("by_hand", "pytorch"):
        return _asked_for
    if _asked_for == "triton" or q.device.type == "cuda" and kernels_run(q.device):
        if not causal and q.shape[1] != k.shape[1] and cross_attention.unsupported(q, k, v, heads, causal) is None:
            return "cross"
        reason = self_attention.unsupported(q, k, v, heads, causal)
        if reason is None:
            return "self"
        if _asked_for == "triton":
            raise ValueError(f"attention 'triton' does not take this: {reason}; choose attention 'auto' or 'pytorch'")
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[1] <= 256:
        return "by_hand"  # PyTorch's kernel for this case is slow (2.11 to 2.15): 2 to 7 times, forward and backward, at 16 to 256 keys
    return "pytorch"


@torch.compiler.assume_constant_result
def kernels_run(device: torch.device) -> bool:
    """Whether Triton works on this GPU, tried once: it also needs a C compiler and Python's headers, which a machine may not have."""
    if device not in _tried:
        # Asked first where tensors have no contents, as to estimate memory (FakeTensorMode), any kernel would seem to run.
        with _disable_current_modes():
            _tried[device] = _runs(device)
    return _tried[device]


def _runs(device: torch.device) -> bool:
    try:
        x = torch.zeros(1, 16, 16, device=device)
        if self_attention.unsupported(x, x, x, 1, False) is not None:
            return False
        self_attention.fused_self_attention(x, x, x, 1)
    except Exception as error:  # whatever it is, PyTorch's kernels do not have it
        warnings.warn(f"Triton does not work here, PyTorch's attention is used instead: {error}", stacklevel=3)
        return False
    return True


def attention(
    q: Float[Tensor, "B N D"], k: Float[Tensor, "B L D"], v: Float[Tensor, "B L D"], heads: int, causal: bool = False
) -> Float[Tensor, "B N D"]:
    """The same as `attention_by_hand`, in the way that is `chosen`; by a fused kernel memory grows as N + L."""
    way = chosen(q, k, v, heads, causal)
    if way == "self":
        return self_attention.fused_self_attention(q, k, v, heads, causal)
    if way == "cross":
        return cross_attention.fused_cross_attention(q, k, v, heads)
    if way == "by_hand":
        return attention_by_hand(q, k, v, heads, causal)
    q, k, v = (rearrange(x, "B N (h d) -> B h N d", h=heads) for x in (q, k, v))
    return rearrange(F.scaled_dot_product_attention(q, k, v, is_causal=causal), "B h N d -> B N (h d)")


class Attention(nn.Module):
    """Queries from x; keys and values from the context, or from x itself where no context is given.

    bias: whether the three input projections have one. CLIP's and the VAE's have, the U-Net's have not; the output's always has.
    """

    def __init__(self, width: int, heads: int, context_width: int | None = None, bias: bool = False):
        super().__init__()
        context_width = context_width or width
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=bias)
        self.to_k = nn.Linear(context_width, width, bias=bias)
        self.to_v = nn.Linear(context_width, width, bias=bias)
        self.to_out = nn.Linear(width, width)

    def forward(
        self, x: Float[Tensor, "B N D"], context: Float[Tensor, "B L D_context"] | None = None, causal: bool = False
    ) -> Float[Tensor, "B N D"]:
        context = x if context is None else context
        return self.to_out(attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads, causal))
