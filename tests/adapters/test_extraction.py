"""A LoRA out of two checkpoints: it is got back, its error is the best there is, and each criterion keeps what it says."""

import math

import pytest
import torch

from minidiff.adapters.extraction import extract_lora, rank_for_energy
from minidiff.adapters.lora import merge_lora
from tests.adapters.learned_lora import ALL, KEYS, random_lora
from tests.small_models import small_model, wider_config


@pytest.fixture(scope="module")
def sd():
    return small_model()


def tuned_by(lora):
    tuned = small_model()
    merge_lora(tuned, lora)
    return tuned


def test_a_lora_is_got_back_from_the_two_checkpoints(sd):
    lora = random_lora(sd, rank=3)
    found = extract_lora(sd, tuned_by(lora), ALL, rank=3)
    assert found.layers.keys() == lora.layers.keys()
    for name, low in found.layers.items():
        assert low.rank <= 3 and low.alpha == low.rank
        torch.testing.assert_close(low.delta(), lora.layers[name].delta(), rtol=1e-3, atol=1e-5)  # a difference of fp32 weights near 1


def test_only_layers_that_differ_are_extracted(sd):
    assert extract_lora(sd, tuned_by(random_lora(sd, KEYS)), ALL, rank=2).layers.keys() == random_lora(sd, KEYS).layers.keys()


def test_the_error_of_an_extraction_is_the_norm_of_the_singular_values_left_out(sd):
    lora = random_lora(sd, KEYS, rank=8)
    for name, low in extract_lora(sd, tuned_by(lora), KEYS, rank=3).layers.items():
        wanted = lora.layers[name].delta()
        left = torch.linalg.svdvals(wanted)[3:].norm()  # Eckart and Young 1936
        torch.testing.assert_close((wanted - low.delta()).norm(), left, rtol=1e-3, atol=1e-5)


def test_an_energy_keeps_the_fewest_singular_values_that_reach_it():
    s = torch.tensor([4.0, 3.0, 2.0, 1.0])  # sums 4, 7, 9, 10; squares 16, 25, 29, 30
    assert [rank_for_energy(s, energy, "sum") for energy in (0.1, 0.4, 0.41, 0.7, 0.9, 0.91, 1.0)] == [1, 1, 2, 2, 3, 4, 4]
    norms = [math.sqrt(square / 30) for square in (16, 25, 29)]
    assert [rank_for_energy(s, norm + step, "frobenius") for norm in norms for step in (-1e-6, 1e-6)] == [1, 2, 2, 3, 3, 4]
    assert [rank_for_energy(s, energy, "ratio") for energy in (1.0, 0.8, 0.74, 0.5, 0.49, 0.01)] == [1, 1, 2, 2, 3, 4]


def test_an_energy_gives_each_layer_its_own_rank_up_to_the_limit(sd):
    tuned = tuned_by(random_lora(sd, KEYS, rank=6))
    for criterion, energy in (("sum", 0.7), ("frobenius", 0.8), ("ratio", 0.5)):
        free = extract_lora(sd, tuned, KEYS, energy=energy, criterion=criterion)
        assert len({low.rank for low in free.layers.values()}) > 1, criterion
        capped = extract_lora(sd, tuned, KEYS, energy=energy, criterion=criterion, rank=2)
        assert {name: low.rank for name, low in capped.layers.items()} == {name: min(2, low.rank) for name, low in free.layers.items()}


def test_clamping_cuts_both_factors_at_their_common_quantile(sd):
    tuned = tuned_by(random_lora(sd, KEYS, rank=4))
    exact, clamped = (extract_lora(sd, tuned, KEYS, rank=4, clamp=clamp) for clamp in (1, 0.9))
    for name, low in exact.layers.items():
        limit = torch.quantile(torch.cat([low.down.weight.flatten(), low.up.weight.flatten()]), 0.9)
        cut = clamped.layers[name]
        torch.testing.assert_close(cut.down.weight, low.down.weight.clamp(-limit, limit))
        torch.testing.assert_close(cut.up.weight, low.up.weight.clamp(-limit, limit))
        assert not torch.equal(cut.down.weight, low.down.weight)


def test_what_cannot_be_extracted_is_said(sd):
    for tuned, given, message in [
        (sd, {"rank": 1}, "the two models are equal"),
        (sd, {}, "give a rank"),
        (sd, {"rank": 0}, "rank 0"),
        (sd, {"rank": 1, "clamp": 0.0}, "clamp 0.0"),
        (sd, {"energy": 1.5}, "energy 1.5"),
        (sd, {"energy": 0.5, "criterion": "all"}, "criterion 'all' unknown; choose sum, frobenius, ratio"),
        (small_model(wider_config()), {"rank": 1}, r"cross_attention.to_k is absent or of another shape"),
    ]:
        with pytest.raises(ValueError, match=message):
            extract_lora(sd, tuned, KEYS, **given)
