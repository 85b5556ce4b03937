"""The blocks that the U-Net and the VAE are made of.

    timestep_embedding   t -> a vector of cosines and sines
    ResBlock             two convolutions around the time, and a skip
    SpatialTransformer   self-attention, cross-attention to the text, feed-forward, on the cells of a feature map

Papers: Ho et al. 2020 (DDPM, appendix B) for the residual block, Rombach et al. 2022 (latent diffusion, section 3.3 and appendix E.2.1)
for the transformer. Left out: dropout, which Stable Diffusion sets to 0.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from minidiff.attention import Attention
from minidiff.config import SIZE_NUMBERS
from minidiff.kernels import geglu as geglu_kernel
from minidiff.kernels import group_norm_silu
from minidiff.kernels.dispatch import select_kernel

SIZE_WAVES = 256  # cosines and sines of each of SDXL's size numbers


def timestep_embedding(t: Shaped[Tensor, " B"], width: int) -> Float[Tensor, "B {width}"]:
    """Return the timestep as cosines and sines of geometrically falling frequencies 10000^(-i / half).

    cos comes first, then sin: the original's order, the reverse of the transformer paper's. Always float32, as in the original: the
    angles run to 999, where float16 counts in halves and bfloat16 in fours.
    """
    half = width // 2
    frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimeEmbedding(nn.Module):
    """Timestep -> the vector that every ResBlock of the U-Net is given, four times as wide as the first level.

    added: what an AddedEmbedding gives, one row for each row of the context. The SiLU that the original's ResBlocks each begin with is
    applied here, once.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width = width
        self.linear_1 = nn.Linear(width, 4 * width)
        self.linear_2 = nn.Linear(4 * width, 4 * width)

    def forward(self, t: Shaped[Tensor, " B"], added: Float[Tensor, "R D_time"] | None = None) -> Float[Tensor, "B_t D_time"]:
        waves = timestep_embedding(t, self.width).to(self.linear_1.weight.dtype)
        time = self.linear_2(F.silu(self.linear_1(waves)))
        return F.silu(time if added is None else tile_rows(time, len(added)) + added)


class AddedEmbedding(nn.Module):
    """Pooled text vector and size numbers -> a vector that is added to the timestep's (Podell et al. 2023, section 2.2).

    Each size number becomes SIZE_WAVES cosines and sines, like a timestep. width: of the time embedding.
    """

    def __init__(self, pooled_width: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(pooled_width + SIZE_NUMBERS * SIZE_WAVES, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, pooled: Float[Tensor, "R P"], size: Float[Tensor, "R S"]) -> Float[Tensor, "R D_time"]:
        waves = rearrange(timestep_embedding(size.flatten(), SIZE_WAVES), "(R S) W -> R (S W)", R=len(size))
        return self.linear_2(F.silu(self.linear_1(torch.cat([pooled, waves.to(pooled.dtype)], dim=-1))))


def tile_rows(x: Float[Tensor, "B *dims"], rows: int) -> Float[Tensor, "{rows} *dims"]:
    """Repeat x's rows, 0 1 0 1 ..., until there are `rows`, a multiple of its own. See UNet."""
    return x if len(x) == rows else torch.cat([x] * (rows // len(x)))


def add_rows(a: Float[Tensor, "A ..."], b: Float[Tensor, "B ..."]) -> Float[Tensor, "R ..."]:
    """Add two feature maps, one of which may have several times the rows of the other (see UNet)."""
    rows = max(len(a), len(b))
    return tile_rows(a, rows) + tile_rows(b, rows)


def norm_silu(norm: nn.GroupNorm, x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B C H W"]:
    """Compute SiLU(GroupNorm(x)), before every 3x3 convolution of a ResBlock; our kernel, if selected, takes channels-last x."""
    given = (x, norm.num_groups, norm.weight, norm.bias)
    if select_kernel("group_norm_silu", x, x.shape[1:]) and group_norm_silu.unsupported(*given) is None:
        return group_norm_silu.run_group_norm_silu(*given, norm.eps)
    return F.silu(norm(x))


class ResBlock(nn.Module):
    """norm, SiLU, convolution; add the time; norm, SiLU, convolution; add the input.

    eps: GroupNorm's, 1e-5 in the U-Net and 1e-6 in the VAE. time_width: None in the VAE, which knows no time.
    """

    def __init__(self, c_in: int, c_out: int, groups: int, eps: float, time_width: int | None = None):
        super().__init__()
        self.norm_1 = nn.GroupNorm(groups, c_in, eps=eps)
        self.conv_1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time_projection = nn.Linear(time_width, c_out) if time_width else None
        self.norm_2 = nn.GroupNorm(groups, c_out, eps=eps)
        self.conv_2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.skip = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Float[Tensor, "B C H W"], time: Float[Tensor, "B_t D_time"] | None = None) -> Float[Tensor, "B C_out H W"]:
        h = self.conv_1(norm_silu(self.norm_1, x))
        if self.time_projection is not None:
            h = h + tile_rows(self.time_projection(time), len(h))[:, :, None, None]
        h = self.conv_2(norm_silu(self.norm_2, h))
        return self.skip(x) + h


def geglu(x: Float[Tensor, "... D"]) -> Float[Tensor, "... F"]:
    """Multiply the first half of x by the GELU, by erf, of its second half; by our kernel where selected."""
    if select_kernel("geglu", x, x.shape[-2:]) and geglu_kernel.unsupported(x) is None:
        return geglu_kernel.run_geglu(x)
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


class FeedForward(nn.Module):
    """GEGLU (Shazeer 2020, "GLU variants improve transformer"): a value times the GELU of a gate, four times as wide as x.

    One projection makes both: its first half is the value, its second the gate. The GELU is the exact one, by erf.
    """

    def __init__(self, width: int):
        super().__init__()
        self.proj_in = nn.Linear(width, 2 * 4 * width)
        self.proj_out = nn.Linear(4 * width, width)

    def forward(self, x: Float[Tensor, "B N D"]) -> Float[Tensor, "B N D"]:
        return self.proj_out(geglu(self.proj_in(x)))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; each on a LayerNorm of x and added to x.

    The context may have a multiple R of x's rows B: each row of x meets several texts, from the cross-attention on.
    """

    def __init__(self, width: int, heads: int, context_width: int):
        super().__init__()
        self.norm_1 = nn.LayerNorm(width, eps=1e-5)
        self.self_attention = Attention(width, heads)
        self.norm_2 = nn.LayerNorm(width, eps=1e-5)
        self.cross_attention = Attention(width, heads, context_width)
        self.norm_3 = nn.LayerNorm(width, eps=1e-5)
        self.feed_forward = FeedForward(width)

    def forward(self, x: Float[Tensor, "B N D"], context: Float[Tensor, "R L D_context"]) -> Float[Tensor, "R N D"]:
        x = x + self.self_attention(self.norm_1(x))
        x = tile_rows(x, len(context))
        x = x + self.cross_attention(self.norm_2(x), context)
        return x + self.feed_forward(self.norm_3(x))


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks over the cells of a feature map, and a skip around them.

    Its GroupNorm has eps 1e-6 where the ResBlocks beside it have 1e-5. Files of SD 1.x hold proj_in and proj_out as 1x1 convolutions,
    which are the same maps as the Linears here.
    """

    def __init__(self, width: int, heads: int, context_width: int, groups: int, depth: int = 1):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.proj_in = nn.Linear(width, width)
        self.blocks = nn.ModuleList(TransformerBlock(width, heads, context_width) for _ in range(depth))
        self.proj_out = nn.Linear(width, width)

    def forward(self, x: Float[Tensor, "B C H W"], context: Float[Tensor, "R L D_context"]) -> Float[Tensor, "R C H W"]:
        H = x.shape[2]
        h = self.proj_in(rearrange(self.norm(x), "B C H W -> B (H W) C"))
        for block in self.blocks:
            h = block(h, context)
        h = self.proj_out(h)
        return tile_rows(x, len(context)) + rearrange(h, "R (H W) C -> R C H W", H=H)
