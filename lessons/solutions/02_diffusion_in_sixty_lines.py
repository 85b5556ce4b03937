"""Answers of lesson 02."""

from collections.abc import Callable, Generator

import torch

from lessons.exercises import BLANK, Exercise, Misuse, difference
from minidiff.config import SD1
from minidiff.schedule import NoiseSchedule
from minidiff.trainers.engine.diffusion_loss import NoiseSample
from minidiff.trainers.engine.diffusion_loss import diffusion_loss as library_loss

# ------------------------------------------------------------------------------------------------------ diffusion_loss


def diffusion_loss(model, schedule, x_0, t, eps):
    x_t = schedule.q_sample(x_0, t, eps)
    return (model(x_t, t) - eps).square().mean(dim=-1)


def library_diffusion_loss(model, schedule, x_0, t, eps):
    """The library's takes pictures with captions: a point is one of 1 x 1 pixels, without a caption."""

    def unet(x_t, t, context):
        return model(x_t[..., 0, 0], t)[..., None, None]

    return library_loss(unet, schedule, x_0[..., None, None], x_0[..., None], NoiseSample(t, eps[..., None, None]))


def check_diffusion_loss(function) -> str | None:
    """With a model that depends on both of its inputs."""
    generator = torch.Generator().manual_seed(0)
    x_0, eps = (torch.randn(4, 2, generator=generator) for _ in range(2))
    t = torch.tensor([20, 300, 600, 999])
    arguments = (toy, NoiseSchedule(SD1.schedule), x_0, t, eps)
    mistakes = {
        "compares the prediction with x_0: the network is asked for the noise, so the target is eps": against_the_point,
        "shows the clean x_0 to the network: make x_t with schedule.q_sample first, and show that": shown_clean,
        "averages over the batch too, to one number: give one loss for each sample, shape [4], by mean(dim=-1)": one_number,
        "averages over the samples instead of over each sample's numbers: mean(dim=-1), which is the last axis": over_samples,
        "adds the two squares up, which is twice the loss: take their mean": summed,
        "gives the bare difference, which cancels out: square it": not_squared,
        "takes the absolute difference: the loss is the mean of the squares": absolute,
        "gives the square of each number, shape [4, 2]: take the mean over the last axis": not_averaged,
        "does not use the network: model(x_t, t) is compared with eps": without_model,
        "compares the prediction with x_t: the target is the noise that was put in, eps": against_x_t,
    }
    return difference(function(*arguments), diffusion_loss(*arguments), {sentence: slip(*arguments) for sentence, slip in mistakes.items()})


def toy(x_t, t):
    return 0.5 * x_t + t[:, None] / 1000


def against_the_point(model, schedule, x_0, t, eps):
    return (model(schedule.q_sample(x_0, t, eps), t) - x_0).square().mean(dim=-1)


def shown_clean(model, schedule, x_0, t, eps):
    return (model(x_0, t) - eps).square().mean(dim=-1)


def one_number(model, schedule, x_0, t, eps):
    return diffusion_loss(model, schedule, x_0, t, eps).mean()


def over_samples(model, schedule, x_0, t, eps):
    return (model(schedule.q_sample(x_0, t, eps), t) - eps).square().mean(dim=0)


def summed(model, schedule, x_0, t, eps):
    return (model(schedule.q_sample(x_0, t, eps), t) - eps).square().sum(dim=-1)


def not_squared(model, schedule, x_0, t, eps):
    return (model(schedule.q_sample(x_0, t, eps), t) - eps).mean(dim=-1)


def absolute(model, schedule, x_0, t, eps):
    return (model(schedule.q_sample(x_0, t, eps), t) - eps).abs().mean(dim=-1)


def not_averaged(model, schedule, x_0, t, eps):
    return (model(schedule.q_sample(x_0, t, eps), t) - eps).square()


def without_model(model, schedule, x_0, t, eps):
    return (schedule.q_sample(x_0, t, eps) - eps).square().mean(dim=-1)


def against_x_t(model, schedule, x_0, t, eps):
    x_t = schedule.q_sample(x_0, t, eps)
    return (model(x_t, t) - x_t).square().mean(dim=-1)


def without_t(model, schedule, x_0, t, eps):
    return (model(schedule.q_sample(x_0, t, eps)) - eps).square().mean(dim=-1)


def number_diffusion_loss(function) -> str:
    x_0, eps = torch.randn(2, 4000, 2, generator=torch.Generator().manual_seed(0))
    t = torch.arange(4000) % 1000
    loss = float(function(lambda x_t, t: torch.zeros_like(x_t), NoiseSchedule(SD1.schedule), x_0, t, eps).mean())
    return f"a network that always predicts no noise has a mean loss of {loss:.2f}"


# ------------------------------------------------------------------------------------------------------ train


def train(optimizer, draw_loss, steps):
    for _ in range(steps):
        loss = draw_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.detach()


def check_train(function) -> str | None:
    """On one weight and a loss that is another at each step; the order of the calls is noted."""
    got, expected = _followed(function), _followed(train)
    if got is None:
        return BLANK
    (losses, calls), (right, _) = got, expected
    if not all(isinstance(loss, torch.Tensor) for loss in losses):
        return "yields something other than a tensor: `yield loss.detach()`, the lesson stacks the losses"
    if any(loss.requires_grad for loss in losses):
        return "yields the loss with all that led to it, which fills the memory: `yield loss.detach()`"
    if len(losses) != len(right):
        return f"yields {len(losses)} losses for {len(right)} steps: draw a loss, take a step and yield, once in each round"
    said = difference(torch.stack(losses), torch.stack(right), of="as the losses of four steps")
    if said is None:
        return None
    for name, missing in {
        "backward": "never calls loss.backward(), so no weight gets a gradient",
        "step": "never calls optimizer.step(): gradients alone move nothing",
        "zero": "never calls optimizer.zero_grad(): PyTorch adds the new gradients to those of all the steps before",
    }.items():
        if name not in calls:
            return missing
    first = [calls.index(name) for name in ("zero", "backward", "step")]
    if first[1] < first[0] < first[2]:
        return "empties the gradients between backward and step, so the step finds none: call zero_grad() before backward()"
    if first[2] < first[1]:
        return "takes the step before backward(), with the gradients of the step before: backward() first, then step()"
    return said


def _followed(function) -> tuple[list, list[str]] | None:
    """The losses of four steps, and what was called in which order; None for a function that returns None."""
    weight, calls = torch.ones(1, requires_grad=True), []
    weight.register_hook(lambda gradient: calls.append("backward"))

    class Noted(torch.optim.SGD):
        def zero_grad(self, *args):
            calls.append("zero")
            super().zero_grad(*args)

        def step(self, *args):
            calls.append("step")
            return super().step(*args)

    targets = iter((0.0, 0.7, -0.4, 0.2, 0.9, 0.3))
    got = function(Noted([weight], lr=0.1), lambda: (weight - next(targets)).square().sum(), 4)
    if got is None:
        return None
    if not isinstance(got, Generator):
        raise Misuse("returns all at once: `yield` the loss inside the loop, so that training can be watched")
    return list(got), calls


def never_zeroed(optimizer, draw_loss, steps):
    for _ in range(steps):
        loss = draw_loss()
        loss.backward()
        optimizer.step()
        yield loss.detach()


def zeroed_too_late(optimizer, draw_loss, steps):
    for _ in range(steps):
        loss = draw_loss()
        loss.backward()
        optimizer.zero_grad()
        optimizer.step()
        yield loss.detach()


def no_step(optimizer, draw_loss, steps):
    for _ in range(steps):
        loss = draw_loss()
        optimizer.zero_grad()
        loss.backward()
        yield loss.detach()


def no_backward(optimizer, draw_loss, steps):
    for _ in range(steps):
        loss = draw_loss()
        optimizer.zero_grad()
        optimizer.step()
        yield loss.detach()


def step_too_early(optimizer, draw_loss, steps):
    for _ in range(steps):
        loss = draw_loss()
        optimizer.step()
        optimizer.zero_grad()
        loss.backward()
        yield loss.detach()


def not_detached(optimizer, draw_loss, steps):
    for _ in range(steps):
        loss = draw_loss()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss


def drawn_once(optimizer, draw_loss, steps):
    loss = draw_loss()
    for _ in range(steps):
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.detach()


def only_the_last(optimizer, draw_loss, steps):
    *_, last = train(optimizer, draw_loss, steps)
    yield last


def a_list(optimizer, draw_loss, steps):
    return list(train(optimizer, draw_loss, steps))


def plain_numbers(optimizer, draw_loss, steps):
    for loss in train(optimizer, draw_loss, steps):
        yield float(loss)


def number_train(function) -> str:
    """A line is fitted to points that lie on one."""
    x = torch.linspace(-1, 1, 20)
    slope, height = (torch.zeros(1, requires_grad=True) for _ in range(2))
    losses = list(function(torch.optim.SGD([slope, height], lr=0.3), lambda: (slope * x + height - (2 * x + 1)).square().mean(), 40))
    return f"in 40 steps the loss of a straight line falls from {float(losses[0]):.2f} to {float(losses[-1]):.0e}"


# ------------------------------------------------------------------------------------------------------ mean_x0


def mean_x0(x_t, a, points):
    squares = (x_t[:, None] - a[:, None].sqrt() * points).square().sum(dim=-1)
    weights = (-squares / (2 * (1 - a))).softmax(dim=-1)
    return weights @ points


def check_mean_x0(function) -> str | None:
    """At several noise levels, with as many points as noisy ones, where a softmax along the wrong axis has the right shape."""
    generator = torch.Generator().manual_seed(0)
    x_t, points = (torch.randn(5, 2, generator=generator) for _ in range(2))
    arguments = (x_t, torch.tensor([0.9, 0.7, 0.5, 0.3, 0.1])[:, None], points)
    mistakes = {
        "gives the farthest points the largest weights: the exponent is negative": farthest,
        "leaves out the 2 of the denominator: a normal distribution falls with squares / (2 variance)": without_two,
        "does not scale the points: at this noise level each of them has moved to sqrt(a) times its place": points_unscaled,
        "scales the points by a: its root is the factor of x_0 in q_sample": scaled_by_a,
        "takes the softmax over the noisy points: the weights of the data points add up to 1 for each noisy one, so dim=-1": over_noisy,
        "leaves out the variance 1 - a: the more noise, the more points are likely": without_variance,
        "takes distances, the roots of the squares: the exponent has the squares themselves": rooted,
        "averages the squares of the two numbers: the squared distance is their sum": averaged,
        "takes the nearest point alone: every point has its share": nearest,
        "returns the weights: they still have to average the points, weights @ points": weights_alone,
        "divides by 2 a: the variance of the noise is 1 - a": variance_of_picture,
    }
    return difference(function(*arguments), mean_x0(*arguments), {sentence: slip(*arguments) for sentence, slip in mistakes.items()})


def _squares(x_t, a, points):
    return (x_t[:, None] - a[:, None].sqrt() * points).square().sum(dim=-1)


def farthest(x_t, a, points):
    return (_squares(x_t, a, points) / (2 * (1 - a))).softmax(dim=-1) @ points


def without_two(x_t, a, points):
    return (-_squares(x_t, a, points) / (1 - a)).softmax(dim=-1) @ points


def points_unscaled(x_t, a, points):
    return (-(x_t[:, None] - points).square().sum(dim=-1) / (2 * (1 - a))).softmax(dim=-1) @ points


def scaled_by_a(x_t, a, points):
    return (-(x_t[:, None] - a[:, None] * points).square().sum(dim=-1) / (2 * (1 - a))).softmax(dim=-1) @ points


def over_noisy(x_t, a, points):
    return (-_squares(x_t, a, points) / (2 * (1 - a))).softmax(dim=0) @ points


def without_variance(x_t, a, points):
    return (-_squares(x_t, a, points) / 2).softmax(dim=-1) @ points


def rooted(x_t, a, points):
    return (-_squares(x_t, a, points).sqrt() / (2 * (1 - a))).softmax(dim=-1) @ points


def averaged(x_t, a, points):
    return (-_squares(x_t, a, points) / 2 / (2 * (1 - a))).softmax(dim=-1) @ points


def nearest(x_t, a, points):
    return points[_squares(x_t, a, points).argmin(dim=-1)]


def weights_alone(x_t, a, points):
    return (-_squares(x_t, a, points) / (2 * (1 - a))).softmax(dim=-1)


def variance_of_picture(x_t, a, points):
    return (-_squares(x_t, a, points) / (2 * a)).softmax(dim=-1) @ points


def without_the_axis(x_t, a, points):
    squares = (x_t - a.sqrt() * points[:3]).square().sum(dim=-1)
    return (-squares / (2 * (1 - a))).softmax(dim=-1) @ points


def number_mean_x0(function: Callable) -> str:
    """Two points at -1 and 1, a noisy one next to the right one."""
    points, x_t = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.3, 0.0]])
    found = [float(function(x_t, torch.tensor([[a]]), points)[0, 0]) for a in (0.99, 0.5, 0.01)]
    little, some, much = (f"{place:.2f}" for place in found)
    return f"points at -1 and 1, a noisy one at 0.3: expected {little} with little noise, {some} with more, {much} with very much"


EXERCISES = (
    Exercise(
        diffusion_loss,
        check_diffusion_loss,
        wrong=(
            (against_the_point, "with x_0: the network"),
            (shown_clean, "shows the clean x_0"),
            (one_number, "averages over the batch"),
            (over_samples, "averages over the samples"),
            (summed, "adds the two squares"),
            (not_squared, "bare difference"),
            (absolute, "absolute difference"),
            (not_averaged, "the square of each number"),
            (without_model, "does not use the network"),
            (against_x_t, "with x_t: the target"),
            (without_t, "without 1 of its arguments"),
        ),
        library=library_diffusion_loss,
        number=number_diffusion_loss,
    ),
    Exercise(
        train,
        check_train,
        wrong=(
            (never_zeroed, "never calls optimizer.zero_grad"),
            (zeroed_too_late, "between backward and step"),
            (no_step, "gradients alone move nothing"),
            (no_backward, "never calls loss.backward"),
            (step_too_early, "the step before backward()"),
            (not_detached, "fills the memory"),
            (drawn_once, "a loss of its own"),
            (only_the_last, "yields 1 losses"),
            (a_list, "returns all at once"),
            (plain_numbers, "other than a tensor"),
        ),
        number=number_train,
    ),
    Exercise(
        mean_x0,
        check_mean_x0,
        wrong=(
            (farthest, "the farthest points"),
            (without_two, "the 2 of the denominator"),
            (points_unscaled, "does not scale the points"),
            (scaled_by_a, "scales the points by a"),
            (over_noisy, "over the noisy points"),
            (without_variance, "leaves out the variance"),
            (rooted, "the roots of the squares"),
            (averaged, "averages the squares"),
            (nearest, "the nearest point alone"),
            (weights_alone, "returns the weights"),
            (variance_of_picture, "divides by 2 a"),
            (without_the_axis, "two tensors that do not fit"),
        ),
        number=number_mean_x0,
    ),
)
