"""The VAE's decoder in strips of rows: the same picture as `VAE.decode`, in a fraction of its memory.

The decoder is the peak of memory of a large picture. Two things stand in the way of computing it a few rows at a time: a 3x3
convolution looks one row up and down, and a GroupNorm needs the mean and variance of the whole feature map. So each strip is given
one row of its neighbours, and each feature map is walked twice: while its strips are made, its statistics are gathered (Chan,
Golub and LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1); with them known, its strips are used up one by one.

    x     [ strip ][ strip ][ strip ]   norm_1 known; each strip -> norm, SiLU, convolution -> a strip of h, and is dropped
    h     [ strip ][ strip ][ strip ]   norm_2 known; each strip -> norm, SiLU, convolution, + skip -> a strip of the next x

Nothing is approximate, unlike decoding in tiles: what differs is the order of the sums in the statistics. What is held at once is one
feature map while the next grows in its place, or a block's h and the x that is added to it: B H W max(c_in, 2 c_out) values of the
largest level, 256 a pixel in Stable Diffusion, and seven strips at work. (The allocator may not give back all that is freed: at 512 x 512
pixels in float32 a process grows by 400 MB for a bound of 335, decoding whole by 990.) The middle, where attention looks at all cells,
stays whole: it has 1/64 of the pixels. Left out: gradients (whoever wants them wants the activations too), and the encoder.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.blocks import ResBlock
from minidiff.config import VAEConfig
from minidiff.vae import VAE, UpLevel

# On a CPU a strip of 512 x 16 cells, 256 channels each, is 8 MB in float32, about what its cache holds. A GPU wants more work in each
# launch, and has memory to spare for it; its numbers are not measured.
CELLS_OF_A_STRIP = {"cpu": 2**13}
VALUES_WORTH_IT = {"cpu": 2**25}
ON_A_GPU = {"cells": 2**16, "values": 2**28}

Activation = Callable[[Tensor], Tensor]


def should_tile(config: VAEConfig, z: Float[Tensor, "B C h w"]) -> bool:
    """Return whether decoding these latents whole takes much memory: 2^25 values in the largest feature map on a CPU, 2^28 on a GPU.

    Stable Diffusion's decoder has 2^26 at 512 x 512 pixels: 268 MB in float32, and three such maps at once.
    """
    B, _, h, w = z.shape
    return B * h * w * config.factor**2 * max(config.widths[:2]) >= VALUES_WORTH_IT.get(z.device.type, ON_A_GPU["values"])


def decode_tiled(vae: VAE, z: Float[Tensor, "B C h w"], rows: int | None = None) -> Float[Tensor, "B 3 H W"]:
    """Decode as `vae.decode(z)`, within the rounding of z's dtype, `rows` rows of the picture at a time; None is what suits the device.

    Lower resolutions take as many times more rows as they have fewer columns: every strip has the same number of cells. Forward hooks
    of the decoder's layers behind the middle do not run. Raises ValueError for rows < 1.
    """
    if rows is None:
        cells = CELLS_OF_A_STRIP.get(z.device.type, ON_A_GPU["cells"])
        rows = max(1, cells // (z.shape[0] * z.shape[3] * vae.config.factor))
    if rows < 1:
        raise ValueError(f"strips of {rows} rows: give at least 1")
    with torch.no_grad():
        decoder = vae.decoder
        x = iter([decoder.middle(decoder.conv_in(vae.post_quant_conv(z)))])
        for i, level in enumerate(decoder.up):
            assert isinstance(level, UpLevel)
            level_rows = rows * 2 ** (len(decoder.up) - 1 - i)
            x = _split(x, level_rows)
            for block in level.blocks:
                assert isinstance(block, ResBlock)
                x = _res_block(block, x)
            if level.upsample is not None:
                x = _upsampled(_split(x, max(1, level_rows // 4)), level.upsample)  # which makes four cells of one
        x, norm = _with_norm_statistics(x, decoder.norm_out)
        return torch.cat(list(_convolved(_drain(x), norm, decoder.conv_out)), dim=2)


def _split(strips: Iterable[Tensor], rows: int) -> Iterator[Tensor]:
    for strip in strips:
        yield from strip.split(rows, dim=2)


def _drain(strips: deque[Tensor]) -> Iterator[Tensor]:
    """Yield each strip once; it is freed when the next one is asked for."""
    while strips:
        yield strips.popleft()


def _res_block(block: ResBlock, x: Iterable[Tensor]) -> Iterator[Tensor]:
    x, norm_1 = _with_norm_statistics(x, block.norm_1)
    skips = deque()

    def used_up_for_skip() -> Iterator[Tensor]:
        for strip in _drain(x):
            skips.append(block.skip(strip))
            yield strip

    h, norm_2 = _with_norm_statistics(_convolved(used_up_for_skip(), norm_1, block.conv_1), block.norm_2)
    for strip in _convolved(_drain(h), norm_2, block.conv_2):
        yield skips.popleft() + strip


def _with_norm_statistics(strips: Iterable[Tensor], norm: nn.GroupNorm) -> tuple[deque[Tensor], Activation]:
    """Return the strips of a whole feature map, and SiLU of its GroupNorm as a function of some of its rows."""
    kept = deque()
    count, mean, M2 = 0, torch.zeros(()), torch.zeros(())  # of each channel; M2: sum of squared distances from the mean
    for strip in strips:
        kept.append(strip)
        values, n = strip.float(), strip.shape[2] * strip.shape[3]
        strip_mean = values.mean(dim=(2, 3), keepdim=True)
        strip_M2 = (values - strip_mean).square_().sum(dim=(2, 3), keepdim=True)
        count, shift = count + n, strip_mean - mean
        mean = mean + shift * (n / count)
        M2 = M2 + strip_M2 + shift**2 * (n * (count - n) / count)
    # The channels of a group are joined in the same way, each with as many values.
    mean, M2 = (rearrange(s, "B (g c) 1 1 -> B g c", g=norm.num_groups) for s in (mean, M2))
    group_mean = mean.mean(dim=-1, keepdim=True)
    var = (M2 / count + (mean - group_mean) ** 2).mean(dim=-1, keepdim=True)
    group_mean, var = (rearrange(s.expand_as(mean), "B g c -> B (g c) 1 1") for s in (group_mean, var))
    scale = norm.weight.float()[:, None, None] * (var + norm.eps).rsqrt()
    shift = norm.bias.float()[:, None, None] - group_mean * scale

    def silu_of_norm(rows: Tensor) -> Tensor:
        return F.silu(torch.addcmul(shift, rows.float(), scale), inplace=True).to(rows.dtype)

    return kept, silu_of_norm


def _windows(strips: Iterator[Tensor]) -> Iterator[tuple[Tensor, bool, bool]]:
    """Yield each strip with the row above and the row below it; whether it is the first, and the last, which have no such row."""
    above, strip = None, next(strips)
    while strip is not None:
        after = next(strips, None)
        parts = [above, strip, None if after is None else after[:, :, :1]]
        yield torch.cat([part for part in parts if part is not None], dim=2), above is None, after is None
        above, strip = strip[:, :, -1:].clone(), after  # a clone: a view would keep the whole strip


def _convolved(strips: Iterator[Tensor], activation: Activation, conv: nn.Conv2d) -> Iterator[Tensor]:
    for rows, first, last in _windows(strips):
        yield _conv(activation(rows), first, last, conv)


def _upsampled(strips: Iterator[Tensor], conv: nn.Conv2d) -> Iterator[Tensor]:
    for rows, first, last in _windows(strips):
        twice = F.interpolate(rows, scale_factor=2, mode="nearest")
        # A neighbour's row has become two, of which the convolution sees the nearer.
        yield _conv(twice[:, :, 0 if first else 1 : None if last else -1], first, last, conv)


def _conv(rows: Tensor, first: bool, last: bool, conv: nn.Conv2d) -> Tensor:
    """Apply the 3x3 convolution to rows that bring their neighbours with them; beyond the picture it sees zeros."""
    if first or last:
        rows = F.pad(rows, (0, 0, int(first), int(last)))
    return F.conv2d(rows, conv.weight, conv.bias, padding=(0, 1))
