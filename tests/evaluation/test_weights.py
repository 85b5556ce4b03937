"""The change of weights by kind of layer."""

import pytest
import torch

from minidiff.evaluation.weights import kind_of, layer_changes, relative_changes
from tests.small_models import small_model


def parameters(change=lambda name, p: p):
    return {name: change(name, p.detach().clone()) for name, p in small_model().unet.named_parameters()}


def test_each_kind_has_the_change_that_was_made():
    factors = {"cross-attention": 1.5, "self-attention": 0.75, "other": 1.125}  # exact in binary
    changes = relative_changes(parameters(), parameters(lambda name, p: p * factors[kind_of(name)]))
    # float64 norms of float32 numbers: far below 1e-6
    assert changes == pytest.approx({kind: abs(factor - 1) for kind, factor in factors.items()}, rel=1e-6)


def test_nothing_moved_is_zero_and_biases_do_not_count():
    same = parameters()
    assert set(relative_changes(same, parameters(lambda name, p: p + 1 if p.ndim < 2 else p)).values()) == {0.0}
    assert not any(name.endswith("bias") for name in layer_changes(same, same))


def test_a_weight_of_zeros_has_no_relative_change():
    zeros = {"a": torch.zeros(2, 2), "b": torch.ones(2, 2)}
    assert layer_changes(zeros, {"a": torch.ones(2, 2), "b": 2 * torch.ones(2, 2)}) == {"b": 1.0}


def test_models_of_other_layers_are_refused():
    with pytest.raises(ValueError, match="two models of other layers, such as 'c'"):
        layer_changes({"a": torch.ones(2, 2)}, {"a": torch.ones(2, 2), "c": torch.ones(2, 2)})
    with pytest.raises(ValueError, match="such as 'a'"):
        layer_changes({"a": torch.ones(2, 2)}, {"a": torch.ones(2, 3)})
