"""KID: the distance between two sets of pictures, through their features.

    mmd^2 = mean k(x, x') + mean k(y, y') - 2 mean k(x, y),   k(x, y) = (x . y / D + 1)^3

Binkowski et al. 2018, "Demystifying MMD GANs", section 4: the squared maximum mean discrepancy with a cubic kernel. The estimate is
unbiased at any number of pictures (FID is not), so it may fall a little below 0 where the sets are alike. The original averages over
random subsets, because the whole sums were too large; here they are not, and the whole sets are used.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64, Int
from torch import Tensor


@dataclass(frozen=True)
class KID:
    """The estimate and its standard error."""

    value: float
    error: float


def scale_features(x: Float[Tensor, "B D"]) -> Float[Tensor, "B D"]:
    """Scale each row to length sqrt(D), so that a mean product over D is a cosine."""
    return F.normalize(x, dim=1) * math.sqrt(x.shape[1])


def kernel(x: Float[Tensor, "M D"], y: Float[Tensor, "N D"]) -> Float64[Tensor, "M N"]:
    """Return (x . y / D + 1)^3 of every pair, in float64: the discrepancy is a small difference of large sums."""
    return (x.double() @ y.double().T / x.shape[1] + 1) ** 3


def kid(
    x: Float[Tensor, "M D"],
    y: Float[Tensor, "N D_y"],
    *,
    groups: tuple[Int[Tensor, " M"], Int[Tensor, " N"]] | None = None,
    blocks: int = 20,
) -> KID:
    """Estimate KID between the features of two sets of pictures (Binkowski et al. 2018, eq. 4 of the supplement, with all pairs).

    The standard error is the jackknife's over blocks of groups (group g is in block g % blocks): how much the estimate changes when each
    block in turn is left out shows how much another sample would change it.

    Raises ValueError for sets of different widths, fewer than two groups per block, or features that are not finite.

    Args:
        x: Features of one set.
        y: Features of the other.
        groups: The prompt of each row of x and of y, as a number from 0. Pictures of one prompt are similar, also across the sets, so two
            sets of the same prompts would seem closer than they are: pairs within a group are left out. By default every row is a group.
        blocks: Of the jackknife.
    """
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"features of width {x.shape[1]} and {y.shape[1]}; both sets need the same encoder")
    if not (x.isfinite().all() and y.isfinite().all()):
        raise ValueError("features that are not finite have no distance; look for black or broken pictures")
    # By default no row has anything in common with another; blocks * len(x) leaves row i of either set in block i % blocks.
    alone = torch.arange(len(x), device=x.device), blocks * len(x) + torch.arange(len(y), device=x.device)
    group_x, group_y = groups or alone
    if blocks < 2 or min(len(group_x.unique()), len(group_y.unique())) < 2 * blocks:
        raise ValueError(
            f"{len(group_x.unique())} and {len(group_y.unique())} pictures (or groups of them) in {blocks} blocks; "
            "give 2 blocks or more, and two pictures a block or more"
        )

    def sums(a: Tensor, b: Tensor, group_a: Tensor, group_b: Tensor) -> Tensor:
        """Sum the kernel, and count pairs, for each pair of blocks."""
        counted = (group_a[:, None] != group_b).double()
        return torch.stack([block_sums(values, group_a % blocks, group_b % blocks, blocks) for values in (kernel(a, b) * counted, counted)])

    xx, yy, xy = sums(x, x, group_x, group_x), sums(y, y, group_y, group_y), sums(x, y, group_x, group_y)

    def estimate(kept: Tensor) -> float:
        total = (pairs[:, kept][:, :, kept].sum(dim=(1, 2)) for pairs in (xx, yy, xy))
        within_x, within_y, across = ((sum_of_kernel / count).item() for sum_of_kernel, count in total)
        return within_x + within_y - 2 * across

    every = torch.arange(blocks, device=x.device)
    without = torch.tensor([estimate(every != i) for i in range(blocks)], dtype=torch.float64)
    error = math.sqrt((blocks - 1) / blocks * (without - without.mean()).square().sum().item())
    return KID(estimate(every >= 0), error)


def block_sums(pairs: Float64[Tensor, "M N"], rows: Tensor, columns: Tensor, blocks: int) -> Float64[Tensor, "{blocks} {blocks}"]:
    """Sum a matrix over pairs of blocks.

    Args:
        pairs: One number per pair of a row and a column.
        rows: The block of each row, 0..blocks-1, (M,).
        columns: The block of each column, (N,).
        blocks: How many there are.
    """
    by_row = torch.zeros(blocks, pairs.shape[1], dtype=pairs.dtype, device=pairs.device).index_add(0, rows, pairs)
    return torch.zeros(blocks, blocks, dtype=pairs.dtype, device=pairs.device).index_add(1, columns, by_row)
