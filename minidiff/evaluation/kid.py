"""KID: how far a set of pictures is from another, through their features.

    mmd^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y),   k(x, y) = (x . y / D + 1)^3

Binkowski et al. 2018, "Demystifying MMD GANs", section 4: the squared maximum mean discrepancy with a cubic kernel. The estimate is
unbiased at any number of pictures (FID is not), so it may fall a little below 0 where the sets are alike. The original averages over
random subsets, because the whole sums were too large; here they are not, and the whole sets are used.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Float64
from torch import Tensor


@dataclass(frozen=True)
class KID:
    """The estimate and its standard error."""

    value: float
    error: float


def kernel(x: Float[Tensor, "M D"], y: Float[Tensor, "N D"]) -> Float64[Tensor, "M N"]:
    """(x . y / D + 1)^3 of every pair, in float64: the discrepancy is a small difference of large sums."""
    return (x.double() @ y.double().T / x.shape[1] + 1) ** 3


def kid(x: Float[Tensor, "M D"], y: Float[Tensor, "N D_y"], blocks: int = 20) -> KID:
    """KID between the features of two sets of pictures (Binkowski et al. 2018, eq. 4 of the supplement, with all pairs).

    The standard error is the jackknife's over `blocks`: block i is every `blocks`-th row of both sets, from the i-th on; what leaving out one
    block after the other does to the estimate says how much another draw would change it. Where the rows of both sets belong to the same
    list of prompts, keep them in the same order: the blocks then hold the same prompts.

    Raises ValueError for sets of other widths, too few rows for the blocks, or features that are not finite.
    """
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of width {x.shape[1]} and {y.shape[1]}; both sets need the same encoder")
    if blocks < 2 or min(len(x), len(y)) < 2 * blocks:
        raise ValueError(f"{len(x)} and {len(y)} pictures in {blocks} blocks; give 2 blocks or more, and two pictures a block or more")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("features that are not finite have no distance; look for black or broken pictures")
    # Sums over pairs of blocks are all that any of the estimates needs.
    block_x, block_y = (torch.arange(len(rows), device=rows.device) % blocks for rows in (x, y))
    k_xx, k_yy = kernel(x, x).fill_diagonal_(0), kernel(y, y).fill_diagonal_(0)
    xx, yy = block_sums(k_xx, block_x, block_x, blocks), block_sums(k_yy, block_y, block_y, blocks)
    xy = block_sums(kernel(x, y), block_x, block_y, blocks)
    m, n = block_x.bincount(minlength=blocks), block_y.bincount(minlength=blocks)

    def estimate(kept: Tensor) -> float:
        count_x, count_y = m[kept].sum().item(), n[kept].sum().item()
        sum_xx, sum_yy, sum_xy = (sums[kept][:, kept].sum().item() for sums in (xx, yy, xy))
        return sum_xx / (count_x * (count_x - 1)) + sum_yy / (count_y * (count_y - 1)) - 2 * sum_xy / (count_x * count_y)

    every = torch.arange(blocks, device=x.device)
    without = torch.tensor([estimate(every != i) for i in range(blocks)], dtype=torch.float64)
    error = math.sqrt((blocks - 1) / blocks * (without - without.mean()).square().sum().item())
    return KID(estimate(every >= 0), error)


def block_sums(
    pairs: Float64[Tensor, "M N"], rows: Tensor, columns: Tensor, blocks: int
) -> Float64[Tensor, "{blocks} {blocks}"]:
    """Sums of a matrix over pairs of blocks; rows and columns say which block each row and column is in."""
    by_row = torch.zeros(blocks, pairs.shape[1], dtype=pairs.dtype, device=pairs.device).index_add(0, rows, pairs)
    return torch.zeros(blocks, blocks, dtype=pairs.dtype, device=pairs.device).index_add(1, columns, by_row)
