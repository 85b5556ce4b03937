"""The exponential moving average of weights: a closed form, what it leaves alone, in and out of a module."""

import copy

import pytest
import torch
from torch import nn

from minidiff.trainers.engine.ema import EMA


def random_matrix(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9995])
def test_the_average_is_the_closed_form(decay):
    """mean_n is the sum of the weights w_k, each times (1 - d_k) and all the later d."""
    module = nn.Linear(3, 2)
    values = [random_matrix((2, 3), seed, torch.float32) for seed in range(21)]
    module.weight.data.copy_(values[0])
    average = EMA(module, decay)
    for value in values[1:]:
        module.weight.data.copy_(value)
        average.update(module)
    d = [min(decay, (1 + n) / (10 + n)) for n in range(20)]
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for k, value in enumerate(values):
        weight = 1.0 if k == 0 else 1 - d[k - 1]
        for later in d[k:]:
            weight *= later
        expected += weight * value
    torch.testing.assert_close(average.mean["weight"].double(), expected, rtol=0, atol=1e-6)  # fp32
    assert average.mean.keys() == dict(module.named_parameters()).keys()


def test_an_average_is_its_own_and_goes_on_from_its_state():
    module = nn.Linear(3, 2)
    average, other = EMA(module, 0.9), EMA(nn.Linear(3, 2), 0.9)
    kept = copy.deepcopy(module.state_dict())
    module.weight.data.add_(1)
    assert torch.equal(average.mean["weight"], kept["weight"])
    average.update(module)
    assert not torch.equal(average.mean["weight"], kept["weight"])
    other.load_state_dict(copy.deepcopy(average.state_dict()))
    for one in (average, other):
        one.update(module)
    assert torch.equal(average.mean["weight"], other.mean["weight"]) and average.steps == other.steps == 2


def test_only_what_is_trained_is_averaged():
    module = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2).requires_grad_(False))
    average = EMA(module, 0.9)
    average.update(module)
    assert average.mean.keys() == {"0.weight", "0.bias"}


def test_the_average_is_put_into_the_module_and_taken_out_again():
    module = nn.Linear(3, 2)
    average = EMA(module, 0.9)
    first = module.weight.detach().clone()
    module.weight.data.add_(1)
    own = module.weight.detach().clone()
    with pytest.raises(RuntimeError), average.swapped_in(module):
        assert torch.equal(module.weight, first) and module.weight.requires_grad
        raise RuntimeError
    assert torch.equal(module.weight, own) and torch.equal(average.mean["weight"], first)
