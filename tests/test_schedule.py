"""The noise schedule against diffusers' schedulers, and against the identities that define it."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from minidiff.config import ScheduleConfig
from minidiff.schedule import NoiseSchedule, zero_terminal_snr

SD = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def batch(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 5, 4, 3, 3, generator=generator, dtype=dtype)
    return x_0, torch.tensor([0, 1, 250, 500, 998]), eps


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("scheduler", [DDIMScheduler, DDPMScheduler])
def test_the_tables_equal_those_of_diffusers(scheduler, zero_snr):
    ours = NoiseSchedule(ScheduleConfig(zero_terminal_snr=zero_snr))
    theirs = scheduler(**SD, rescale_betas_zero_snr=zero_snr)
    assert ours.betas.dtype == ours.alpha_bar.dtype == torch.float64
    # diffusers' tables are float32: a product of 1000 factors, each rounded to 6e-8
    torch.testing.assert_close(ours.alpha_bar, theirs.alphas_cumprod.double(), rtol=0, atol=1e-6)
    # and with zero SNR the last betas are quotients of differences that have lost most of their digits
    torch.testing.assert_close(ours.betas[:900], theirs.betas.double()[:900], rtol=0, atol=2e-6)
    torch.testing.assert_close(ours.betas[900:], theirs.betas.double()[900:], rtol=0, atol=1e-4 if zero_snr else 1e-7)


def test_alpha_bar_is_the_product_of_one_minus_the_betas():
    for zero_snr in (False, True):
        schedule = NoiseSchedule(ScheduleConfig(zero_terminal_snr=zero_snr))
        torch.testing.assert_close(torch.cumprod(1 - schedule.betas, 0), schedule.alpha_bar, rtol=1e-10, atol=0)  # float64


def test_zero_terminal_snr_ends_at_zero_and_keeps_the_first_level():
    plain = NoiseSchedule(ScheduleConfig()).alpha_bar
    rescaled = zero_terminal_snr(plain)
    assert rescaled[-1] == 0 and torch.isclose(rescaled[0], plain[0], rtol=1e-14, atol=0)
    assert (rescaled.diff() < 0).all()
    assert NoiseSchedule(ScheduleConfig(zero_terminal_snr=True)).snr(torch.tensor([999])) == 0


@pytest.mark.parametrize("zero_snr", [False, True])
def test_q_sample_and_velocity_equal_those_of_diffusers(zero_snr):
    x_0, t, eps = batch(torch.float32)
    ours = NoiseSchedule(ScheduleConfig(zero_terminal_snr=zero_snr))
    theirs = DDPMScheduler(**SD, rescale_betas_zero_snr=zero_snr)
    # fp32 tables of diffusers
    torch.testing.assert_close(ours.q_sample(x_0, t, eps), theirs.add_noise(x_0, eps, t), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.velocity(x_0, t, eps), theirs.get_velocity(x_0, eps, t), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_the_conversions_undo_each_other(zero_snr):
    x_0, t, eps = batch()
    schedule = NoiseSchedule(ScheduleConfig(zero_terminal_snr=zero_snr))
    x_t, v = schedule.q_sample(x_0, t, eps), schedule.velocity(x_0, t, eps)
    close = dict(rtol=0, atol=1e-9)  # float64; dividing by sqrt(alpha_bar_998) = 1e-4 costs four digits
    torch.testing.assert_close(schedule.x0_from_eps(x_t, t, eps), x_0, **close)
    torch.testing.assert_close(schedule.eps_from_x0(x_t, t, x_0), eps, **close)
    torch.testing.assert_close(schedule.x0_from_v(x_t, t, v), x_0, **close)
    torch.testing.assert_close(schedule.eps_from_v(x_t, t, v), eps, **close)


def test_v_still_gives_x_0_where_nothing_but_noise_is_left():
    x_0, _, eps = batch()
    schedule = NoiseSchedule(ScheduleConfig(zero_terminal_snr=True, prediction="v"))
    t = torch.full((5,), 999)
    assert torch.equal(schedule.q_sample(x_0, t, eps), eps)
    assert torch.equal(schedule.x0_from_v(eps, t, schedule.velocity(x_0, t, eps)), x_0)


def test_the_target_is_what_the_config_says():
    x_0, t, eps = batch()
    assert torch.equal(NoiseSchedule(ScheduleConfig()).target(x_0, t, eps), eps)
    v = NoiseSchedule(ScheduleConfig(prediction="v"))
    assert torch.equal(v.target(x_0, t, eps), v.velocity(x_0, t, eps))


def test_q_sample_keeps_unit_variance_and_mixes_by_the_snr():
    schedule = NoiseSchedule(ScheduleConfig())
    t = torch.arange(1000)
    alpha_bar = schedule.q_sample(torch.ones(1000, dtype=torch.float64), t, torch.zeros(1000, dtype=torch.float64)) ** 2
    noise = schedule.q_sample(torch.zeros(1000, dtype=torch.float64), t, torch.ones(1000, dtype=torch.float64)) ** 2
    torch.testing.assert_close(alpha_bar + noise, torch.ones_like(noise), rtol=1e-12, atol=0)  # float64
    torch.testing.assert_close(schedule.snr(t).double(), alpha_bar / noise, rtol=1e-6, atol=0)  # snr is float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_follows_the_inputs_and_no_input_changes(dtype):
    x_0, t, eps = batch(dtype)
    before = x_0.clone(), t.clone(), eps.clone()
    schedule = NoiseSchedule(ScheduleConfig())
    for method in ("q_sample", "velocity", "target", "x0_from_eps", "eps_from_x0", "x0_from_v", "eps_from_v"):
        out = getattr(schedule, method)(x_0, t, eps)
        assert out.dtype == dtype and out.shape == x_0.shape
    assert all(torch.equal(a, b) for a, b in zip((x_0, t, eps), before))


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_the_timesteps_equal_those_of_diffusers_for_every_number_of_steps(spacing):
    schedule = NoiseSchedule(ScheduleConfig())
    theirs = DDIMScheduler(**SD, steps_offset=1, timestep_spacing=spacing)
    for steps in range(1, 1000):
        t = schedule.timesteps(steps, spacing)
        theirs.set_timesteps(steps)
        assert t.shape == (steps,) and t.min() >= 0 and t.max() <= 999
        # where a fraction makes diffusers' arange one too long, the extra timestep is its last
        assert torch.equal(t, theirs.timesteps[:steps]), steps
        assert (t.diff() < 0).all(), steps


def test_thirty_leading_steps_are_thirty_and_count_from_one():
    t = NoiseSchedule(ScheduleConfig()).timesteps(30, "leading")
    assert len(t) == 30 and t[0] == 958 and t[-1] == 1


def test_every_timestep_is_visited_when_all_are_asked_for():
    for spacing in ("leading", "linspace", "trailing"):
        assert NoiseSchedule(ScheduleConfig()).timesteps(1000, spacing).tolist() == list(range(999, -1, -1))


def test_the_spacing_is_the_configs_unless_one_is_given():
    schedule = NoiseSchedule(ScheduleConfig(spacing="trailing"))
    assert torch.equal(schedule.timesteps(10), schedule.timesteps(10, "trailing"))
    assert schedule.timesteps(10)[0] == 999 and schedule.timesteps(10, "leading")[0] == 901


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_a_number_of_steps_that_cannot_be_is_refused(steps):
    with pytest.raises(ValueError, match=rf"steps {steps} is outside 1\.\.1000"):
        NoiseSchedule(ScheduleConfig()).timesteps(steps)


def test_an_unknown_spacing_is_refused_with_the_choices():
    with pytest.raises(ValueError, match="spacing 'quadratic' unknown; choose leading, linspace, trailing"):
        NoiseSchedule(ScheduleConfig()).timesteps(10, "quadratic")


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(beta_start=0.0), "beta_start 0.0"),
        (dict(beta_end=1.0), "beta_end 1.0"),
        (dict(beta_start=0.1), "expected 0 < beta_start <= beta_end < 1"),
        (dict(timesteps=1), "timesteps 1"),
        (dict(prediction="x0"), "prediction 'x0' unknown; choose eps, v"),
        (dict(spacing="even"), "spacing 'even' unknown"),
    ],
)
def test_a_schedule_that_cannot_be_is_refused(config, message):
    broken = ScheduleConfig()
    for name, value in config.items():
        object.__setattr__(broken, name, value)  # past the annotations, which are checked in tests only
    with pytest.raises(ValueError, match=message):
        NoiseSchedule(broken)
