"""Answers of lesson 12."""

import torch
from matplotlib.figure import Figure

from lessons.common import curves, picture_grid
from lessons.exercises import Exercise, difference
from minidiff.trainers.engine.ema import EMA

# ------------------------------------------------------------------------------------------------------ velocity


def velocity(alpha_bar, x_0, t, eps):
    a = alpha_bar[t][:, None, None, None]
    return a.sqrt() * eps - (1 - a).sqrt() * x_0


def check_velocity(function) -> str | None:
    """At several timesteps at once, the last one pure noise."""
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 3, 2, 4, 4, generator=generator)
    alpha_bar, t = torch.linspace(0.99, 0.0, 10), torch.tensor([1, 6, 9])
    mistakes = {
        "adds the two terms, which makes x_t with the roles swapped: v is their difference": added,
        "gives x_0 the root of alpha_bar and eps the other one: it is the other way round": factors_swapped,
        "subtracts in the wrong order: v is sqrt(a) eps minus sqrt(1 - a) x_0": reversed_sign,
        "uses alpha_bar without square roots": without_roots,
        "computes x_t: that is the input of the network, not its target": x_t_itself,
        "returns the noise, which is the target of the other kind of model": noise_alone,
        "takes the root before it subtracts from 1: (1 - a).sqrt()": root_too_early,
    }
    arguments = (alpha_bar, x_0, t, eps)
    return difference(function(*arguments), velocity(*arguments), {sentence: slip(*arguments) for sentence, slip in mistakes.items()})


def _a(alpha_bar, t):
    return alpha_bar[t][:, None, None, None]


def added(alpha_bar, x_0, t, eps):
    a = _a(alpha_bar, t)
    return a.sqrt() * eps + (1 - a).sqrt() * x_0


def factors_swapped(alpha_bar, x_0, t, eps):
    a = _a(alpha_bar, t)
    return (1 - a).sqrt() * eps - a.sqrt() * x_0


def reversed_sign(alpha_bar, x_0, t, eps):
    return -velocity(alpha_bar, x_0, t, eps)


def without_roots(alpha_bar, x_0, t, eps):
    a = _a(alpha_bar, t)
    return a * eps - (1 - a) * x_0


def x_t_itself(alpha_bar, x_0, t, eps):
    a = _a(alpha_bar, t)
    return a.sqrt() * x_0 + (1 - a).sqrt() * eps


def noise_alone(alpha_bar, x_0, t, eps):
    return eps.clone()


def root_too_early(alpha_bar, x_0, t, eps):
    a = _a(alpha_bar, t)
    return a.sqrt() * eps - (1 - a.sqrt()) * x_0


def without_axes(alpha_bar, x_0, t, eps):
    a = alpha_bar[t]
    return a.sqrt() * eps - (1 - a).sqrt() * x_0


def _ramp_and_noise() -> tuple[torch.Tensor, torch.Tensor]:
    ramp = torch.linspace(-1.7, 1.7, 32).expand(1, 1, 32, 32)
    return ramp, torch.randn(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))


def number_velocity(function) -> str:
    x_0, eps = _ramp_and_noise()
    table = torch.linspace(1.0, 0.0, 11)
    sizes = [float(function(table, x_0, torch.tensor([t]), eps).square().mean()) for t in (1, 5, 9)]
    return f"its mean square is {sizes[0]:.1f}, {sizes[1]:.1f} and {sizes[2]:.1f} with little, half and much noise: about one throughout"


def picture_velocity(function) -> Figure:
    x_0, eps = _ramp_and_noise()
    table = torch.linspace(1.0, 0.0, 11)
    row = [function(table, x_0, torch.tensor([t]), eps)[0, 0] for t in (0, 3, 7, 10)]
    return picture_grid([row], ["no noise", "some", "much", "noise alone"])


# ------------------------------------------------------------------------------------------------------ ema_update

DECAY = 0.95


def ema_update(mean, weight, decay, n):
    d = min(decay, (1 + n) / (10 + n))
    return d * mean + (1 - d) * weight


def library_ema_update(mean, weight, decay, n):
    module = torch.nn.ParameterDict({"w": mean.clone()})
    average = EMA(module, decay)
    average.steps = n
    module["w"].data.copy_(weight)
    average.update(module)
    return average.mean["w"]


def check_ema_update(function) -> str | None:
    """Late, where the decay has been reached, and early, where it has not."""
    generator = torch.Generator().manual_seed(0)
    mistakes = {
        "gives the old mean the share 1 - d and the new weight the share d: the mean should stay nearly as it is, so it gets d": exchanged,
        "takes the decay as it is from the first step on: d has to rise, min(decay, (1 + n) / (10 + n))": without_a_rise,
        "takes the larger of the two numbers, so that d never stops at the decay: take min(decay, (1 + n) / (10 + n))": the_larger,
        "returns the weight: the mean keeps the share d": weight_alone,
    }
    for n in (500, 2):
        mean, weight = (torch.randn(3, 4, generator=generator) for _ in range(2))
        arguments = (mean, weight, DECAY, n)
        wrong = difference(
            function(*arguments),
            ema_update(*arguments),
            {sentence: slip(*arguments) for sentence, slip in mistakes.items()},
            of=f"at n = {n}",
            terms={"mean": mean, "weight": weight},
        )
        if wrong is not None:
            return wrong
    return None


def exchanged(mean, weight, decay, n):
    d = min(decay, (1 + n) / (10 + n))
    return (1 - d) * mean + d * weight


def the_larger(mean, weight, decay, n):
    d = max(decay, (1 + n) / (10 + n))
    return d * mean + (1 - d) * weight


def without_a_rise(mean, weight, decay, n):
    return decay * mean + (1 - decay) * weight


def weight_alone(mean, weight, decay, n):
    return weight.clone()


def no_share(mean, weight, decay, n):
    return min(decay, (1 + n) / (10 + n)) * mean + weight


def in_place(mean, weight, decay, n):
    d = min(decay, (1 + n) / (10 + n))
    return weight.lerp_(mean, d)


def _jitter(function) -> tuple[list[float], list[float]]:
    """A weight that goes to 1 and jitters, and its mean."""
    generator, mean = torch.Generator().manual_seed(0), torch.zeros(1)
    weights, means = [], []
    for n in range(200):
        weight = 1 - 0.97 ** torch.tensor([float(n)]) + 0.2 * torch.randn(1, generator=generator)
        mean = function(mean, weight, DECAY, n)
        weights.append(float(weight))
        means.append(float(mean))
    return weights, means


def number_ema_update(function) -> str:
    weights, means = (torch.tensor(values[100:]) for values in _jitter(function))
    return f"a weight that jitters by {weights.std():.2f} has a mean that jitters by {means.std():.2f}"


def picture_ema_update(function) -> Figure:
    weights, means = _jitter(function)
    return curves({"the weight": (range(200), weights), "its mean": (range(200), means)}, "step", "value", dashed=["its mean"])


# ------------------------------------------------------------------------------------------------------ rate_at


def rate_at(step, steps, hold, rate):
    left = (steps - step) / (steps - hold)
    return rate * min(1.0, left)


def check_rate_at(function) -> str | None:
    mistakes = {
        "falls from the first step on: it is constant for the first `hold` steps": no_hold,
        "never falls: after `hold` steps it goes down to zero": constant,
        "rises above the rate before `hold`: take the smaller one of 1 and the fraction": above,
        "returns the share of the rate that is left: multiply it by the rate": share_alone,
        "counts the steps already taken, so it rises: what is left is steps - step": rising,
    }
    for step in (55, 20, 90):
        arguments = (step, 100, 40, 0.5)
        wrong = difference(
            function(*arguments),
            rate_at(*arguments),
            {sentence: slip(*arguments) for sentence, slip in mistakes.items()},
            of=f"at step {step} of 100, with hold 40 and rate 0.5",
        )
        if wrong is not None:
            return wrong
    return None


def no_hold(step, steps, hold, rate):
    return rate * (steps - step) / steps


def constant(step, steps, hold, rate):
    return rate


def above(step, steps, hold, rate):
    return rate * (steps - step) / (steps - hold)


def share_alone(step, steps, hold, rate):
    return min(1.0, (steps - step) / (steps - hold))


def rising(step, steps, hold, rate):
    return rate * min(1.0, step / (steps - hold))


def number_rate_at(function) -> str:
    rates = [function(step, 100, 80, 1.0) for step in (0, 79, 90, 99)]
    return f"of 100 steps with hold 80: {', '.join(f'{rate:.2f}' for rate in rates)} at steps 0, 79, 90 and 99"


def picture_rate_at(function) -> Figure:
    lines = {f"hold {hold}": (range(100), [function(step, 100, hold, 1.0) for step in range(100)]) for hold in (0, 40, 80)}
    return curves(lines, "step", "learning rate", ylim=(0, None))


EXERCISES = (
    Exercise(
        velocity,
        check_velocity,
        wrong=(
            (added, "adds the two terms"),
            (factors_swapped, "gives x_0 the root"),
            (reversed_sign, "subtracts in the wrong order"),
            (without_roots, "without square roots"),
            (x_t_itself, "computes x_t"),
            (noise_alone, "returns the noise"),
            (root_too_early, "takes the root before"),
            (without_axes, "two tensors that do not fit"),
        ),
        number=number_velocity,
        picture=picture_velocity,
    ),
    Exercise(
        ema_update,
        check_ema_update,
        wrong=(
            (exchanged, "so it gets d"),
            (the_larger, "the larger of the two"),
            (without_a_rise, "d has to rise"),
            (weight_alone, "returns the weight"),
            (no_share, "the factor of that term"),
            (in_place, "changes its argument weight in place"),
        ),
        library=library_ema_update,
        number=number_ema_update,
        picture=picture_ema_update,
    ),
    Exercise(
        rate_at,
        check_rate_at,
        wrong=(
            (no_hold, "falls from the first step on"),
            (constant, "never falls"),
            (above, "rises above the rate"),
            (share_alone, "the share of the rate"),
            (rising, "counts the steps already taken"),
        ),
        number=number_rate_at,
        picture=picture_rate_at,
    ),
)
