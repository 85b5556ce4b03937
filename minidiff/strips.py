"""The VAE's decoder in strips of rows: the same picture as `VAE.decode`, in a fraction of its memory.

The decoder is the peak of memory of a large picture. Two things stand in the way of computing it a few rows at a time: a 3x3
convolution looks one row up and down, and a GroupNorm needs the mean and variance of the whole feature map. So each strip is given
one row of its neighbours, and each feature map is walked twice: while its strips are made, its statistics are gathered (Chan,
Golub and LeVeque 1983, "Algorithms for computing the sample variance", eq. 2.1); with them known, its strips are used up one by one.

    x     [ strip ][ strip ][ strip ]   norm_1 known; each strip -> norm, SiLU, convolution -> a strip of h, and is dropped
    h     [ strip ][ strip ][ strip ]   norm_2 known; each strip -> norm, SiLU, convolution, + skip -> a strip of the next x

Nothing is approximate, unlike decoding in tiles: what differs is the order of the sums in the statistics. What is held at once is one
feature map as long as the next grows in its place, or a block's h and the x that is added to it: B H W max(c_in, 2 c_out) values of
the largest level, 256 a pixel in Stable Diffusion, and a few strips at work. The middle, where attention looks at all cells, stays whole: it
has 1/64 of the pixels. Left out: gradients (whoever wants them wants the activations too), and the encoder.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from minidiff.blocks import ResBlock
from minidiff.config import VAEConfig
from minidiff.vae import VAE

ROWS = 16  # of a strip of the picture; at 512 pixels of 256 channels a strip has 2^21 values, 8 MB in float32
Activation = Callable[[Tensor], Tensor]


def worth_strips(config: VAEConfig, height: int, width: int) -> bool:
    """Whether decoding a picture of this size whole would take much more memory: from 2^25 values in the largest feature map on.

    Stable Diffusion's decoder has those from 512 x 256 pixels on, 134 MB in float32 and a few such maps at once.
    """
    return height * width * max(config.widths[:2]) >= 2**25


def decode_in_strips(vae: VAE, z: Float[Tensor, "B C h w"], rows: int = ROWS) -> Float[Tensor, "B 3 H W"]:
    """What `vae.decode(z)` returns, within the rounding of z's dtype, `rows` rows of the picture at a time.

    Lower resolutions take as many times more rows as they have fewer columns: every strip has the same number of cells. Forward hooks
    of the decoder's layers behind the middle do not run. Raises ValueError for rows < 1.
    """
    if rows < 1:
        raise ValueError(f"strips of {rows} rows: give at least 1")
    with torch.no_grad():
        decoder = vae.decoder
        x = iter([decoder.middle(decoder.conv_in(vae.post_quant_conv(z)))])
        for i, level in enumerate(decoder.up):
            level_rows = rows * 2 ** (len(decoder.up) - 1 - i)
            x = _split(x, level_rows)
            for block in level.blocks:
                x = _res_block(block, x)
            if level.upsample is not None:
                x = _upsampled(_split(x, max(1, level_rows // 4)), level.upsample)  # which makes four cells of one
        x, norm = _gathered(x, decoder.norm_out)
        return torch.cat(list(_convolved(_used_up(x), norm, decoder.conv_out)), dim=2)


def _split(strips: Iterable[Tensor], rows: int) -> Iterator[Tensor]:
    for strip in strips:
        yield from strip.split(rows, dim=2)


def _used_up(strips: deque[Tensor]) -> Iterator[Tensor]:
    """Each strip once; it is freed when the next one is asked for."""
    while strips:
        yield strips.popleft()


def _res_block(block: ResBlock, x: Iterable[Tensor]) -> Iterator[Tensor]:
    x, norm_1 = _gathered(x, block.norm_1)
    skips = deque()

    def used_up_for_skip() -> Iterator[Tensor]:
        for strip in _used_up(x):
            skips.append(block.skip(strip))
            yield strip

    h, norm_2 = _gathered(_convolved(used_up_for_skip(), norm_1, block.conv_1), block.norm_2)
    for strip in _convolved(_used_up(h), norm_2, block.conv_2):
        yield skips.popleft() + strip


def _gathered(strips: Iterable[Tensor], norm: nn.GroupNorm) -> tuple[deque[Tensor], Activation]:
    """The strips of a whole feature map, and SiLU of its GroupNorm as a function of some of its rows."""
    kept = deque()
    count, mean, M2 = 0, 0.0, 0.0  # M2: sum of squared distances from the mean; one of each a picture and group
    for strip in strips:
        kept.append(strip)
        values = strip.float().unflatten(1, (norm.num_groups, -1))  # B g c H W
        n = values[0, 0].numel()
        strip_var, strip_mean = torch.var_mean(values, dim=(2, 3, 4), correction=0)
        shift, count = strip_mean - mean, count + n
        mean = mean + shift * (n / count)
        M2 = M2 + strip_var * n + shift**2 * (n * (count - n) / count)
    per_group = norm.num_channels // norm.num_groups
    mean, rstd = (s.repeat_interleave(per_group, dim=1)[..., None, None] for s in (mean, (M2 / count + norm.eps).rsqrt()))
    scale = norm.weight.float()[:, None, None] * rstd
    shift = norm.bias.float()[:, None, None] - mean * scale

    def silu_of_norm(rows: Tensor) -> Tensor:
        return F.silu(torch.addcmul(shift, rows.float(), scale), inplace=True).to(rows.dtype)

    return kept, silu_of_norm


def _windows(strips: Iterator[Tensor]) -> Iterator[tuple[Tensor, bool, bool]]:
    """Each strip with the row above and the row below it; whether it is the first, and the last, which have no such row."""
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
    """The 3x3 convolution of rows that bring their neighbours with them; beyond the picture it sees zeros."""
    if first or last:
        rows = F.pad(rows, (0, 0, int(first), int(last)))
    return F.conv2d(rows, conv.weight, conv.bias, padding=(0, 1))
