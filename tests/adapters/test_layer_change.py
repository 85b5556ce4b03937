"""The change of a layer as a LoRA holds it: a new form needs a shape and a delta, and goes together with others."""

import pytest
import torch
from torch import nn

from minidiff.adapters.layer_change import LayerChange
from minidiff.adapters.layers import layers_of
from minidiff.adapters.lora import LoRA, merge_lora
from tests.adapters.learned_lora import generator, random_lora
from tests.small_models import small_model


@pytest.fixture
def sd():
    return small_model()


def answer(sd):
    x, context = torch.randn(2, 4, 8, 8, generator=generator()), torch.randn(2, 7, 16, generator=generator())
    return sd.unet(x, torch.tensor([3, 700]), context)


class FullDifference(LayerChange):
    """A toy change: the difference as it is."""

    def __init__(self, difference):
        super().__init__()
        self.difference = nn.Parameter(difference)

    @property
    def shape(self):
        return tuple(self.difference.shape)

    def delta(self):
        return self.difference


def test_a_new_kind_of_change_is_a_shape_and_a_delta(sd):
    """On every layer: linear ones, and convolutions of all strides. It goes with others on one LoRA, live and merged."""
    low = random_lora(sd)
    full = LoRA({name: FullDifference(change.delta().detach()) for name, change in low.layers.items()}, weight=0.7)
    mixed = LoRA({name: (full if i % 2 else low).layers[name] for i, name in enumerate(low.layers)}, weight=0.7)
    low.weight, before = 0.7, answer(sd)
    answers = []
    for lora in (low, full, mixed):
        lora.attach(sd)
        answers.append(answer(sd))
        lora.detach()
    undo = merge_lora(sd, full)
    answers.append(answer(sd))
    undo()
    assert torch.equal(answer(sd), before) and (answers[0] - before).abs().max() > 0.1
    for other in answers[1:]:
        torch.testing.assert_close(other, answers[0], rtol=1e-4, atol=1e-5)  # fp32, a whole network of small widths
    name = next(iter(layers_of(sd)))
    with pytest.raises(ValueError, match=rf"{name}: a change of shape \(2, 3\), for a weight of shape"):
        LoRA({name: FullDifference(torch.ones(2, 3))}).attach(sd)
