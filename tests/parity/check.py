"""The parity check itself: our output against a reference's, and the table of the largest errors for README.md beside it."""

import torch
from torch import Tensor

TOLERANCE = {
    # One rounding is 6e-8; a block of a few hundred additions a value gathers 1e-6, and what is left is room for other hardware.
    torch.float32: dict(rtol=1e-4, atol=1e-5),
    # One rounding is 1e-16, a whole model gathers 1e-14. So tight that a wrong eps of any one norm of a whole model shows.
    torch.float64: dict(rtol=1e-12, atol=1e-12),
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
    """((part, reference, dtype, error), test) for each comparison -> a table, a line a part, with its largest errors."""
    worst: dict[tuple[str, str, str], dict[str, float]] = {}
    for (part, reference, dtype, error), test in rows:
        errors = worst.setdefault((part, reference, test.split("::")[0]), {})
        errors[dtype] = max(errors.get(dtype, 0.0), error)
    lines = ["| part | reference | largest error, float32 | float64 | test |", "|---|---|---|---|---|"]
    for (part, reference, test), errors in sorted(worst.items()):  # pytest-xdist finishes them in any order
        shown = ["" if dtype not in errors else "0" if errors[dtype] == 0 else f"{errors[dtype]:.1e}" for dtype in ("float32", "float64")]
        lines.append(f"| {part} | {reference} | {shown[0]} | {shown[1]} | `{test}` |")
    return "\n".join(lines)
