"""Every sampler's whole trajectory against diffusers' scheduler, and against what its paper proves about it.

The model is the exact denoiser of pixels that are +0.8 or -0.8 with a spread of 0.3: not linear, and as tame as a trained one.
"""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch

from minidiff.config import ScheduleConfig
from minidiff.samplers import SAMPLERS, Level, Sampler, Step, karras_sigmas, levels, sample
from minidiff.schedule import NoiseSchedule
from tests.parity.schedulers import theirs
from tests.small_models import small_model

# diffusers with NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SPACINGS = ("leading", "linspace", "trailing")
MODE, SPREAD = 0.8, 0.3  # of the pixels
MEAN, STD = 0.5, 0.4  # of the Gaussian data
EVEN = [name for name, row in SAMPLERS.items() if not row.own_spacing]  # whose levels lie as the spacing says
DETERMINISTIC = [name for name, row in SAMPLERS.items() if not row.draws_noise]


def make_schedule(prediction="eps", zero_snr=False):
    return NoiseSchedule(ScheduleConfig(prediction=prediction, zero_terminal_snr=zero_snr))


def make_model(schedule, x0_hat):
    """A model from x0_hat(x, a, s), the posterior mean of x_0 at x = a x_0 + s eps."""

    def model(x, t):
        alpha_bar = np.interp(t.double().numpy(), np.arange(1000), schedule.alpha_bar.numpy())
        alpha_bar = torch.from_numpy(alpha_bar).reshape(-1, *[1] * (x.ndim - 1))
        a, s = alpha_bar.sqrt().to(x.dtype), (1 - alpha_bar).sqrt().to(x.dtype)
        x0 = x0_hat(x, a, s)
        return (x - a * x0) / s if schedule.config.prediction == "eps" else (a * x - x0) / s

    return model


def of_two_modes(x, a, s):
    variance = a**2 * SPREAD**2 + s**2
    mode = MODE * torch.tanh(a * MODE * x / variance)
    return mode + a * SPREAD**2 / variance * (x - a * mode)


def of_a_gaussian(x, a, s):
    return MEAN + a * STD**2 / (a**2 * STD**2 + s**2) * (x - a * MEAN)


def noise_list(dtype=torch.float64, number=60):
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(number, 2, 4, 4, 4, generator=generator, dtype=dtype))


def ours(model, schedule, noises, **settings):
    x, *rest = noises
    return torch.stack([step.x_t for step in sample(model, x, schedule, noise=iter(rest).__next__, **settings)])


def assert_parity(sampler, spacing, prediction, zero_snr, steps, eta, dtype, monkeypatch, rtol, atol):
    schedule = make_schedule(prediction, zero_snr)
    settings = dict(sampler=sampler, steps=steps, spacing=spacing, eta=eta)
    model, noises = make_model(schedule, of_two_modes), noise_list(dtype)
    with monkeypatch.context() as patch:
        expected = theirs(model, schedule, noises, **settings, monkeypatch=patch)
    actual = ours(model, schedule, noises, **settings)
    assert len(actual) == steps
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


ETAS = [(name, 0.0) for name in SAMPLERS] + [(name, 1.0) for name, row in SAMPLERS.items() if row.takes_eta]
# float64; diffusers' ddpm adds a last noise of sqrt(1e-20)
TOLERANCE = dict.fromkeys(SAMPLERS, 1e-11) | dict(ddpm=1e-9)


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler, eta", ETAS)
def test_the_trajectory_equals_that_of_diffusers(sampler, eta, spacing, prediction, steps, monkeypatch):
    assert_parity(sampler, spacing, prediction, False, steps, eta, torch.float64, monkeypatch, rtol=0, atol=TOLERANCE[sampler])
    # as installed: fp32 tables, alpha_bar good to 1e-6; a pixel that is slow to choose between the modes multiplies that by 20
    assert_parity(sampler, spacing, prediction, False, steps, eta, torch.float32, monkeypatch, rtol=1e-4, atol=5e-5)


# An eps-model has no answer for ddpm and ddim where alpha_bar is 0. From there heun's first step is better than the slopes' mean that
# diffusers would take; "leading" does not start there.
ZERO_SNR = [
    (sampler, eta, spacing, prediction)
    for (sampler, eta), spacing, prediction in itertools.product(ETAS, SPACINGS, ("eps", "v"))
    if spacing == "leading" or (sampler != "heun" and (SAMPLERS[sampler].divides_by_signal or prediction == "v"))
]


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("sampler, eta, spacing, prediction", ZERO_SNR)
def test_the_trajectory_at_zero_terminal_snr_equals_that_of_diffusers(sampler, eta, spacing, prediction, steps, monkeypatch):
    # diffusers' x is 4096 wide at the first step, where a float64 ends at 5e-13 and a float32 at 2e-4
    assert_parity(sampler, spacing, prediction, True, steps, eta, torch.float64, monkeypatch, rtol=1e-10, atol=10 * TOLERANCE[sampler])
    # as installed plms and heun cannot do it, and ddim with eta 1 gives NaN: its float32 takes the root of -6e-8
    if sampler not in ("plms", "heun") and eta == 0:
        assert_parity(sampler, spacing, prediction, True, steps, eta, torch.float32, monkeypatch, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("sampler", ["plms", "heun"])
def test_at_zero_terminal_snr_plms_and_heun_converge_to_ddim(sampler):
    schedule = make_schedule("v", zero_snr=True)
    model, noises = make_model(schedule, of_two_modes), noise_list()
    expected = ours(model, schedule, noises, sampler="ddim", steps=500, spacing="trailing")[-1]
    errors = [
        (ours(model, schedule, noises, sampler=sampler, steps=steps, spacing="trailing")[-1] - expected).abs().max()
        for steps in (10, 50, 250)
    ]
    assert errors == sorted(errors, reverse=True) and errors[0] > 0.1
    assert errors[-1] < 0.02  # of which 0.01 is the noise that ddim leaves


def test_a_shifted_timestep_would_be_noticed(monkeypatch):
    """The original's leading timesteps count from 1: leave that out and the parity test must fail."""
    correct = NoiseSchedule.timesteps
    monkeypatch.setattr(NoiseSchedule, "timesteps", lambda *args: correct(*args) - 1)
    for sampler in EVEN:
        with pytest.raises(AssertionError):
            assert_parity(sampler, "leading", "eps", False, 10, 0.0, torch.float32, monkeypatch, rtol=1e-4, atol=5e-5)


# What the papers prove


@pytest.mark.parametrize("sampler, prediction", list(itertools.product([name for name in EVEN if name in DETERMINISTIC], ("eps", "v"))))
def test_the_error_falls_with_the_order_of_the_method(sampler, prediction):
    """On Gaussian data dx/dsigma has a closed solution: x - MEAN shrinks as sqrt(STD^2 + sigma^2)."""
    schedule = make_schedule(prediction)
    x = torch.linspace(-2, 2, 5, dtype=torch.float64)[None]
    sigma = ((1 - schedule.alpha_bar) / schedule.alpha_bar).sqrt()
    shrunk = ((STD**2 + sigma[199] ** 2) / (STD**2 + sigma[999] ** 2)).sqrt()
    exact = MEAN + (x / schedule.alpha_bar[999].sqrt() - MEAN) * shrunk
    errors = []
    for steps in (100, 200):
        walk = list(sample(make_model(schedule, of_a_gaussian), x, schedule, sampler=sampler, steps=steps, spacing="trailing"))
        i = steps * 8 // 10
        assert walk[i].t == 199  # reached by the step before
        errors.append((walk[i - 1].x_t / schedule.alpha_bar[199].sqrt() - exact).abs().max())
    order = 1 if (sampler, prediction) == ("plms", "v") else SAMPLERS[sampler].order  # see plms
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.1  # 200 steps are near the limit: 0.06 for plms, 0.01 for the others


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("sampler, eta", ETAS)
def test_the_exact_denoiser_of_gaussian_data_gives_gaussian_data(sampler, eta, prediction):
    schedule = make_schedule(prediction)
    generator = torch.Generator().manual_seed(0)

    def noise():
        return torch.randn(1, 20_000, generator=generator, dtype=torch.float64)

    x_0 = MEAN + STD * noise()
    x = schedule.q_sample(x_0, torch.tensor([999]), noise())
    model = make_model(schedule, of_a_gaussian)
    *_, last = sample(model, x, schedule, sampler=sampler, steps=250, spacing="trailing", eta=eta, noise=noise)
    left = 0.0 if SAMPLERS[sampler].ends_at_zero else 1 - schedule.alpha_bar[0]
    # 20,000 draws know the mean to 0.003 and the deviation to 0.002; 250 steps of the stochastic ones shrink it by 0.015
    assert abs(last.x_t.mean() - MEAN) < 0.01
    assert abs(last.x_t.std() - math.sqrt(STD**2 + left)) < 0.02


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("sampler", EVEN)
def test_every_x_t_is_the_picture_and_noise_in_the_proportion_of_its_level(sampler, prediction, spacing):
    """Where the data is a single picture, x0_hat is that picture, and without fresh noise eps_hat stays what it was."""
    schedule = make_schedule(prediction)
    x, *rest = noise_list()
    picture = torch.linspace(-1, 1, 64, dtype=torch.float64).reshape(4, 4, 4).expand(2, 4, 4, 4)
    model = make_model(schedule, lambda x, a, s: picture)
    settings = dict(sampler=sampler, steps=7, spacing=spacing)
    walk = list(sample(model, x, schedule, **settings, noise=iter(rest).__next__))
    start, *after = levels(schedule, **settings)
    eps = (x - start.sqrt_alpha_bar * picture) / start.sqrt_one_minus_alpha_bar
    for step, level in zip(walk, after):
        torch.testing.assert_close(step.x0_hat, picture, rtol=0, atol=1e-10)  # float64
        if sampler == "plms" and prediction == "v":
            pass  # extrapolates v, which does change
        elif sampler in DETERMINISTIC:
            torch.testing.assert_close(step.x_t, level.sqrt_alpha_bar * picture + level.sqrt_one_minus_alpha_bar * eps, rtol=0, atol=1e-10)
        elif level.sqrt_one_minus_alpha_bar:
            fresh = (step.x_t - level.sqrt_alpha_bar * picture) / level.sqrt_one_minus_alpha_bar
            assert abs(fresh.std() - 1) < 0.2 and not torch.allclose(fresh, eps)  # 128 draws know it to 0.06
    if SAMPLERS[sampler].ends_at_zero:
        torch.testing.assert_close(walk[-1].x_t, picture, rtol=0, atol=1e-10)


def test_euler_ancestral_is_ddpm_written_another_way():
    schedule = make_schedule()
    model, noises = make_model(schedule, of_two_modes), noise_list()
    a, b = (ours(model, schedule, noises, sampler=sampler, steps=20) for sampler in ("ddpm", "euler_ancestral"))
    torch.testing.assert_close(a, b, rtol=0, atol=1e-12)  # float64


def test_karras_levels_are_even_in_the_seventh_root_of_sigma():
    sigmas = karras_sigmas(0.03, 14.6, 10)
    assert np.allclose([sigmas[0], sigmas[-1]], [14.6, 0.03])
    assert np.allclose(np.diff(sigmas ** (1 / 7), n=2), 0)


# How it behaves


@pytest.mark.parametrize("steps", [1, 2, 30])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_n_steps_are_n_steps_and_the_model_is_called_as_often_as_is_said(sampler, steps):
    schedule = make_schedule()
    model, calls = make_model(schedule, of_two_modes), []
    x = noise_list()[0]

    def counting(x_t, t):
        calls.append(t)
        assert t.shape == (2,) and t.dtype == torch.int64 and t[0] == t[1]
        return model(x_t, t)

    walk = list(sample(counting, x, schedule, sampler=sampler, steps=steps, noise=lambda: torch.randn_like(x)))
    assert [step.i for step in walk] == list(range(steps))
    assert len(calls) == SAMPLERS[sampler].model_calls(steps)
    assert all(isinstance(step, Step) and step.x_t.shape == step.x0_hat.shape == x.shape for step in walk)


def test_fractional_timesteps_reach_the_model_as_floats():
    schedule = make_schedule()
    model, seen = make_model(schedule, of_two_modes), []

    def recording(x_t, t):
        seen.append(t)
        return model(x_t, t)

    walk = list(sample(recording, noise_list()[0], schedule, sampler="euler", steps=8, spacing="linspace"))
    assert all(t.dtype == torch.float32 for t in seen)
    assert [step.t for step in walk] == pytest.approx(np.linspace(999, 0, 8))


def test_the_spacing_is_the_schedules_unless_one_is_given():
    schedule = NoiseSchedule(ScheduleConfig(spacing="trailing"))
    model, x = make_model(schedule, of_two_modes), noise_list()[0]
    assert next(sample(model, x, schedule, steps=10)).t == 999
    assert next(sample(model, x, schedule, steps=10, spacing="leading")).t == 901


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_no_input_changes_and_earlier_steps_stay_as_they_were(sampler):
    schedule = make_schedule("v")
    model, x = make_model(schedule, of_two_modes), noise_list()[0]
    noises = noise_list()[1:]
    x_before, tables = x.clone(), (schedule.alpha_bar.clone(), schedule.betas.clone())
    walk, copies = [], []
    for step in sample(model, x, schedule, sampler=sampler, steps=6, noise=iter(noises).__next__):
        walk.append(step)
        copies.append((step.x_t.clone(), step.x0_hat.clone()))
    assert torch.equal(x, x_before) and torch.equal(schedule.alpha_bar, tables[0]) and torch.equal(schedule.betas, tables[1])
    assert all(torch.equal(a, b) for a, b in zip(noises, noise_list()[1:]))
    assert all(torch.equal(step.x_t, x_t) and torch.equal(step.x0_hat, x0) for step, (x_t, x0) in zip(walk, copies))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_half_precision_model_sees_its_dtype_and_the_rounding_does_not_add_up(sampler, dtype):
    schedule = make_schedule("v", zero_snr=True)
    exact = make_model(schedule, of_two_modes)

    def half(x_t, t):
        assert x_t.dtype == dtype
        return exact(x_t.float(), t).to(dtype)

    noises = noise_list(torch.float32)
    settings = dict(sampler=sampler, steps=20, spacing="trailing")
    rounded = ours(half, schedule, [noise.to(dtype) for noise in noises], **settings)
    assert rounded.dtype == dtype
    # the model's own rounding of x_t and v: a few of the dtype's 1e-3 or 8e-3, times at most a few where modes are told apart
    mean_error = (rounded.float() - ours(exact, schedule, noises, **settings)).abs().mean()
    assert mean_error < 10 * torch.finfo(dtype).eps


def test_the_levels_of_a_schedule_fall_and_begin_where_the_dtype_can_follow():
    for sampler, zero_snr in itertools.product(SAMPLERS, (False, True)):
        for spacing in SPACINGS:
            visited = levels(make_schedule("v", zero_snr), sampler, 20, spacing)
            alpha_bars = [level.alpha_bar for level in visited]
            assert len(visited) == 21 and alpha_bars == sorted(alpha_bars)
            if zero_snr and spacing != "leading":
                assert visited[0].t == 999
                assert visited[0].alpha_bar == pytest.approx(2**-24 if SAMPLERS[sampler].divides_by_signal else 0, rel=1e-9)
    level = Level(10, 0.2)
    assert level.sigma == pytest.approx(2) and level.sqrt_alpha_bar**2 + level.sqrt_one_minus_alpha_bar**2 == pytest.approx(1)


# A hand on the loop


def history_free():
    return [name for name, row in SAMPLERS.items() if not row.multistep]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sending_back_the_latent_that_was_yielded_changes_no_bit(sampler):
    schedule = make_schedule()
    model, noises = make_model(schedule, of_two_modes), noise_list(torch.float32)
    x, *rest = noises
    steps, sent = sample(model, x, schedule, sampler=sampler, steps=6, noise=iter(rest).__next__), [None]
    trajectory = []
    for _ in range(6):
        step = steps.send(sent[-1])
        trajectory.append(step.x_t)
        sent.append(step.x_t)
    with pytest.raises(StopIteration):
        steps.send(sent[-1])
    assert torch.equal(torch.stack(trajectory), ours(model, schedule, noises, sampler=sampler, steps=6))


@pytest.mark.parametrize("sampler", history_free())
@pytest.mark.parametrize("start", [1, 4])
def test_a_start_at_a_level_goes_on_from_there(sampler, start):
    schedule = make_schedule()
    model, noises = make_model(schedule, of_two_modes), noise_list()
    whole = ours(model, schedule, noises, sampler=sampler, steps=6)
    draws = [] if sampler in DETERMINISTIC else noises[1 : start + 1]  # what the steps before have drawn
    rest = iter(noises[1 + len(draws) :])
    steps = list(sample(model, whole[start - 1], schedule, sampler=sampler, steps=6, start=start, noise=rest.__next__))
    assert [step.i for step in steps] == list(range(start, 6))
    assert [step.t for step in steps] == [level.t for level in levels(schedule, sampler, 6, "leading")[start:-1]]
    assert torch.equal(torch.stack([step.x_t for step in steps]), whole[start:])


@pytest.mark.parametrize("sampler", [name for name, row in SAMPLERS.items() if row.multistep])
def test_a_multistep_sampler_starts_with_no_history_and_keeps_it_where_a_latent_is_replaced(sampler):
    schedule = make_schedule()
    model, noises = make_model(schedule, of_two_modes), noise_list()
    whole = ours(model, schedule, noises, sampler=sampler, steps=6)
    first = next(sample(model, whole[2], schedule, sampler=sampler, steps=6, start=3))
    assert not torch.allclose(first.x_t, whole[3])
    steps = sample(model, noises[0], schedule, sampler=sampler, steps=6)
    for _ in range(3):
        step = next(steps)
    shifted = steps.send(step.x_t + 0.1)
    alone = next(sample(model, step.x_t + 0.1, schedule, sampler=sampler, steps=6, start=3))
    assert torch.equal(shifted.x0_hat, alone.x0_hat) and not torch.allclose(shifted.x_t, alone.x_t)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inpainting_is_a_loop_outside(sampler):
    """At each level the known half is the picture with its noise; what is drawn beside it has the known half's values."""
    schedule = make_schedule()
    generator = torch.Generator().manual_seed(0)
    picture = torch.full((1, 2, 2), MODE, dtype=torch.float64)

    def x0_hat(x, a, s):  # data whose cells are all alike: +MODE or -MODE
        return MODE * torch.tanh(a * MODE * x.sum(dim=(1, 2), keepdim=True) / s**2).expand_as(x)

    noise = partial(torch.randn, 1, 2, 2, generator=generator, dtype=torch.float64)
    visited = levels(schedule, sampler, 20, "leading")
    steps = sample(make_model(schedule, x0_hat), noise(), schedule, sampler=sampler, steps=20, noise=noise)
    step = next(steps)
    for level in visited[1:-1]:
        known = level.sqrt_alpha_bar * picture + level.sqrt_one_minus_alpha_bar * noise()
        step = steps.send(torch.cat([known[..., :1], step.x_t[..., 1:]], dim=-1))
    torch.testing.assert_close(step.x_t[..., 1:], picture[..., 1:], rtol=0, atol=0.1)  # ddim and plms leave the noise of timestep 0


def test_a_latent_of_another_shape_is_refused():
    schedule = make_schedule()
    steps = sample(make_model(schedule, of_two_modes), noise_list()[0], schedule, steps=3)
    next(steps)
    with pytest.raises(ValueError, match=r"a latent of shape \(1, 4, 4, 4\) was sent; expected \(2, 4, 4, 4\)"):
        steps.send(torch.zeros(1, 4, 4, 4))


# A sampler of one's own


def straight_to_x0(denoise, x_t, level, next_level):
    x0_hat, eps_hat = denoise(x_t, level)
    return next_level.sqrt_alpha_bar * x0_hat + next_level.sqrt_one_minus_alpha_bar * eps_hat, x0_hat


def test_a_sampler_is_a_function_and_a_row(monkeypatch):
    """From here to pictures: what draws them knows samplers by the table alone."""
    halves = Sampler(
        straight_to_x0,
        "Halves",
        "every level has half the noise of the last",
        levels=lambda schedule, alpha_bar, steps, spacing: [Level(999 - i, 1 - 0.5**i * 0.9) for i in range(steps)],
        own_spacing="halves",
        ends_at_zero=False,
    )
    monkeypatch.setitem(SAMPLERS, "halves", halves)
    model = small_model()
    *steps, last = model.denoise("a cat", sampler="halves", steps=4)
    assert [step.t for step in steps] == [999, 998, 997] and last.x_t.isfinite().all()
    with pytest.raises(ValueError, match="unknown; choose .*halves"):
        model.denoise("a cat", sampler="thirds")


def test_web_interfaces_know_each_sampler_by_another_name():
    assert len({(row.web_name, row.web_schedule or row.own_spacing) for row in SAMPLERS.values()}) == len(SAMPLERS)


# What it refuses


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(sampler="ddmp"), "sampler 'ddmp' unknown; choose ddpm, ddim, plms, euler, euler_ancestral, heun, dpmpp_2m, dpmpp_2m_karras"),
        (dict(spacing="karras"), "spacing 'karras' unknown; choose leading, linspace, trailing"),
        (dict(steps=0), r"steps 0 is outside 1\.\.1000"),
        (dict(steps=-3), "steps -3 is outside"),
        (dict(steps=1001), "steps 1001 is outside"),
        (dict(steps=1000, sampler="dpmpp_2m"), r"steps 1000 is outside 1\.\.999 for sampler 'dpmpp_2m'"),
        (dict(eta=-0.1), r"eta -0\.1 is outside 0\.\.1"),
        (dict(eta=math.nan), "eta nan is outside"),
        (dict(eta=0.5, sampler="euler"), "eta 0.5 belongs to sampler 'ddim'"),
        (dict(eta=0.5), "sampler 'ddim' draws noise; give noise="),
        (dict(sampler="ddpm"), "sampler 'ddpm' draws noise; give noise="),
        (dict(sampler="euler_ancestral"), "sampler 'euler_ancestral' draws noise"),
        (dict(steps=5, start=5), r"start 5 is outside 0\.\.4"),
        (dict(start=-1), r"start -1 is outside 0\.\.29"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_before_the_model_is_called(settings, message):
    with pytest.raises(ValueError, match=message):
        sample(lambda x_t, t: pytest.fail("called"), noise_list()[0], make_schedule(), **settings)


@pytest.mark.parametrize("sampler", [name for name, row in SAMPLERS.items() if not row.divides_by_signal])
def test_an_eps_model_is_refused_where_there_is_nothing_but_noise(sampler):
    x = noise_list()[0]
    with pytest.raises(ValueError, match="cannot start an eps-model at timestep 999.*use a v-model"):
        sample(lambda x_t, t: x_t, x, make_schedule("eps", True), sampler=sampler, spacing="trailing", noise=lambda: x)
