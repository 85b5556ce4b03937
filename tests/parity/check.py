"""The parity check itself: our output against a reference's, and the table of the largest errors for the README."""

import torch
from torch import Tensor

TOLERANCE = {
    # One rounding is 6e-8; a block of a few hundred additions a value gathers 1e-6, and what is left is room for other hardware.
    torch.float32: dict(rtol=1e-4, atol=1e-5),
    # One rounding is 1e-16. So tight that an eps of 1e-6 for 1e-5 anywhere in a whole model shows.
    torch.float64: dict(rtol=1e-10, atol=1e-10),
}


class NotEqual(AssertionError):
    """The outputs differ by more than rounding. A class of its own, so that a test of the check cannot take a crash for success."""


def largest_error(ours: Tensor, theirs: Tensor) -> float:
    """The largest absolute difference. Raises NotEqual where the tolerance of the dtype is exceeded."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, (ours.dtype, theirs.dtype, ours.shape, theirs.shape)
    assert theirs.abs().max() > 0.1, "the reference's output is so small that anything would be near it"
    try:
        torch.testing.assert_close(ours, theirs, **TOLERANCE[ours.dtype])
    except AssertionError as error:
        raise NotEqual(str(error)) from None
    return (ours - theirs).abs().max().item()


def markdown(rows: list[tuple[tuple[str, str, str, float], str]]) -> str:
    """((part, reference, dtype, error), test) for each comparison -> a table with the largest error of each part."""
    worst: dict[tuple[str, str, str], tuple[float, str]] = {}
    for (part, reference, dtype, error), test in rows:
        test = test.split("[")[0]
        worst[part, reference, dtype] = max(worst.get((part, reference, dtype), (-1.0, "")), (error, test))
    lines = ["| part | reference | dtype | largest error | test |", "|---|---|---|---|---|"]
    lines += [f"| {' | '.join(key)} | {error:.1e} | `{test}` |" for key, (error, test) in worst.items()]
    return "\n".join(lines)
