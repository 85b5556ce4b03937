"""Measure how far training moved a model's weights, by kind of layer (Kumari et al. 2023, section 3.2 and figure 3).

change of a layer = |W' - W| / |W|,  Frobenius norms
"""

from collections.abc import Mapping

from torch import Tensor

KINDS = ("cross-attention", "self-attention", "other")


def kind_of(name: str) -> str:
    """Return the kind of the layer that a parameter of the U-Net belongs to."""
    return next((kind for kind in KINDS[:2] if f"{kind.replace('-', '_')}." in name), "other")


def layer_changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Return |W' - W| / |W| of each matrix and convolution. Raises ValueError for different names or shapes."""
    if different := sorted(before.keys() ^ after.keys()) or [name for name in before if before[name].shape != after[name].shape]:
        raise ValueError(f"two models of other layers, such as {different[0]!r}; their changes have no meaning")
    # A weight of zeros has no relative change: the file's own, such as an untrained adapter, are left out.
    return {
        name: float((after[name].double() - before[name].double()).norm() / before[name].double().norm())
        for name, W in before.items()
        if W.ndim >= 2 and W.any()
    }


def relative_changes(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """Return the mean change of the layers of each kind that the model has."""
    changes = layer_changes(before, after)
    by_kind = {kind: [change for name, change in changes.items() if kind_of(name) == kind] for kind in KINDS}
    return {kind: sum(values) / len(values) for kind, values in by_kind.items() if values}
