"""The U-Net: given a noisy latent, the timestep and the text, it predicts the noise (or the velocity, see schedule.py).

    x_t -> conv_in -> [level 0] -> [level 1] -> ... -> middle -> ... -> [level 1] -> [level 0] -> conv_out -> prediction
                          \\_________\\____________ skips ____________/_________/

A level is a few ResBlocks at one resolution, each followed by a SpatialTransformer where the level has attention. The way up has one
ResBlock a level more than the way down, and each of them is given one skip by concatenation.

Papers: Ronneberger et al. 2015 (U-Net), Ho et al. 2020 (DDPM), Rombach et al. 2022 (latent diffusion). Left out: class labels, and
the transformer depths and added embeddings of SDXL.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from minidiff.blocks import ResBlock, SpatialTransformer, TimeEmbedding, tile_rows
from minidiff.config import UNetConfig

EPS = 1e-5  # of every GroupNorm here but the SpatialTransformers'


class DownLevel(nn.Module):
    """The ResBlocks (and transformers) of one resolution on the way down, then half the resolution, except at the last level."""

    def __init__(self, c_in: int, c_out: int, heads: int | None, last: bool, config: UNetConfig):
        super().__init__()
        time_width, n = 4 * config.widths[0], config.blocks_per_level
        self.blocks = nn.ModuleList(ResBlock(c_in if j == 0 else c_out, c_out, config.groups, EPS, time_width) for j in range(n))
        self.transformers = nn.ModuleList(
            SpatialTransformer(c_out, heads, config.context_width, config.groups) for _ in range(n if heads else 0)
        )
        self.downsample = None if last else nn.Conv2d(c_out, c_out, 3, stride=2, padding=1)

    def forward(
        self, x: Float[Tensor, "B C H W"], time: Float[Tensor, "B_t D_time"], context: Float[Tensor, "R L D_context"]
    ) -> list[Tensor]:
        """All outputs of the level, each a skip for the way up; the last one goes on down."""
        outputs = []
        for j, block in enumerate(self.blocks):
            x = block(x, time)
            if self.transformers:
                x = self.transformers[j](x, context)
            outputs.append(x)
        if self.downsample is not None:
            outputs.append(self.downsample(x))
        return outputs


class UpLevel(nn.Module):
    """The ResBlocks (and transformers) of one resolution on the way up, then the next resolution, except at the last level."""

    def __init__(self, c_in: int, c_skips: list[int], c_out: int, heads: int | None, last: bool, config: UNetConfig):
        super().__init__()
        time_width = 4 * config.widths[0]
        self.blocks = nn.ModuleList(
            ResBlock((c_in if j == 0 else c_out) + c_skip, c_out, config.groups, EPS, time_width) for j, c_skip in enumerate(c_skips)
        )
        self.transformers = nn.ModuleList(
            SpatialTransformer(c_out, heads, config.context_width, config.groups) for _ in (c_skips if heads else [])
        )
        self.upsample = None if last else nn.Conv2d(c_out, c_out, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "R C H W"], skips: list[Tensor], time: Float[Tensor, "B_t D_time"], context: Float[Tensor, "R L D_context"]
    ) -> Float[Tensor, "R C_out H_out W_out"]:
        """skips: all that are left, this level's at the end of the list, its first block's last."""
        for j, block in enumerate(self.blocks):
            x = block(torch.cat([x, tile_rows(skips[-1 - j], len(x))], dim=1), time)
            if self.transformers:
                x = self.transformers[j](x, context)
        if self.upsample is not None:
            # To the next skip's size, not simply twice as large: an odd size was rounded up on the way down.
            x = self.upsample(F.interpolate(x, size=skips[-1 - len(self.blocks)].shape[-2:], mode="nearest"))
        return x


class Middle(nn.Module):
    """ResBlock, transformer, ResBlock at the lowest resolution."""

    def __init__(self, width: int, heads: int, config: UNetConfig):
        super().__init__()
        self.block_1 = ResBlock(width, width, config.groups, EPS, 4 * config.widths[0])
        self.transformer = SpatialTransformer(width, heads, config.context_width, config.groups)
        self.block_2 = ResBlock(width, width, config.groups, EPS, 4 * config.widths[0])

    def forward(
        self, x: Float[Tensor, "B C H W"], time: Float[Tensor, "B_t D_time"], context: Float[Tensor, "R L D_context"]
    ) -> Float[Tensor, "R C H W"]:
        return self.block_2(self.transformer(self.block_1(x, time), context), time)


class UNet(nn.Module):
    """eps_theta(x_t, t, context) of latent diffusion (Rombach et al. 2022, eq. 3).

    x_t: latents, scaled to unit variance before noise was added; (for the inpainting model 9 channels: x_t, mask, masked picture).
    t: timesteps 0..999, integers or, between them, floats. context: what the text encoder gives.
    Returns the prediction in out_channels channels: eps or v, as the schedule's config says.

    The context may have R rows, a multiple of x_t's B: row r of it is for row r % B of x_t. Guidance asks about the same x_t twice, and all
    that comes before the first cross-attention is then computed once. Raises ValueError where R is no multiple of B.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        widths, last = config.widths, len(config.widths) - 1
        heads = [h if has else None for h, has in zip(config.heads, config.attention)]

        self.time_embedding = TimeEmbedding(widths[0])
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList()
        c, c_skips = widths[0], [widths[0]]
        for i, width in enumerate(widths):
            self.down.append(DownLevel(c, width, heads[i], i == last, config))
            c_skips += [width] * (config.blocks_per_level + (i < last))
            c = width

        self.middle = Middle(c, config.heads[last], config)

        self.up = nn.ModuleList()
        for i, width in reversed(list(enumerate(widths))):
            level_skips = [c_skips.pop() for _ in range(config.blocks_per_level + 1)]
            self.up.append(UpLevel(c, level_skips, width, heads[i], i == 0, config))
            c = width
        self.norm_out = nn.GroupNorm(config.groups, c, eps=EPS)
        self.conv_out = nn.Conv2d(c, config.out_channels, 3, padding=1)

    def forward(
        self, x_t: Float[Tensor, "B C H W"], t: Shaped[Tensor, " B"], context: Float[Tensor, "R L D_context"]
    ) -> Float[Tensor, "R C_out H W"]:
        if len(context) % len(x_t):
            raise ValueError(f"a context of {len(context)} rows for an x_t of {len(x_t)}; expected as many, or a multiple")
        time = self.time_embedding(t)
        x = self.conv_in(x_t)
        skips = [x]
        for level in self.down:
            skips += level(skips[-1], time, context)
        x = self.middle(skips[-1], time, context)
        for level in self.up:
            x = level(x, skips, time, context)
            skips = skips[: -len(level.blocks)]
        return self.conv_out(F.silu(self.norm_out(x)))
