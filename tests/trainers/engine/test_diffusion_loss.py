"""The diffusion loss against its formulas, worked out sample by sample in float64."""

import numpy as np
import pytest
import torch

from minidiff.config import ScheduleConfig
from minidiff.schedule import NoiseSchedule
from minidiff.trainers.engine.diffusion_loss import diffusion_loss, min_snr_weight, sample_noise, squared_error
from minidiff.trainers.engine.loop import rng_for

CPU = torch.device("cpu")
PREDICTIONS = pytest.mark.parametrize("prediction", ["eps", "v"])


def schedule(prediction, zero_terminal_snr=False):
    return NoiseSchedule(ScheduleConfig(prediction=prediction, zero_terminal_snr=zero_terminal_snr))


def batch(count=3):
    rngs = [rng_for(0, 0, sample) for sample in range(count)]
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 4, 6, 5, generator=generator), sample_noise(rngs, (4, 6, 5), 1000, CPU)


def answer(x_t, t, context):
    return 0.3 * x_t.double() + context.mean()


@PREDICTIONS
@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("masked", [False, True])
def test_the_loss_of_each_sample_is_its_formula(prediction, gamma, masked):
    (x_0, draws), noise = batch(), schedule(prediction)
    mask = (torch.arange(30).reshape(1, 1, 6, 5) % torch.tensor([2, 3, 4]).reshape(3, 1, 1, 1) == 0).float() if masked else None
    context = torch.full((3, 2, 7), 0.1)
    losses = diffusion_loss(answer, noise, x_0, context, draws, mask=mask, min_snr=gamma)
    for k in range(3):
        t, eps, x = int(draws.t[k]), draws.eps[k].double().numpy(), x_0[k].double().numpy()
        alpha_bar = noise.alpha_bar[t].item()
        signal, sigma = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        target = eps if prediction == "eps" else signal * eps - sigma * x
        error = (0.3 * (signal * x + sigma * eps) + 0.1 - target) ** 2
        expected = error.mean() if mask is None else error[:, mask[k, 0].bool().numpy()].mean()
        if gamma is not None:
            snr = alpha_bar / (1 - alpha_bar)
            expected *= min(snr, gamma) / (snr if prediction == "eps" else snr + 1)
        assert losses[k].item() == pytest.approx(expected, rel=1e-4)  # float32


@PREDICTIONS
def test_min_snr_leaves_noisy_timesteps_alone_and_holds_clean_ones_down(prediction):
    noise = schedule(prediction)
    t = torch.arange(1000)
    weight, snr = min_snr_weight(noise, t, 5.0), noise.snr(t)
    plain = torch.ones(1000) if prediction == "eps" else snr / (snr + 1)
    assert torch.equal(weight[snr <= 5], plain[snr <= 5])
    assert (weight[snr > 5] < plain[snr > 5]).all()


@PREDICTIONS
def test_min_snr_is_finite_at_pure_noise(prediction):
    weight = min_snr_weight(schedule(prediction, zero_terminal_snr=True), torch.tensor([999]), 5.0)
    assert weight.item() == (1.0 if prediction == "eps" else 0.0)


def test_a_sample_is_drawn_from_its_own_generator():
    together = batch(3)[1]
    for k in range(3):
        alone = sample_noise([rng_for(0, 0, k)], (4, 6, 5), 1000, CPU)
        assert torch.equal(alone.t[0], together.t[k]) and torch.equal(alone.eps[0], together.eps[k])
    assert len(set(together.t.tolist())) == 3


def test_timesteps_are_uniform_and_noise_is_unit_normal():
    draws = sample_noise([rng_for(0, 0, sample) for sample in range(2000)], (4, 2, 2), 1000, CPU)
    assert draws.t.min() >= 0 and draws.t.max() <= 999
    assert np.histogram(draws.t, bins=10, range=(0, 1000))[0] == pytest.approx(200, abs=4 * 180**0.5)  # four standard deviations
    assert draws.eps.mean().abs() < 4 / 32000**0.5 and draws.eps.std().item() == pytest.approx(1, abs=4 / 64000**0.5)


def test_offset_noise_moves_each_channel_of_each_sample_as_a_whole():
    def noise(offset):
        return sample_noise([rng_for(0, 0, sample) for sample in range(2000)], (4, 2, 2), 1000, CPU, offset)

    plain, moved = noise(0.0), noise(0.1)
    assert torch.equal(plain.t, moved.t)
    offset = moved.eps - plain.eps
    torch.testing.assert_close(offset, offset[:, :, :1, :1].expand_as(offset), rtol=0, atol=1e-6)  # float32
    assert offset[:, :, 0, 0].std().item() == pytest.approx(0.1, rel=4 / 16000**0.5)  # four standard deviations


def test_a_half_precision_answer_is_compared_in_float32():
    (x_0, draws), noise = batch(), schedule("v")
    error = squared_error(lambda x_t, t, context: x_t.bfloat16(), noise, x_0, torch.zeros(3, 1, 1), draws)
    assert error.dtype == torch.float32
    target = noise.target(x_0, draws.t, draws.eps)
    expected = (noise.q_sample(x_0, draws.t, draws.eps).bfloat16().float() - target).square()
    assert torch.equal(error, expected)
