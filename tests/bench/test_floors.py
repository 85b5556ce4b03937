"""Floors: operations against numbers counted by hand, and the largest of the ceilings."""

from dataclasses import replace

import pytest
import torch

from minidiff.bench.attention_cases import AttentionCase
from minidiff.bench.floors import count_attention, count_decoder, count_unet, floor_seconds, measure_ceilings
from minidiff.config import SD1
from tests.small_models import small_config

CASE = AttentionCase("self", 4096, 4096, heads=8, head_dim=40, calls=5, batch=2, dtype="bfloat16")


def test_stable_diffusion_has_the_operations_that_others_count():
    # 1.607 and 2.515 TFLOP, the published shapes counted by another program
    assert count_unet(SD1, 512, 2) == pytest.approx(1.607e12, rel=1e-3) and count_decoder(SD1, 512) == pytest.approx(2.515e12, rel=1e-3)


def test_gradients_of_what_is_frozen_cost_one_pass_more_and_of_weights_two():
    config = small_config()
    forward = count_unet(config, 32, 1)
    assert 1.8 * forward < count_unet(config, 32, 1, backward=True) < 2.4 * forward
    assert 2.8 * forward < count_unet(config, 32, 1, backward=True, weights=True) < 3.2 * forward
    assert count_unet(config, 32, 4) == 4 * forward


def test_attention_by_hand():
    logits = 2 * 8 * 4096 * 4096
    products, moved, exponentials = count_attention(CASE, "forward")
    assert (products, exponentials) == (4 * 40 * logits, logits) and products == pytest.approx(42.95e9, rel=1e-3)
    assert moved == 4 * 2 * 8 * 4096 * 40 * 2  # q, k, v and the output, of 16 bits
    assert count_attention(CASE, "both")[0] == 7 * 2 * 40 * logits  # two products forward, five backward
    assert count_attention(replace(CASE, causal=True), "forward")[0] == products / 2


def test_the_floor_is_that_of_the_slowest_and_unknown_ceilings_do_not_count():
    ceilings = {"products": 100.0, "bytes": 10.0, "exponentials": None, "status": "done"}
    assert floor_seconds(ceilings, 200.0, 30.0, 1e9) == (3.0, "bytes")
    assert floor_seconds(ceilings | {"exponentials": 1.0}, 200.0, 30.0, 5.0) == (5.0, "exponentials")


def test_ceilings_are_measured_here():
    found = measure_ceilings(torch.device("cpu"), torch.float32, 64, 2**20, clock=2000.0)
    assert found["products"] > 1e6 and found["bytes"] > 1e6 and found["exponentials"] is None  # no multiprocessors on a CPU
