"""Dropout by sample: its share, its scale, and that it depends on the sample and the layer alone."""

import pytest
import torch
from torch import nn

from minidiff.adapters.dropout import SampleDropout, set_row_seeds, uniform


def test_splitmix64_gives_its_published_numbers():
    """The first outputs for the seed 1234567, as in the reference program in C (Vigna 2015)."""
    from minidiff.adapters.dropout import GAMMA, _mix, _signed

    states = torch.tensor([_signed(1234567 + GAMMA * i) for i in range(1, 4)])
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [int(x) & 2**64 - 1 for x in _mix(states)] == expected


def test_numbers_are_even_between_0_and_1_and_rows_and_layers_are_unlike():
    seeds = torch.tensor([3, 4, 2**62 - 1])
    u = uniform(seeds, 0, 100_000)
    assert u.min() >= 0 and u.max() < 1 and u.shape == (3, 100_000)
    assert (u.mean(dim=1) - 0.5).abs().max() < 5 * 0.29 / 100_000**0.5  # five standard errors
    assert (torch.histc(u[0], 10, 0, 1) - 10_000).abs().max() < 5 * 95  # and of a count in a tenth of them
    joined = torch.stack([u[0], u[1], u[2], uniform(seeds, 1, 100_000)[0], u[0].roll(1)])
    assert (torch.corrcoef(joined) - torch.eye(5)).abs().max() < 5 / 100_000**0.5


def test_a_sample_is_the_same_in_any_batch_and_in_any_order():
    layer = SampleDropout(0.3).train()
    x, seeds = torch.randn(4, 5, 6), torch.tensor([5, 6, 7, 8])
    set_row_seeds(layer, seeds)
    whole = layer(x)
    assert torch.equal(layer(x), whole)  # it has no state: gradient checkpointing runs it twice
    set_row_seeds(layer, seeds[[2, 0]])
    assert torch.equal(layer(x[[2, 0]]), whole[[2, 0]])
    kept = whole != 0
    torch.testing.assert_close(whole[kept], x[kept] / 0.7)
    assert 0.5 < kept.float().mean() < 0.9


def test_layers_of_a_module_are_numbered_and_eval_mode_changes_nothing():
    module = nn.ModuleList([SampleDropout(0.5), nn.Linear(2, 2), SampleDropout(0.5)]).train()
    set_row_seeds(module, torch.tensor([1]))
    x = torch.ones(1, 1000)
    assert not torch.equal(module[0](x), module[2](x))
    assert torch.equal(module.eval()[0](x), x)


def test_without_seeds_it_is_pytorchs():
    layer, x = SampleDropout(0.5).train(), torch.ones(2, 50)
    torch.manual_seed(0)
    ours = layer(x)
    torch.manual_seed(0)
    assert torch.equal(ours, torch.nn.functional.dropout(x, 0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_dtype_stays(dtype):
    layer = SampleDropout(0.5).train()
    set_row_seeds(layer, torch.tensor([1, 2]))
    assert layer(torch.ones(2, 8, dtype=dtype)).dtype == dtype
