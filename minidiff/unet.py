"""The U-Net: given a noisy latent, the timestep and the text, it predicts the noise (or the velocity, see schedule.py).

    x_t -> conv_in -> [level 0] -> [level 1] -> ... -> middle -> ... -> [level 1] -> [level 0] -> conv_out -> prediction
                          \\_________\\____________ skips ____________/_________/

A level is a few ResBlocks at one resolution, each followed by a SpatialTransformer where the level has attention. The way up has one
ResBlock per level more than the way down, and each of them is given one skip by concatenation.

Papers: Ronneberger et al. 2015 (U-Net), Ho et al. 2020 (DDPM), Rombach et al. 2022 (latent diffusion), Podell et al. 2023 (SDXL's
transformer depths and added embedding). Left out: class labels.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from minidiff.blocks import AddedEmbedding, ResBlock, SpatialTransformer, TimeEmbedding, add_rows, norm_silu, tile_rows
from minidiff.conditioning import Conditioning, as_conditioning
from minidiff.config import UNetConfig

EPS = 1e-5  # of every GroupNorm here but the SpatialTransformers'


class DownLevel(nn.Module):
    """The ResBlocks (and transformers) of one resolution on the way down, then half the resolution, except at the last level."""

    def __init__(self, c_in: int, c_out: int, heads: int, depth: int, last: bool, config: UNetConfig):
        super().__init__()
        time_width, n = 4 * config.widths[0], config.blocks_per_level
        self.blocks = nn.ModuleList(ResBlock(c_in if j == 0 else c_out, c_out, config.groups, EPS, time_width) for j in range(n))
        self.transformers = nn.ModuleList(
            SpatialTransformer(c_out, heads, config.context_width, config.groups, depth) for _ in range(n if depth else 0)
        )
        self.downsample = None if last else nn.Conv2d(c_out, c_out, 3, stride=2, padding=1)

    def forward(
        self, x: Float[Tensor, "B C H W"], time: Float[Tensor, "B_t D_time"], context: Float[Tensor, "R L D_context"]
    ) -> list[Tensor]:
        """Return all outputs of the level, each a skip for the way up; the last one goes on down."""
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

    def __init__(self, c_in: int, c_skips: list[int], c_out: int, heads: int, depth: int, last: bool, config: UNetConfig):
        super().__init__()
        time_width = 4 * config.widths[0]
        self.blocks = nn.ModuleList(
            ResBlock((c_in if j == 0 else c_out) + c_skip, c_out, config.groups, EPS, time_width) for j, c_skip in enumerate(c_skips)
        )
        self.transformers = nn.ModuleList(
            SpatialTransformer(c_out, heads, config.context_width, config.groups, depth) for _ in (c_skips if depth else [])
        )
        self.upsample = None if last else nn.Conv2d(c_out, c_out, 3, padding=1)

    def forward(
        self, x: Float[Tensor, "R C H W"], skips: list[Tensor], time: Float[Tensor, "B_t D_time"], context: Float[Tensor, "R L D_context"]
    ) -> Float[Tensor, "R C_out H_out W_out"]:
        """Run the level with a skip concatenated to each block's input, then double the resolution, except at the last level.

        Args:
            x: the output of the level below.
            skips: all that are left, in the order of the way down; block j takes skips[-1 - j], and the list stays as it is.
            time: the vector for every ResBlock.
            context: the text encoder's output.
        """
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

    def __init__(self, width: int, heads: int, depth: int, config: UNetConfig):
        super().__init__()
        self.block_1 = ResBlock(width, width, config.groups, EPS, 4 * config.widths[0])
        self.transformer = SpatialTransformer(width, heads, config.context_width, config.groups, depth)
        self.block_2 = ResBlock(width, width, config.groups, EPS, 4 * config.widths[0])

    def forward(
        self, x: Float[Tensor, "B C H W"], time: Float[Tensor, "B_t D_time"], context: Float[Tensor, "R L D_context"]
    ) -> Float[Tensor, "R C H W"]:
        return self.block_2(self.transformer(self.block_1(x, time), context), time)


class UNetEncoder(nn.Module):
    """The first half: the time embedding, the way down and the middle. A ControlNet is a copy of it (controlnet.py)."""

    def __init__(self, config: UNetConfig):
        super().__init__()
        widths, heads, depths = config.widths, config.heads, config.attention
        last = len(widths) - 1
        self.time_embedding = TimeEmbedding(widths[0])
        self.added_embedding = AddedEmbedding(config.pooled_width, 4 * widths[0]) if config.pooled_width else None
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            DownLevel(widths[max(i - 1, 0)], widths[i], heads[i], depths[i], i == last, config) for i in range(len(widths))
        )
        self.middle = Middle(widths[last], heads[last], max(1, depths[last]), config)

    def encode(
        self,
        x_t: Float[Tensor, "B C H W"],
        t: Shaped[Tensor, " B"],
        context: Float[Tensor, "R L D_context"] | Conditioning,
        hint: Float[Tensor, "B C_in H W"] | None = None,
    ) -> tuple[list[Tensor], Tensor, Tensor]:
        """Go down and through the middle: return the skips, first to last, the middle's output, and the time vector.

        A ControlNet is a copy of this half. Before the first cross-attention skips have B rows, then R.

        Args:
            x_t: noisy latents.
            t: timesteps, 0..T-1.
            context: the text encoder's output, or a Conditioning; its R = B, 2 B, ... rows may be several times those of x_t.
            hint: what a ControlNet adds after conv_in.

        Raises ValueError if the number of rows of context is not a multiple of B.
        """
        conditioning = as_conditioning(context)
        if len(conditioning) % len(x_t):
            raise ValueError(f"a context of {len(conditioning)} rows for an x_t of {len(x_t)}; expected as many, or a multiple")
        time = self._time(t, conditioning)
        x = tile_rows(self.conv_in(x_t), len(time))  # an added embedding makes the rows differ from here on
        if hint is not None:
            x = add_rows(x, hint)
        skips = [x]
        for level in self.down:
            skips += level(skips[-1], time, conditioning.context)
        return skips, self.middle(skips[-1], time, conditioning.context), time

    def _time(self, t: Shaped[Tensor, " B"], conditioning: Conditioning) -> Float[Tensor, "B_t D_time"]:
        """Return the vector for every ResBlock: of the timestep, and of pooled vector and sizes where the config asks for them."""
        if self.added_embedding is None:
            return self.time_embedding(t)
        if conditioning.pooled is None or conditioning.size is None:
            raise ValueError("this U-Net is told a pooled vector and the picture's sizes; give a Conditioning with pooled and size")
        return self.time_embedding(t, self.added_embedding(conditioning.pooled, conditioning.size))


class UNet(UNetEncoder):
    """eps_theta(x_t, t, context) of latent diffusion (Rombach et al. 2022, eq. 3).

    x_t: latents, scaled to unit variance before noise was added; (for the inpainting model 9 channels: x_t, mask, masked picture).
    t: timesteps 0..999, integers or, between them, floats.
    context: what the text encoder gives, or a Conditioning around it, with the pooled vector and size numbers that the config may ask for
        and the residuals that a ControlNet adds.
    Returns the prediction in out_channels channels: eps or v, as the schedule's config says.

    The context may have R rows, a multiple of x_t's B: row r of it is for row r % B of x_t. Guidance asks about the same x_t twice, and all
    that comes before the first cross-attention is then computed once. Raises ValueError where R is no multiple of B.
    """

    def __init__(self, config: UNetConfig):
        super().__init__(config)
        self.config = config
        skips = list(config.skip_widths)
        self.up = nn.ModuleList()
        c = config.widths[-1]
        for i, width in reversed(list(enumerate(config.widths))):
            level_skips = [skips.pop() for _ in range(config.blocks_per_level + 1)]
            self.up.append(UpLevel(c, level_skips, width, config.heads[i], config.attention[i], i == 0, config))
            c = width
        self.norm_out = nn.GroupNorm(config.groups, c, eps=EPS)
        self.conv_out = nn.Conv2d(c, config.out_channels, 3, padding=1)

    def forward(
        self, x_t: Float[Tensor, "B C H W"], t: Shaped[Tensor, " B"], context: Float[Tensor, "R L D_context"] | Conditioning
    ) -> Float[Tensor, "R C_out H W"]:
        conditioning = as_conditioning(context)
        skips, x, time = self.encode(x_t, t, conditioning)
        if residuals := conditioning.residuals:
            if len(residuals) != len(skips) + 1:
                raise ValueError(f"{len(residuals)} residuals for {len(skips)} skips and the middle; give one for each")
            *skips, x = [add_rows(a, b) for a, b in zip([*skips, x], residuals)]
        for level in self.up:
            x = level(x, skips, time, conditioning.context)
            skips = skips[: -self.config.blocks_per_level - 1]
        return self.conv_out(norm_silu(self.norm_out, x))
