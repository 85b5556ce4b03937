"""Answers of lesson 11."""

import math

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lessons.exercises import Exercise, difference
from minidiff import samplers
from minidiff.samplers import Denoiser, Level, heun

# ------------------------------------------------------------------------------------------------------ karras_sigmas


def karras_sigmas(sigma_min, sigma_max, steps):
    ends = sigma_max ** (1 / 7), sigma_min ** (1 / 7)
    return torch.linspace(*ends, steps) ** 7


def library_karras_sigmas(sigma_min, sigma_max, steps):
    return torch.from_numpy(samplers.karras_sigmas(sigma_min, sigma_max, steps)).float()


def check_karras_sigmas(function) -> str | None:
    arguments = (0.1, 80.0, 9)
    mistakes = {
        "spaces the levels evenly in sigma itself: space the seventh roots, and raise them to the power of 7 afterwards": linear,
        "rises from the smallest level to the largest: begin with sigma_max": rising,
        "stays with the seventh roots: raise the result to the power of 7": roots,
        "spaces the logarithms evenly: here it is the seventh roots": logarithms,
        "raises to the power of 7 first and takes the root afterwards: the other way round": inverted,
        "gives one level more than asked for: steps counts levels, both ends among them": one_more,
        "leaves out the last level, sigma_min: linspace includes both ends": without_end,
    }
    got = function(*arguments)
    if isinstance(got, np.ndarray):
        got = torch.from_numpy(got).float()
    return difference(got, karras_sigmas(*arguments), {sentence: slip(*arguments) for sentence, slip in mistakes.items()})


def linear(sigma_min, sigma_max, steps):
    return torch.linspace(sigma_max, sigma_min, steps)


def rising(sigma_min, sigma_max, steps):
    return karras_sigmas(sigma_max, sigma_min, steps)


def roots(sigma_min, sigma_max, steps):
    return torch.linspace(sigma_max ** (1 / 7), sigma_min ** (1 / 7), steps)


def logarithms(sigma_min, sigma_max, steps):
    return torch.linspace(math.log(sigma_max), math.log(sigma_min), steps).exp()


def inverted(sigma_min, sigma_max, steps):
    return torch.linspace(sigma_max**7, sigma_min**7, steps) ** (1 / 7)


def one_more(sigma_min, sigma_max, steps):
    return karras_sigmas(sigma_min, sigma_max, steps + 1)


def without_end(sigma_min, sigma_max, steps):
    return karras_sigmas(sigma_min, sigma_max, steps + 1)[:-1]


def a_list(sigma_min, sigma_max, steps):
    return karras_sigmas(sigma_min, sigma_max, steps).tolist()


def number_karras_sigmas(function) -> str:
    sigmas = function(0.03, 15.0, 20)
    below = int((sigmas < 1).sum())
    return f"of {len(sigmas)} levels from {sigmas[0]:.1f} to {sigmas[-1]:.2f}, {below} lie below 1; evenly in sigma it would be 2"


def picture_karras_sigmas(function) -> Figure:
    fig, axis = plt.subplots(figsize=(6, 2.6))
    rows = {"even in sigma": torch.linspace(15.0, 0.03, 20), "yours": function(0.03, 15.0, 20)}
    for i, sigmas in enumerate(rows.values()):
        axis.plot(sigmas, [i] * len(sigmas), "|", markersize=30)
    axis.set(yticks=range(len(rows)), yticklabels=list(rows), ylim=(-0.6, 1.6), xlabel="noise level sigma")
    axis.invert_xaxis()
    return fig


# ------------------------------------------------------------------------------------------------------ heun_step


def heun_step(slope, x, now, then):
    d_now = slope(x, now)
    d_then = slope(x + (then.sigma - now.sigma) * d_now, then)
    return x + (then.sigma - now.sigma) * (d_now + d_then) / 2


def library_heun_step(slope, x, now, then):
    looks = iter((now, then))

    def model(x_t, t):  # the library's heun calls a model, here one that predicts eps
        level = next(looks)
        return slope(x_t / level.sqrt_alpha_bar, level)

    start = Level(now.t, now.alpha_bar * (1 + 1e-12))  # at the exact start of zero terminal SNR the library goes another way
    x_t, _ = heun(Denoiser(model, "eps", x.dtype), x * start.sqrt_alpha_bar, start, then)
    return x_t / then.sqrt_alpha_bar


def check_heun_step(function) -> str | None:
    """From sigma 2 to sigma 1, on a curve whose slope depends on both x and sigma."""
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    now, then = Level(700, 0.2), Level(400, 0.5)

    def slope(x, level):
        return (x - torch.tanh(x / 2)) / level.sigma

    mistakes = {
        "uses the slope at the beginning alone, which is Euler's step: ask for one at its end too": with_one_slope,
        "uses the slope at the end alone: take the mean of both": with_the_last_slope,
        "asks for the second slope at x, not at the point that the first one leads to": without_moving,
        "asks for the second slope with the noise level of now: the point that the first one leads to lies at then": at_the_old_level,
        "adds up two slopes without halving: the step is twice too long": without_halving,
        "sets off again from Euler's point: both slopes count from x": from_the_wrong_point,
        "looks for the second slope on the wrong side: ask at x + (then.sigma - now.sigma) * d_now": on_the_wrong_side,
        "walks up to more noise: sigma falls, so that the width of a step, then.sigma - now.sigma, is negative": upwards,
        "returns the mean slope: multiply it by the width of the step and add it to x": mean_slope_alone,
    }
    arguments = (slope, x, now, then)
    return difference(
        function(slope, x, now, then), heun_step(*arguments), {sentence: slip(*arguments) for sentence, slip in mistakes.items()}
    )


def with_one_slope(slope, x, now, then):
    return x + (then.sigma - now.sigma) * slope(x, now)


def with_the_last_slope(slope, x, now, then):
    return x + (then.sigma - now.sigma) * slope(with_one_slope(slope, x, now, then), then)


def without_moving(slope, x, now, then):
    return x + (then.sigma - now.sigma) * (slope(x, now) + slope(x, then)) / 2


def at_the_old_level(slope, x, now, then):
    return x + (then.sigma - now.sigma) * (slope(x, now) + slope(with_one_slope(slope, x, now, then), now)) / 2


def without_halving(slope, x, now, then):
    return x + (then.sigma - now.sigma) * (slope(x, now) + slope(with_one_slope(slope, x, now, then), then))


def from_the_wrong_point(slope, x, now, then):
    moved = with_one_slope(slope, x, now, then)
    return moved + (then.sigma - now.sigma) * (slope(x, now) + slope(moved, then)) / 2


def on_the_wrong_side(slope, x, now, then):
    d_now = slope(x, now)
    d_then = slope(x - (then.sigma - now.sigma) * d_now, then)
    return x + (then.sigma - now.sigma) * (d_now + d_then) / 2


def upwards(slope, x, now, then):
    d_now = slope(x, now)
    d_then = slope(x + (now.sigma - then.sigma) * d_now, then)
    return x + (now.sigma - then.sigma) * (d_now + d_then) / 2


def mean_slope_alone(slope, x, now, then):
    return (heun_step(slope, x, now, then) - x) / (then.sigma - now.sigma)


def slope_without_level(slope, x, now, then):
    d_now = slope(x)
    return x + (then.sigma - now.sigma) * (d_now + slope(x + (then.sigma - now.sigma) * d_now)) / 2


def _round(step, steps: int = 16) -> torch.Tensor:
    """Points [steps + 1, 2] of a way that should lead around a circle: the slope is at right angles to the point."""

    def slope(x, level):
        return torch.stack([-x[:, 1], x[:, 0]], dim=1)

    sigmas = torch.linspace(2 * math.pi + 1, 1, steps + 1, dtype=torch.float64)  # one round
    level = [Level(0, float(1 / (1 + sigma**2))) for sigma in sigmas]
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    points = [x[0]]
    for now, then in zip(level, level[1:]):
        x = step(slope, x, now, then)
        points.append(x[0])
    return torch.stack(points)


def number_heun_step(function) -> str:
    off = {name: float((_round(step)[-1] - _round(step)[0]).norm()) for name, step in (("Euler", with_one_slope), ("yours", function))}
    return f"once around a circle in 16 steps: Euler ends {off['Euler']:.2f} from its start, yours {off['yours']:.2f}"


def picture_heun_step(function) -> Figure:
    fig, axis = plt.subplots(figsize=(6, 6))
    angles = torch.linspace(0, 2 * math.pi, 200)
    axis.plot(angles.cos(), angles.sin(), color="black", linewidth=1, label="the curve")
    for step, label in ((with_one_slope, "Euler"), (function, "yours")):
        axis.plot(*_round(step).T, "o--", label=label)
    axis.set(aspect="equal")
    axis.legend()
    return fig


# ------------------------------------------------------------------------------------------------------ dpm_step


def dpm_step(x, x0_hat, x0_before, before, now, then):
    r = math.log(before.sigma / now.sigma) / math.log(now.sigma / then.sigma)
    middle = x0_hat + (x0_hat - x0_before) / (2 * r)
    ratio = then.sigma / now.sigma
    return ratio * x + (1 - ratio) * middle


def check_dpm_step(function) -> str | None:
    generator = torch.Generator().manual_seed(0)
    x, x0_hat, x0_before = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(3))
    before, now, then = (Level(t, 1 / (1 + sigma**2)) for t, sigma in ((900, 7.0), (700, 2.0), (400, 1.2)))
    mistakes = {
        "is Euler's step: the prediction of the step before is not used": no_memory,
        "turns r upside down: it is the length of the last step divided by that of this one": r_upside_down,
        "leaves out the logarithms in r: lengths are differences of log sigma": r_without_logarithms,
        "divides by r instead of 2 r: half a step leads to the middle": whole_step,
        "extrapolates backward: add x0_hat - x0_before, the direction in which the prediction changes": backward,
        "starts the line at x0_before: it starts at x0_hat and adds the difference to that": from_before,
        "swaps the shares: x gets then.sigma / now.sigma, and the prediction the rest": shares_swapped,
        "turns the fraction upside down: then.sigma / now.sigma is below 1": ratio_upside_down,
        "adds the whole of the prediction to x, without its share 1 - then.sigma / now.sigma": no_share,
        "returns the extrapolated prediction: the last line mixes it with x": prediction_alone,
        "takes both steps as equally long: r is the fraction of their lengths": equal_lengths,
    }
    arguments = (x, x0_hat, x0_before, before, now, then)
    terms = {"x": x, "x0_hat": x0_hat, "x0_before": x0_before}
    return difference(
        function(*arguments), dpm_step(*arguments), {sentence: slip(*arguments) for sentence, slip in mistakes.items()}, terms=terms
    )


def _mixed(x, prediction, now, then):
    return then.sigma / now.sigma * x + (1 - then.sigma / now.sigma) * prediction


def _r(before, now, then):
    return math.log(before.sigma / now.sigma) / math.log(now.sigma / then.sigma)


def no_memory(x, x0_hat, x0_before, before, now, then):
    return _mixed(x, x0_hat, now, then)


def r_upside_down(x, x0_hat, x0_before, before, now, then):
    return _mixed(x, x0_hat + (x0_hat - x0_before) * _r(before, now, then) / 2, now, then)


def r_without_logarithms(x, x0_hat, x0_before, before, now, then):
    r = (before.sigma / now.sigma) / (now.sigma / then.sigma)
    return _mixed(x, x0_hat + (x0_hat - x0_before) / (2 * r), now, then)


def whole_step(x, x0_hat, x0_before, before, now, then):
    return _mixed(x, x0_hat + (x0_hat - x0_before) / _r(before, now, then), now, then)


def backward(x, x0_hat, x0_before, before, now, then):
    return _mixed(x, x0_hat + (x0_before - x0_hat) / (2 * _r(before, now, then)), now, then)


def from_before(x, x0_hat, x0_before, before, now, then):
    return _mixed(x, x0_before + (x0_hat - x0_before) / (2 * _r(before, now, then)), now, then)


def _middle(x0_hat, x0_before, before, now, then):
    return x0_hat + (x0_hat - x0_before) / (2 * _r(before, now, then))


def shares_swapped(x, x0_hat, x0_before, before, now, then):
    return _mixed(_middle(x0_hat, x0_before, before, now, then), x, now, then)


def ratio_upside_down(x, x0_hat, x0_before, before, now, then):
    return _mixed(x, _middle(x0_hat, x0_before, before, now, then), then, now)


def no_share(x, x0_hat, x0_before, before, now, then):
    return then.sigma / now.sigma * x + _middle(x0_hat, x0_before, before, now, then)


def prediction_alone(x, x0_hat, x0_before, before, now, then):
    return _middle(x0_hat, x0_before, before, now, then)


def equal_lengths(x, x0_hat, x0_before, before, now, then):
    return _mixed(x, x0_hat + (x0_hat - x0_before) / 2, now, then)


def x_not_shrunk(x, x0_hat, x0_before, before, now, then):
    return x + (1 - then.sigma / now.sigma) * _middle(x0_hat, x0_before, before, now, then)


def level_as_a_number(x, x0_hat, x0_before, before, now, then):
    return x * (then / now) + (1 - then / now) * x0_hat


def number_dpm_step(function) -> str:
    """How the error falls on numbers of deviation 1/2, of which the best prediction is known."""

    def error(steps):
        sigmas = karras_sigmas(0.03, 15.0, steps + 1).double().tolist()
        level = [Level(0, 1 / (1 + sigma**2)) for sigma in sigmas]
        x, x0_before, before = torch.ones(1, dtype=torch.float64), None, None
        for now, then in zip(level, level[1:]):
            x0_hat = x / (1 + 4 * now.sigma**2)
            x = no_memory(x, x0_hat, None, None, now, then) if before is None else function(x, x0_hat, x0_before, before, now, then)
            x0_before, before = x0_hat, now
        return abs(float(x) / ((0.25 + sigmas[-1] ** 2) / (0.25 + sigmas[0] ** 2)) ** 0.5 - 1)

    return f"twice the steps, {error(64) / error(128):.1f} times smaller error: second order would be 4"


EXERCISES = (
    Exercise(
        karras_sigmas,
        check_karras_sigmas,
        wrong=(
            (linear, "evenly in sigma itself"),
            (rising, "rises from the smallest"),
            (roots, "stays with the seventh roots"),
            (logarithms, "spaces the logarithms"),
            (inverted, "the other way round"),
            (one_more, "one level more"),
            (without_end, "leaves out the last level"),
            (a_list, "gives a list"),
        ),
        library=library_karras_sigmas,
        number=number_karras_sigmas,
        picture=picture_karras_sigmas,
    ),
    Exercise(
        heun_step,
        check_heun_step,
        wrong=(
            (with_one_slope, "which is Euler's step"),
            (with_the_last_slope, "the slope at the end alone"),
            (without_moving, "asks for the second slope at x"),
            (at_the_old_level, "with the noise level of now"),
            (without_halving, "without halving"),
            (from_the_wrong_point, "sets off again"),
            (on_the_wrong_side, "on the wrong side"),
            (upwards, "walks up"),
            (mean_slope_alone, "returns the mean slope"),
            (slope_without_level, "without 1 of its arguments"),
        ),
        library=library_heun_step,
        number=number_heun_step,
        picture=picture_heun_step,
    ),
    Exercise(
        dpm_step,
        check_dpm_step,
        wrong=(
            (no_memory, "is Euler's step"),
            (r_upside_down, "turns r upside down"),
            (r_without_logarithms, "leaves out the logarithms"),
            (whole_step, "divides by r instead of 2 r"),
            (backward, "extrapolates backward"),
            (from_before, "starts the line at x0_before"),
            (shares_swapped, "swaps the shares"),
            (ratio_upside_down, "turns the fraction upside down"),
            (no_share, "adds the whole of the prediction"),
            (prediction_alone, "returns the extrapolated prediction"),
            (equal_lengths, "equally long"),
            (x_not_shrunk, "multiplies x by 1"),
            (level_as_a_number, "which have no such operation"),
        ),
        number=number_dpm_step,
    ),
)
