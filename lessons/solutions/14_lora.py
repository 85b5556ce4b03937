"""Answers of lesson 14."""

import torch

from lessons.exercises import Exercise, Misuse, difference
from minidiff.adapters.low_rank import LowRank

# ------------------------------------------------------------------------------------------------------ cut_off


def cut_off(change, r):
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    return v[:r], u[:, :r] * s[:r]


def check_cut_off(function) -> str | None:
    """On a matrix that is not square, by the product: the factors themselves may differ in sign and in where the strengths are."""
    change, r = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), 3
    down, up = _factors(function(change, r), r, change.shape)
    slips = {
        "leaves out the singular values: multiply each column of U by its own, or the terms all count alike": strengths_forgotten,
        "multiplies both factors by the singular values, so that each counts squared": strengths_twice,
        "keeps the last r terms, which are the weakest: they come sorted, the strongest first": weakest,
        "multiplies the rows of V by the wrong singular values: s[:r] belongs to the columns of U, or as s[:r, None] to the rows of V": one_strength_each,
        "keeps one term alone: [:r] takes the first r of them, [r] only the one with this number": one_term,
        "cuts the change itself into rows and columns: the singular value decomposition of it is needed": cut_without_svd,
    }
    mistakes = {}
    for sentence, slip in slips.items():
        other_down, other_up = slip(change, r)
        mistakes[sentence] = other_up @ other_down
    return difference(up @ down, cut_off(change, r)[1] @ cut_off(change, r)[0], mistakes, of="as up @ down")


def _factors(got, r, shape):
    """Down and up of what was returned, or Misuse."""
    if got is None:
        return None, None
    if not (isinstance(got, tuple | list) and len(got) == 2):
        raise Misuse("returns something other than two matrices: `return down, up`")
    down, up = got
    (out, inn), found = shape, tuple(list(factor.shape) for factor in got)
    if found == ([out, r], [r, inn]):
        raise Misuse("returns up before down: down, the rows, comes first")
    if found == ([inn, r], [out, r]):
        raise Misuse("hands back the rows of V as columns: torch.linalg.svd gives V transposed already, its first r rows are v[:r]")
    if found == ([min(out, inn), inn], [out, min(out, inn)]):
        raise Misuse(f"keeps {min(out, inn)} terms, which is all of them: take the first r rows of V and the first r columns of U")
    if up.dim() != 2 or down.dim() != 2 or up.shape[1] != down.shape[0] or (up.shape[0], down.shape[1]) != (out, inn):
        raise Misuse(f"returns shapes {found[0]} and {found[1]}, expected [{r}, {inn}] and [{out}, {r}]: r rows of V, r columns of U")
    return down, up


def strengths_forgotten(change, r):
    u, _, v = torch.linalg.svd(change, full_matrices=False)
    return v[:r], u[:, :r]


def strengths_twice(change, r):
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    return s[:r, None] * v[:r], u[:, :r] * s[:r]


def weakest(change, r):
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    return v[-r:], u[:, -r:] * s[-r:]


def one_strength_each(change, r):
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    return v[:r] * s[0], u[:, :r]


def one_term(change, r):
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    return v[r : r + 1], u[:, r : r + 1] * s[r]


def cut_without_svd(change, r):
    return change[:r], change[:, :r]


def all_terms(change, r):
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    return v, u * s


def up_first(change, r):
    return cut_off(change, r)[::-1]


def transposed(change, r):
    down, up = cut_off(change, r)
    return down.T, up


def product(change, r):
    down, up = cut_off(change, r)
    return up @ down


def rows_of_u(change, r):
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    return v[:r], u[:r] * s


def strengths_of_all(change, r):
    u, s, v = torch.linalg.svd(change, full_matrices=False)
    return v[:r], u[:, :r] * s


def number_cut_off(function) -> str:
    generator = torch.Generator().manual_seed(0)
    change = torch.randn(160, 3, generator=generator) @ torch.randn(3, 160, generator=generator)
    missing = [float((change - up @ down).norm() / change.norm()) for down, up in (function(change, r) for r in (1, 2, 3))]
    return f"a matrix of rank 3, cut off after 1, 2 and 3 terms: {missing[0]:.0%}, {missing[1]:.0%} and {missing[2]:.0%} missing"


# ------------------------------------------------------------------------------------------------------ low_rank


def low_rank(x, down, up, alpha):
    r = down.shape[0]
    return alpha / r * (x @ down.T @ up.T)


def library_low_rank(x, down, up, alpha):
    return LowRank(down, up, alpha)(x).detach()


def check_low_rank(function) -> str | None:
    """Of a layer that is not square, with an alpha that is not the rank."""
    generator = torch.Generator().manual_seed(0)
    x, down, up = (torch.randn(*shape, generator=generator) for shape in ((2, 5, 8), (4, 8), (6, 4)))
    arguments = (x, down, up, 3.0)
    mistakes = {
        "leaves out the scale alpha / r, here 3 / 4: the change is larger than it was trained to be": unscaled,
        "multiplies by alpha, but not by 1 / r: r is the number of rows of down, here 4": scaled_by_alpha,
        "divides by 8, the width of the input: r is the number of rows of down, here 4": divided_by_width,
        "gives shape [2, 5, 4], x after down alone: the r numbers have to go through up to the 6 outputs": without_up,
        "multiplies by r / alpha: the scale is alpha / r": scale_upside_down,
        "scales twice, once for each factor: alpha / r belongs to the product": scaled_twice,
    }
    return difference(function(*arguments), low_rank(*arguments), {sentence: slip(*arguments) for sentence, slip in mistakes.items()})


def unscaled(x, down, up, alpha):
    return x @ down.T @ up.T


def scaled_by_alpha(x, down, up, alpha):
    return alpha * (x @ down.T @ up.T)


def divided_by_width(x, down, up, alpha):
    return alpha / down.shape[1] * (x @ down.T @ up.T)


def without_up(x, down, up, alpha):
    return alpha / down.shape[0] * (x @ down.T)


def scale_upside_down(x, down, up, alpha):
    return down.shape[0] / alpha * (x @ down.T @ up.T)


def scaled_twice(x, down, up, alpha):
    return (alpha / down.shape[0]) ** 2 * (x @ down.T @ up.T)


def not_transposed(x, down, up, alpha):
    return alpha / down.shape[0] * (x @ down @ up)


def up_before_x(x, down, up, alpha):
    return alpha / down.shape[0] * (up @ down @ x)


def shape_for_length(x, down, up, alpha):
    return alpha / down.shape * (x @ down.T @ up.T)


def number_low_rank(function) -> str:
    generator = torch.Generator().manual_seed(0)
    x, down, up = (torch.randn(*shape, generator=generator) for shape in ((3, 160), (4, 160), (160, 4)))
    off = float((function(x, down, up, 4.0) - x @ (up @ down).T).abs().max())
    return f"{4 * (160 + 160):,} multiplications a row in place of {160 * 160:,}, and the same result within {off:.0e}"


# ------------------------------------------------------------------------------------------------------ first_factors


def first_factors(out, inn, r, generator):
    down = torch.randn(r, inn, generator=generator) / r
    return down, torch.zeros(out, r)


def check_first_factors(function) -> str | None:
    out, inn, r = 6, 800, 4
    got = function(out, inn, r, torch.Generator().manual_seed(0))
    if got is None:
        return difference(got, [])
    if not (isinstance(got, tuple | list) and len(got) == 2 and all(isinstance(factor, torch.Tensor) for factor in got)):
        raise Misuse("returns something other than two matrices: `return down, up`")
    down, up = got
    found = list(down.shape), list(up.shape)
    if found == ([out, r], [r, inn]):
        return "returns up before down: down, the rows, comes first"
    if found == ([inn, r], [r, out]):
        return f"gives both matrices transposed: down is [{r}, {inn}] here, which is [r, in], and up [{out}, {r}], which is [out, r]"
    if found != ([r, inn], [out, r]):
        return f"gives shapes {found[0]} and {found[1]}, expected [{r}, {inn}] for down and [{out}, {r}] for up"
    if not up.any() and not down.any():
        return "starts with both at zero: each one's gradient is a product with the other, so neither would ever move"
    if up.any() and not down.any():
        return "starts with down at zero and up random: it trains, but LoRA's authors and every file you meet have it the other way round"
    if up.any():
        return "starts with both random: up @ down is not zero, so the model is changed before the first step"
    if torch.allclose(down, down[:1].expand_as(down)):
        return "starts with all rows of down alike: the r terms would get the same gradients and stay alike, a change of rank one"
    if torch.equal(down, function(out, inn, r, torch.Generator().manual_seed(1))[0]):
        return "does not draw from the generator that it was given: torch.randn(..., generator=generator)"
    if down.min() >= 0:
        return "draws numbers from 0 to 1: torch.rand is uniform and never negative, torch.randn is normal around 0"
    if abs(float(down.std()) * r - r) < 0.2 * r:
        return "does not divide down by r: its numbers should have standard deviation 1 / r"
    return difference(float(down.std()), 1 / r, of="as the standard deviation of down", tolerance=0.1)


def both_zero(out, inn, r, generator):
    return torch.zeros(r, inn), torch.zeros(out, r)


def both_random(out, inn, r, generator):
    return torch.randn(r, inn, generator=generator) / r, torch.randn(out, r, generator=generator)


def down_zero(out, inn, r, generator):
    return torch.zeros(r, inn), torch.randn(out, r, generator=generator)


def rows_alike(out, inn, r, generator):
    return torch.ones(r, inn) / r, torch.zeros(out, r)


def other_way_round(out, inn, r, generator):
    return torch.zeros(out, r), torch.randn(r, inn, generator=generator) / r


def both_transposed(out, inn, r, generator):
    return torch.randn(inn, r, generator=generator) / r, torch.zeros(r, out)


def own_generator(out, inn, r, generator):
    own = torch.Generator().manual_seed(5)
    return torch.randn(r, inn, generator=own) / r, torch.zeros(out, r)


def uniform(out, inn, r, generator):
    return torch.rand(r, inn, generator=generator) / r, torch.zeros(out, r)


def undivided(out, inn, r, generator):
    return torch.randn(r, inn, generator=generator), torch.zeros(out, r)


def one_matrix(out, inn, r, generator):
    return torch.randn(r, inn, generator=generator) / r


def number_first_factors(function) -> str:
    """One step of gradient descent on a regression, by hand: only up moves, and the loss falls."""
    generator = torch.Generator().manual_seed(0)
    x, wanted = torch.randn(64, 8, generator=generator), torch.randn(64, 6, generator=generator)
    down, up = (factor.requires_grad_() for factor in function(6, 8, 4, generator))
    ((x @ down.T @ up.T - wanted) ** 2).mean().backward()
    return f"before the first step up's gradient has norm {float(up.grad.norm()):.2f}, down's {float(down.grad.norm()):.2f}"


EXERCISES = (
    Exercise(
        cut_off,
        check_cut_off,
        wrong=(
            (strengths_forgotten, "leaves out the singular values"),
            (strengths_twice, "each counts squared"),
            (weakest, "keeps the last r"),
            (one_strength_each, "by the wrong singular values"),
            (one_term, "keeps one term alone"),
            (cut_without_svd, "cuts the change itself"),
            (all_terms, "keeps 6 terms"),
            (up_first, "returns up before down"),
            (transposed, "gives V transposed already"),
            (product, "other than two matrices"),
            (strengths_of_all, "two tensors that do not fit"),
        ),
        number=number_cut_off,
    ),
    Exercise(
        low_rank,
        check_low_rank,
        wrong=(
            (unscaled, "leaves out the scale"),
            (scaled_by_alpha, "but not by 1 / r"),
            (divided_by_width, "divides by 8"),
            (without_up, "x after down alone"),
            (scale_upside_down, "by r / alpha"),
            (scaled_twice, "scales twice"),
            (not_transposed, ".T turns a matrix round"),
            (shape_for_length, "have no such operation"),
        ),
        library=library_low_rank,
        number=number_low_rank,
    ),
    Exercise(
        first_factors,
        check_first_factors,
        wrong=(
            (both_zero, "starts with both at zero"),
            (both_random, "starts with both random"),
            (down_zero, "starts with down at zero"),
            (rows_alike, "all rows of down alike"),
            (other_way_round, "returns up before down"),
            (both_transposed, "both matrices transposed"),
            (own_generator, "does not draw from the generator"),
            (uniform, "torch.rand is uniform"),
            (undivided, "does not divide down by r"),
            (one_matrix, "other than two matrices"),
        ),
        number=number_first_factors,
    ),
)
