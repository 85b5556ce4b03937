"""Muon against the singular value decomposition, the learning rate's shapes."""

import math

import pytest
import torch
from torch import nn

from minidiff.trainers.engine.optimizer import Muon, adamw, learning_rate, optimizers, orthogonalise
from minidiff.trainers.engine.settings import Settings

SHAPES = pytest.mark.parametrize("shape", [(12, 12), (8, 30), (30, 8), (1, 5)])


def random_matrix(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@SHAPES
def test_orthogonalise_keeps_the_singular_vectors_and_maps_each_singular_value_by_the_polynomial(shape):
    matrix = random_matrix(shape)
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    # float64; the 1e-7 that keeps a zero matrix from dividing by zero
    torch.testing.assert_close(orthogonalise(matrix), u @ torch.diag(s) @ vh, rtol=0, atol=1e-6)


@SHAPES
def test_orthogonalise_brings_singular_values_near_1(shape):
    values = torch.linalg.svdvals(orthogonalise(random_matrix(shape)))
    assert values.max() < 1.3
    assert values.median() > 0.65  # Jordan et al.: 0.7 to 1.2, but for singular values that begin below 1 % of the norm


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_orthogonalise_does_not_see_the_scale(factor):
    matrix = random_matrix((6, 9))
    torch.testing.assert_close(orthogonalise(factor * matrix), orthogonalise(matrix), rtol=0, atol=1e-3)  # the 1e-7 again
    assert orthogonalise(torch.zeros(3, 4)).abs().max() == 0


@pytest.mark.parametrize("shape", [(48, 48), (16, 96), (96, 16), (24, 12, 3, 3)])
def test_a_muon_step_has_a_root_mean_square_of_a_fifth_of_the_learning_rate(shape):
    p = nn.Parameter(torch.zeros(shape))
    p.grad = 1e-4 * random_matrix(shape, dtype=torch.float32)
    Muon([p], lr=0.03).step()
    rms = p.detach().square().mean().sqrt().item()
    assert rms == pytest.approx(0.2 * 0.03, rel=0.2)  # singular values between 0.7 and 1.2, not exactly 1


def test_muon_steps_against_the_nesterov_momentum():
    p, twin = (nn.Parameter(random_matrix((4, 6), dtype=torch.float32)) for _ in range(2))
    optimizer, momentum, expected = Muon([p], lr=0.1, momentum=0.9), torch.zeros(4, 6), twin.detach().clone()
    for seed in (1, 2, 3):
        p.grad = random_matrix((4, 6), seed, torch.float32)
        kept = p.grad.clone()
        optimizer.step()
        assert torch.equal(p.grad, kept)
        momentum = 0.9 * momentum + 0.1 * kept
        expected -= 0.1 * 0.2 * 6**0.5 * orthogonalise(0.1 * kept + 0.9 * momentum)
    torch.testing.assert_close(p.detach(), expected, rtol=1e-4, atol=1e-5)  # fp32


def test_a_weight_without_gradient_stays():
    p, q = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    p.grad = torch.eye(2)
    Muon([p, q], lr=0.1).step()
    assert torch.equal(q, torch.ones(2, 2)) and not torch.equal(p, torch.ones(2, 2))


def test_muon_has_the_matrices_and_adamw_the_rest():
    module = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 4), nn.LayerNorm(4), nn.Conv2d(1, 2, 3), nn.GroupNorm(2, 2))
    muon, adamw = optimizers([module, nn.Linear(2, 3, bias=False)], 0.01)
    shapes = [sorted(tuple(p.shape) for p in o.param_groups[0]["params"]) for o in (muon, adamw)]
    assert shapes[0] == [(2, 1, 3, 3), (3, 2), (4, 4)]
    assert shapes[1] == sorted([(5, 4), (4,), (4,), (4,), (2,), (2,), (2,)])


def rates(schedule, steps=900, warmup_steps=60):
    settings = Settings(steps=steps, batch=1, learning_rate=2.0, warmup_steps=warmup_steps, schedule=schedule)
    return [learning_rate(step, settings) for step in range(steps)]


def test_flat_then_linear_rises_stays_and_falls_to_a_twentieth():
    values = rates("linear_after_hold")
    assert values[0] == pytest.approx(2 / 60) and values[29] == pytest.approx(1.0)
    assert values[59:226] == [2.0] * (226 - 59)
    assert values[562] == pytest.approx(1.0, abs=2 / 675)
    assert values[899] == pytest.approx(0.1)
    assert all(0.1 - 1e-12 <= later <= earlier for earlier, later in zip(values[225:], values[226:]))


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_begin_at_the_peak_after_warming_up(schedule):
    values = rates(schedule)
    assert values[:60] == pytest.approx([2 * (step + 1) / 60 for step in range(60)])
    assert values[60] == 2.0
    assert rates(schedule, warmup_steps=0)[0] == 2.0 and rates(schedule, steps=3, warmup_steps=5) == pytest.approx([0.4, 0.8, 1.2])


def test_schedules_fall_by_their_formulas():
    assert rates("constant")[60:] == [2.0] * 840
    done = [step / 840 for step in range(840)]
    assert rates("linear")[60:] == pytest.approx([2 * (1 - share) for share in done])
    assert rates("cosine")[60:] == pytest.approx([1 + math.cos(math.pi * share) for share in done], abs=1e-12)


def test_adamw_has_the_numbers_of_the_public_trainers():
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = adamw([{"params": [p], "scale": 0.1}, {"params": [q]}], Settings(steps=1, batch=1, learning_rate=0.5))
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["weight_decay"], group["eps"]) == (0.5, (0.9, 0.999), 1e-2, 1e-8)
    assert [group.get("scale") for group in optimizer.param_groups] == [0.1, None]
