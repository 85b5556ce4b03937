"""GroupNorm and SiLU in Triton, before every 3x3 convolution of the U-Net and the VAE, with the channels innermost; and their gradients.

    xhat = (x - mean) rstd       rstd = 1 / sqrt(var + eps)       u = weight xhat + bias       y = u sigmoid(u)

mean and var are those of one picture and one group of channels (Wu and He 2018, "Group normalization"). 32 groups of 2 pictures would be 64
programs, too few for a GPU's 132 multiprocessors, and with the channels innermost a group is no piece of memory but a column of it. So
the H W rows of C channels are cut into strips, and each program has one strip of some neighbouring groups, a chunk:

    1  statistics_kernel   a strip's mean and M2 = sum (x - mean)^2 of each group
    2  normalise_kernel    adds up all strips' statistics, the same few numbers in each program, then writes its strip of y

A sum of squares loses all digits where the mean is large. So M2 is never a difference of two large numbers: within a strip row is added
to row as in Welford 1962, and parts of n_i numbers are joined as in Chan, Golub and LeVeque 1983 ("Algorithms for computing the sample
variance"):

    mean = sum n_i mean_i / n       M2 = sum M2_i + n_i (mean_i - mean)^2

Backward, from dy, with n = H W C / groups and sums over one picture and group:

    du = dy s (1 + u (1 - s)),  s = sigmoid(u)       dbias = sum du       dweight = sum du xhat       (over rows and pictures)
    dx = rstd (weight du - sum(weight du) / n - xhat sum(weight du xhat) / n)

    1  sums_kernel         a strip's sums, of each channel and each group
    2  gradient_kernel     adds up all strips' sums, then writes its strip of dx

Every sum has one order, so results repeat bit by bit. Calculated in float32. Without SiLU, it is the norm of the SpatialTransformer.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from minidiff.kernels import tiles
from minidiff.kernels.tiles import device_of, jit, no_kernel_for, register_operation, tl, triton

MOST_CHANNELS = 256  # in a chunk, unless one group has more: 512 bytes of 16-bit numbers side by side, 16 for each thread of a warp
TILE = 8192  # bytes that a program has at a time: with 4 warps 4 loads of 16 bytes a thread, the widest there are
MOST_STRIPS = 64  # more would be read again by every program of the second stage, where they are to stay few beside its strip
WARPS = 4


@jit
def _load(x, row, HW, c, C: tl.constexpr, CHANNELS: tl.constexpr):
    """Rows of one picture, of the chunk's channels; zero beyond the picture and the chunk."""
    return tl.load(x + row[:, None] * C + c[None, :], mask=(row < HW)[:, None] & (c < CHANNELS)[None, :], other=0.0).to(tl.float32)


@jit
def _store(y, value, row, HW, c, C: tl.constexpr, CHANNELS: tl.constexpr):
    tl.store(y + row[:, None] * C + c[None, :], value.to(y.dtype.element_ty), mask=(row < HW)[:, None] & (c < CHANNELS)[None, :])


@jit
def _members(c, GROUPS: tl.constexpr, PER_GROUP: tl.constexpr):
    """Say which channel is in which group, as [groups, channels] of a chunk.

    A group's width need not be a power of two, so it is no axis.
    """
    return tl.arange(0, GROUPS)[:, None] == (c // PER_GROUP)[None, :]


@jit
def _to_channels(of_group, members):
    """Each channel's number from its group's."""
    return tl.sum(tl.where(members, of_group[:, None], 0.0), 0)


@jit
def _to_groups(of_channel, members):
    """Each group's sum over its channels."""
    return tl.sum(tl.where(members, of_channel[None, :], 0.0), 1)


@jit
def _of_channels(pointer, c, CHANNELS: tl.constexpr):
    return tl.load(pointer + c, mask=c < CHANNELS, other=0.0).to(tl.float32)


@jit
def _place(C: tl.constexpr, GROUPS: tl.constexpr, PER_GROUP: tl.constexpr):
    """Return this program's strip, first group, first channel and picture, and the groups of a picture.

    The grid is (strips, chunks, batch).
    """
    chunk = tl.program_id(1)
    return tl.program_id(0), chunk * GROUPS, chunk * (GROUPS * PER_GROUP), tl.program_id(2).to(tl.int64), C // PER_GROUP


@jit
def statistics_kernel(
    x,
    means,
    M2s,
    HW,
    TILES,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """means, M2s: [batch, strips, groups]. A strip has TILES tiles of ROWS rows; a chunk has GROUPS groups of PER_GROUP channels."""
    strip, first_group, first_c, batch, groups = _place(C, GROUPS, PER_GROUP)
    x += batch * HW * C + first_c
    c = tl.arange(0, BLOCK_C)

    # Each place in the tile has a count, mean and M2 of its own of the rows that come by.
    n = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, BLOCK_C], tl.float32)
    M2 = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for tile in range(TILES):
        row = (strip * TILES + tile) * ROWS + tl.arange(0, ROWS)
        n += tl.where(row < HW, 1.0, 0.0)
        share = (1 / tl.maximum(n, 1.0))[:, None]
        delta = tl.where((row < HW)[:, None], _load(x, row, HW, c, C, GROUPS * PER_GROUP) - mean, 0.0)
        mean += delta * share
        M2 += delta * delta * (1 - share)

    # Places of one column are joined, then the columns of one group.
    rows = tl.sum(n, 0)
    mean_c = tl.sum(n[:, None] * mean, 0) / rows
    shift = mean - mean_c[None, :]
    M2_c = tl.sum(M2 + n[:, None] * shift * shift, 0)
    members = _members(c, GROUPS, PER_GROUP)
    mean_g = _to_groups(mean_c, members) / PER_GROUP
    shift_c = mean_c - _to_channels(mean_g, members)
    M2_g = _to_groups(M2_c + rows * shift_c * shift_c, members)

    here = (batch * tl.num_programs(0) + strip) * groups + first_group + tl.arange(0, GROUPS)
    tl.store(means + here, mean_g)
    tl.store(M2s + here, M2_g)


@jit
def normalise_kernel(
    x,
    means,
    M2s,
    weight,
    bias,
    y,
    mean_out,
    rstd_out,
    HW,
    TILES,
    eps,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    STRIPS: tl.constexpr,
    SILU: tl.constexpr,
):
    """mean_out, rstd_out: [batch, groups], for the gradients. STRIPS: a power of two, as many as there are or more."""
    strip, first_group, first_c, batch, groups = _place(C, GROUPS, PER_GROUP)
    g, s = tl.arange(0, GROUPS), tl.arange(0, STRIPS)

    here = (batch * tl.num_programs(0) + s[:, None]) * groups + first_group + g[None, :]
    n = tl.minimum(tl.maximum(HW - s * (TILES * ROWS), 0), TILES * ROWS).to(tl.float32)[:, None]  # rows of each strip
    mean_s = tl.load(means + here, mask=n > 0, other=0.0)
    mean_g = tl.sum(n * mean_s, 0) / HW
    shift = mean_s - mean_g[None, :]
    M2 = tl.sum(tl.load(M2s + here, mask=n > 0, other=0.0) + n * PER_GROUP * shift * shift, 0)
    rstd_g = 1 / tl.sqrt(M2 / (HW * PER_GROUP) + eps)
    if strip == 0:
        tl.store(mean_out + batch * groups + first_group + g, mean_g)
        tl.store(rstd_out + batch * groups + first_group + g, rstd_g)

    c = tl.arange(0, BLOCK_C)
    members = _members(c, GROUPS, PER_GROUP)
    mean_c = _to_channels(mean_g, members)[None, :]
    scale = (_to_channels(rstd_g, members) * _of_channels(weight + first_c, c, GROUPS * PER_GROUP))[None, :]
    bias_c = _of_channels(bias + first_c, c, GROUPS * PER_GROUP)[None, :]
    x += batch * HW * C + first_c
    y += batch * HW * C + first_c
    for tile in range(TILES):
        row = (strip * TILES + tile) * ROWS + tl.arange(0, ROWS)
        u = (_load(x, row, HW, c, C, GROUPS * PER_GROUP) - mean_c) * scale + bias_c
        _store(y, u / (1 + tl.exp(-u)) if SILU else u, row, HW, c, C, GROUPS * PER_GROUP)


@jit
def _through_silu(dy, u, SILU: tl.constexpr):
    """du from dy."""
    du = dy
    if SILU:
        s = 1 / (1 + tl.exp(-u))
        du = dy * s * (1 + u * (1 - s))
    return du


@jit
def sums_kernel(
    dy,
    x,
    mean,
    rstd,
    weight,
    bias,
    group_sums,
    channel_sums,
    HW,
    TILES,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    SILU: tl.constexpr,
    NEED_AFFINE: tl.constexpr,
):
    """group_sums [2, batch, strips, groups]: of weight du, and weight du xhat. channel_sums [2, batch, strips, C]: of du, and du xhat."""
    strip, first_group, first_c, batch, groups = _place(C, GROUPS, PER_GROUP)
    g, c = tl.arange(0, GROUPS), tl.arange(0, BLOCK_C)
    members = _members(c, GROUPS, PER_GROUP)
    mean_c = _to_channels(tl.load(mean + batch * groups + first_group + g), members)[None, :]
    rstd_c = _to_channels(tl.load(rstd + batch * groups + first_group + g), members)[None, :]
    weight_c = _of_channels(weight + first_c, c, GROUPS * PER_GROUP)
    bias_c = _of_channels(bias + first_c, c, GROUPS * PER_GROUP)
    x += batch * HW * C + first_c
    dy += batch * HW * C + first_c

    sum_du = tl.zeros([ROWS, BLOCK_C], tl.float32)
    sum_du_xhat = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for tile in range(TILES):
        row = (strip * TILES + tile) * ROWS + tl.arange(0, ROWS)
        x_i, dy_i = _load(x, row, HW, c, C, GROUPS * PER_GROUP), _load(dy, row, HW, c, C, GROUPS * PER_GROUP)
        xhat = (x_i - mean_c) * rstd_c
        du = _through_silu(dy_i, weight_c[None, :] * xhat + bias_c[None, :], SILU)  # 0 beyond the picture, as dy is
        sum_du += du
        sum_du_xhat += du * xhat

    du_c, du_xhat_c = tl.sum(sum_du, 0), tl.sum(sum_du_xhat, 0)
    strips = batch * tl.num_programs(0) + strip
    second = tl.num_programs(2).to(tl.int64) * tl.num_programs(0)
    if NEED_AFFINE:
        here = channel_sums + strips * C + first_c + c
        tl.store(here, du_c, mask=c < GROUPS * PER_GROUP)
        tl.store(here + second * C, du_xhat_c, mask=c < GROUPS * PER_GROUP)
    here = group_sums + strips * groups + first_group + g
    tl.store(here, _to_groups(weight_c * du_c, members))
    tl.store(here + second * groups, _to_groups(weight_c * du_xhat_c, members))


@jit
def gradient_kernel(
    dy,
    x,
    mean,
    rstd,
    weight,
    bias,
    group_sums,
    dx,
    HW,
    TILES,
    C: tl.constexpr,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
    STRIPS: tl.constexpr,
    SILU: tl.constexpr,
):
    strip, first_group, first_c, batch, groups = _place(C, GROUPS, PER_GROUP)
    g, s, c = tl.arange(0, GROUPS), tl.arange(0, STRIPS)[:, None], tl.arange(0, BLOCK_C)

    here = group_sums + (batch * tl.num_programs(0) + s) * groups + first_group + g[None, :]
    second = tl.num_programs(2).to(tl.int64) * tl.num_programs(0) * groups
    mean_du = tl.sum(tl.load(here, mask=s < tl.num_programs(0), other=0.0), 0) / (HW * PER_GROUP)
    mean_du_xhat = tl.sum(tl.load(here + second, mask=s < tl.num_programs(0), other=0.0), 0) / (HW * PER_GROUP)

    members = _members(c, GROUPS, PER_GROUP)
    mean_du, mean_du_xhat = _to_channels(mean_du, members)[None, :], _to_channels(mean_du_xhat, members)[None, :]
    mean_c = _to_channels(tl.load(mean + batch * groups + first_group + g), members)[None, :]
    rstd_c = _to_channels(tl.load(rstd + batch * groups + first_group + g), members)[None, :]
    weight_c = _of_channels(weight + first_c, c, GROUPS * PER_GROUP)[None, :]
    bias_c = _of_channels(bias + first_c, c, GROUPS * PER_GROUP)[None, :]
    x += batch * HW * C + first_c
    dy += batch * HW * C + first_c
    dx += batch * HW * C + first_c
    for tile in range(TILES):
        row = (strip * TILES + tile) * ROWS + tl.arange(0, ROWS)
        x_i, dy_i = _load(x, row, HW, c, C, GROUPS * PER_GROUP), _load(dy, row, HW, c, C, GROUPS * PER_GROUP)
        xhat = (x_i - mean_c) * rstd_c
        du = _through_silu(dy_i, weight_c * xhat + bias_c, SILU)
        _store(dx, rstd_c * (weight_c * du - mean_du - xhat * mean_du_xhat), row, HW, c, C, GROUPS * PER_GROUP)


def fused_group_norm_silu(
    x: Float[Tensor, "B C H W"], groups: int, weight: Float[Tensor, " C"], bias: Float[Tensor, " C"], eps: float, silu: bool = True
) -> Float[Tensor, "B C H W"]:
    """Compute SiLU(GroupNorm(x)), or without `silu` GroupNorm(x), in one kernel.

    The same inputs give the same bits, forward and backward.

    Args:
        x: channels-last, as the answer is; float16, bfloat16 or float32.
        groups: of channels; divides C.
        weight, bias: of the GroupNorm, one number per channel, on x's device.
        eps: added to the variance.
        silu: apply SiLU.

    Raises ValueError for what `unsupported` names.
    """
    if reason := unsupported(x, groups, weight, bias):
        raise ValueError(f"fused GroupNorm and SiLU: {reason}")
    return run_group_norm_silu(x, groups, weight, bias, eps, silu)


def run_group_norm_silu(
    x: Float[Tensor, "B C H W"], groups: int, weight: Float[Tensor, " C"], bias: Float[Tensor, " C"], eps: float, silu: bool = True
) -> Float[Tensor, "B C H W"]:
    """Compute `fused_group_norm_silu` of tensors that `unsupported` was asked about, without asking again.

    Args:
        x, groups, weight, bias, eps, silu: as in `fused_group_norm_silu`.
    """
    return _GroupNormSiLU.apply(x, groups, weight, bias, eps, silu)


def unsupported(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None) -> str | None:
    """Return why `fused_group_norm_silu` does not take these tensors, as the end of a sentence; None if it does.

    Args:
        x, groups, weight, bias: as in `fused_group_norm_silu`, but of any shape, layout, dtype and device; None is refused.
    """
    if reason := no_kernel_for(x):
        return reason
    if x.ndim != 4 or x.numel() == 0 or groups < 1 or x.shape[1] % groups:
        return f"shape {tuple(x.shape)} in {groups} groups; the kernel takes [B, C, H, W] with C a multiple of the groups"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return f"strides {x.stride()}; the kernel takes channels-last tensors"
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is None or parameter.shape != (x.shape[1],) or not parameter.is_contiguous() or parameter.device != x.device:
            return f"the {name}; the kernel takes {x.shape[1]} numbers, side by side, on {x.device}"
    if x.shape[1] // groups > 2048:
        return f"{x.shape[1] // groups} channels in a group; the kernel takes 2048 at most"
    if x[0].numel() >= 2**31 or len(x) > 65535:
        return "2^31 elements in a picture, or more than 65535 pictures; the kernel counts in 32 bits, and its grid ends there"
    return None


def _division(x: Tensor, groups: int) -> tuple[tuple[int, int, int], int, dict[str, int]]:
    """Return the grid (strips, chunks, batch), the power of two that holds the strips, and the arguments by name that all kernels take."""
    C, HW = x.shape[1], x.shape[2] * x.shape[3]
    per_group = C // groups
    in_chunk = 1
    while groups % (2 * in_chunk) == 0 and 2 * in_chunk * per_group <= MOST_CHANNELS:
        in_chunk *= 2
    block = triton.next_power_of_2(in_chunk * per_group)
    rows = max(1, TILE // (block * x.dtype.itemsize))
    tiles = triton.cdiv(HW, rows * MOST_STRIPS)
    strips = triton.cdiv(HW, rows * tiles)
    constants = dict(HW=HW, TILES=tiles, C=C, GROUPS=in_chunk, PER_GROUP=per_group, BLOCK_C=block, ROWS=rows, num_warps=WARPS)
    return (strips, groups // in_chunk, len(x)), triton.next_power_of_2(strips), constants


def _forward(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    """y; mean and rstd [B, groups]."""
    y, mean, rstd = _forward_shapes(x, groups, weight, bias, eps, silu)
    grid, power, constants = _division(x, groups)
    means, M2s = x.new_empty((2, len(x), grid[0], groups), dtype=torch.float32)
    with device_of(x):
        statistics_kernel[grid](x, means, M2s, **constants)
        normalise_kernel[grid](x, means, M2s, weight, bias, y, mean, rstd, eps=eps, STRIPS=power, SILU=silu, **constants)
    return y, mean, rstd


def _forward_shapes(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), mean, rstd


def _backward(
    dy: Tensor, x: Tensor, groups: int, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool, need_affine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, dweight and dbias; the last two empty where they are not needed."""
    dy, dx = dy.contiguous(memory_format=torch.channels_last), torch.empty_like(x)
    grid, power, constants = _division(x, groups)
    group_sums = x.new_empty((2, len(x), grid[0], groups), dtype=torch.float32)
    channel_sums = x.new_empty((2, len(x), grid[0], x.shape[1]) if need_affine else 0, dtype=torch.float32)
    with device_of(x):
        saved = (dy, x, mean, rstd, weight, bias, group_sums)
        # For 12.0 the sums of a strip take a few more registers than threads of 4 warps have.
        warps = 2 * WARPS if tiles.capability_of(x) >= (12, 0) else WARPS
        sums_kernel[grid](*saved, channel_sums, SILU=silu, NEED_AFFINE=need_affine, **constants | {"num_warps": warps})
        gradient_kernel[grid](*saved, dx, STRIPS=power, SILU=silu, **constants)
    if not need_affine:
        return dx, weight.new_empty(0), bias.new_empty(0)
    dbias, dweight = (sums.sum(dim=(0, 1)) for sums in channel_sums)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)


def _backward_shapes(
    dy: Tensor, x: Tensor, groups: int, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, silu: bool, need_affine: bool
) -> tuple[Tensor, Tensor, Tensor]:
    shape = weight.shape if need_affine else 0
    return torch.empty_like(x), weight.new_empty(shape), bias.new_empty(shape)


class _GroupNormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool) -> Tensor:
        y, mean, rstd = torch.ops.minidiff.group_norm_silu(x, groups, weight, bias, eps, silu)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.groups, ctx.silu = groups, silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        _, _, need_weight, need_bias, _, _ = ctx.needs_input_grad
        need_affine = need_weight or need_bias
        dx, dweight, dbias = torch.ops.minidiff.group_norm_silu_backward(dy, x, ctx.groups, weight, bias, mean, rstd, ctx.silu, need_affine)
        return dx, None, dweight if need_weight else None, dbias if need_bias else None, None, None


register_operation("group_norm_silu", _forward, _backward, shapes=_forward_shapes, backward_shapes=_backward_shapes)
