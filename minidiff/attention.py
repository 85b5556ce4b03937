"""Attention: every place of Stable Diffusion where one position looks at others.

    text encoder   words look at the words before them           (causal self-attention)
    U-Net          latent cells look at each other               (self-attention)
                   latent cells look at the words of the prompt  (cross-attention)
    VAE            latent cells look at each other, one head     (self-attention)

All four are softmax(q k^T / sqrt(d)) v (Vaswani et al. 2017, "Attention is all you need", eq. 1), written out in `naive_attention`.
`attention` gives the same result, usually by a fused kernel that never builds the N x L matrix in memory; which one is chosen in
kernels/dispatch.py. The tests hold all of them equal.
"""

import math

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.kernels.dispatch import fused_attention, select_backend


def attention_weights(q: Float[Tensor, "B N D"], k: Float[Tensor, "B L D"], heads: int, causal: bool = False) -> Float[Tensor, "B h N L"]:
    """Return how much each of N queries looks at each of L keys; every row sums to 1.

    Args:
        q, k: queries and keys, with heads side by side, each of d = D / heads channels.
        heads: number of heads; divides D.
        causal: let query n see keys 0..n only.
    """
    q, k = (rearrange(x, "B N (h d) -> B h N d", h=heads) for x in (q, k))
    logits = q / math.sqrt(q.shape[-1]) @ k.transpose(-1, -2)  # scaled first: half precision ends at 65504
    if causal:
        later = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(later, -torch.inf)
    return logits.softmax(dim=-1)


def naive_attention(
    q: Float[Tensor, "B N D"], k: Float[Tensor, "B L D"], v: Float[Tensor, "B L D"], heads: int, causal: bool = False
) -> Float[Tensor, "B N D"]:
    """Compute softmax(q k^T / sqrt(d)) v, head by head, in plain steps: memory grows as N x L.

    Args:
        q, k, v: queries, keys and values, with heads side by side, each of d = D / heads channels.
        heads: number of heads; divides D.
        causal: let query n see keys 0..n only.
    """
    weights = attention_weights(q, k, heads, causal)
    v = rearrange(v, "B L (h d) -> B h L d", h=heads)
    return rearrange(weights @ v, "B h N d -> B N (h d)")


def attention(
    q: Float[Tensor, "B N D"], k: Float[Tensor, "B L D"], v: Float[Tensor, "B L D"], heads: int, causal: bool = False
) -> Float[Tensor, "B N D"]:
    """Compute what `naive_attention` computes, by the backend selected for the tensors; fused, memory grows as N + L.

    Args:
        q, k, v, heads, causal: as in `naive_attention`.
    """
    backend = select_backend(q, k, v, heads, causal)
    if backend == "naive":
        return naive_attention(q, k, v, heads, causal)
    return fused_attention(backend, q, k, v, heads, causal)


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
