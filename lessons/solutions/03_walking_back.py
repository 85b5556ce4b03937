"""Answers of lesson 03."""

from functools import partial
from itertools import pairwise

import torch
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lessons.common import distance
from lessons.exercises import Exercise, Misuse, difference
from minidiff.config import SD1
from minidiff.samplers import Denoiser, Level, ddim
from minidiff.schedule import NoiseSchedule

# ------------------------------------------------------------------------------------------------------ ddim_step


def ddim_step(alpha_bar, x_t, x0_hat, now, then):
    eps_hat = (x_t - alpha_bar[now].sqrt() * x0_hat) / (1 - alpha_bar[now]).sqrt()
    return alpha_bar[then].sqrt() * x0_hat + (1 - alpha_bar[then]).sqrt() * eps_hat


def library_ddim_step(alpha_bar, x_t, x0_hat, now, then):
    return _library_step(alpha_bar, x_t, x0_hat, now, then, 0.0, None)


def check_ddim_step(function) -> str | None:
    """In the middle of the trajectory, and at its start, where alpha_bar is 0."""
    generator = torch.Generator().manual_seed(0)
    x_t, x0_hat = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(2))
    alpha_bar = torch.linspace(0.99, 0.0, 10)
    arguments = (alpha_bar, x_t, x0_hat, 6, 2)
    mistakes = {
        "puts back as much noise as it took out, which ends at x_t again: the second line needs alpha_bar[then] in both places": unmoved,
        "scales x_t itself instead of the noise in it: take sqrt(alpha_bar[now]) x0_hat off x_t, and divide by sqrt(1 - alpha_bar[now])": not_separated,
        "does not divide by sqrt(1 - alpha_bar[now]), so that eps_hat is too small, its variance not 1": undivided,
        "mixes by alpha_bar and 1 - alpha_bar without their square roots": without_roots,
        "gives the picture alone, with no noise put back: x0_hat is only a guess, too rough to keep": without_noise,
        "swaps the timesteps: eps_hat is taken out of x_t at now, and put back at then": swapped,
        "takes 1 - sqrt(alpha_bar) where sqrt(1 - alpha_bar) is meant: the root goes around the whole difference": root_too_early,
        "adds x0_hat to x_t where the first equation subtracts it": added,
        "returns eps_hat, the first of the two lines: the second one makes x_then of it": noise_alone,
        "puts back x_t's share of x0_hat: in the second line x0_hat is multiplied by sqrt(alpha_bar[then])": old_share,
    }
    mistakes = {sentence: slip(*arguments) for sentence, slip in mistakes.items()}
    start, terms = (alpha_bar, x_t, x0_hat, 9, 7), {"x_t": x_t, "x0_hat": x0_hat}
    return difference(function(*arguments), ddim_step(*arguments), mistakes, terms=terms) or difference(
        function(*start), ddim_step(*start), of="from alpha_bar[now] = 0", terms=terms
    )


def unmoved(alpha_bar, x_t, x0_hat, now, then):
    return x_t.clone()


def not_separated(alpha_bar, x_t, x0_hat, now, then):
    return alpha_bar[then].sqrt() * x0_hat + (1 - alpha_bar[then]).sqrt() * x_t


def undivided(alpha_bar, x_t, x0_hat, now, then):
    eps_hat = x_t - alpha_bar[now].sqrt() * x0_hat
    return alpha_bar[then].sqrt() * x0_hat + (1 - alpha_bar[then]).sqrt() * eps_hat


def without_roots(alpha_bar, x_t, x0_hat, now, then):
    eps_hat = (x_t - alpha_bar[now] * x0_hat) / (1 - alpha_bar[now])
    return alpha_bar[then] * x0_hat + (1 - alpha_bar[then]) * eps_hat


def without_noise(alpha_bar, x_t, x0_hat, now, then):
    return alpha_bar[then].sqrt() * x0_hat


def swapped(alpha_bar, x_t, x0_hat, now, then):
    return ddim_step(alpha_bar, x_t, x0_hat, then, now)


def root_too_early(alpha_bar, x_t, x0_hat, now, then):
    eps_hat = (x_t - alpha_bar[now].sqrt() * x0_hat) / (1 - alpha_bar[now].sqrt())
    return alpha_bar[then].sqrt() * x0_hat + (1 - alpha_bar[then].sqrt()) * eps_hat


def added(alpha_bar, x_t, x0_hat, now, then):
    eps_hat = (x_t + alpha_bar[now].sqrt() * x0_hat) / (1 - alpha_bar[now]).sqrt()
    return alpha_bar[then].sqrt() * x0_hat + (1 - alpha_bar[then]).sqrt() * eps_hat


def noise_alone(alpha_bar, x_t, x0_hat, now, then):
    return (x_t - alpha_bar[now].sqrt() * x0_hat) / (1 - alpha_bar[now]).sqrt()


def old_share(alpha_bar, x_t, x0_hat, now, then):
    eps_hat = (x_t - alpha_bar[now].sqrt() * x0_hat) / (1 - alpha_bar[now]).sqrt()
    return alpha_bar[now].sqrt() * x0_hat + (1 - alpha_bar[then]).sqrt() * eps_hat


def one_root_forgotten(alpha_bar, x_t, x0_hat, now, then):
    eps_hat = (x_t - alpha_bar[now].sqrt() * x0_hat) / (1 - alpha_bar[now]).sqrt()
    return alpha_bar[then] * x0_hat + (1 - alpha_bar[then]).sqrt() * eps_hat


def table_whole(alpha_bar, x_t, x0_hat, now, then):
    return (x_t - alpha_bar.sqrt() * x0_hat) / (1 - alpha_bar).sqrt()


def table_called(alpha_bar, x_t, x0_hat, now, then):
    return alpha_bar(now) * x_t


def root_of_a_float(alpha_bar, x_t, x0_hat, now, then):
    return torch.sqrt(float(alpha_bar[now])) * x_t


def in_place(alpha_bar, x_t, x0_hat, now, then):
    x_t -= alpha_bar[now].sqrt() * x0_hat
    return alpha_bar[then].sqrt() * x0_hat + ((1 - alpha_bar[then]) / (1 - alpha_bar[now])).sqrt() * x_t


def not_returned(alpha_bar, x_t, x0_hat, now, then):
    ddim_step(alpha_bar, x_t, x0_hat, now, then)


# ------------------------------------------------------------------------------------------------------ walk


def walk(look, step, x_t, timesteps):
    for now, then in pairwise(timesteps):
        x0_hat = look(x_t, now)
        x_t = step(x_t, x0_hat, now, then)
        yield x0_hat, x_t


def check_walk(function) -> str | None:
    """On a prediction and a step that depend on all of their arguments, so that each wrong one shows."""
    arguments = (
        lambda x_t, t: x_t / 2 + t,
        lambda x_t, x0_hat, now, then: x_t + 2 * x0_hat + 3 * now + 5 * then,
        torch.ones(2),
        [9, 4, 1, 0],
    )
    got = function(*arguments)
    if got is None or isinstance(got, torch.Tensor):
        return difference(got, [])
    got, expected = list(got), list(walk(*arguments))
    mistakes = {
        "asks look at `then`: the prediction is made where the latent is, at `now`": looks_at_then,
        "starts every step from the same x_t: give the step's result the name x_t, so that the next step begins there": never_moves,
        "yields x_t as it was before the step: yield after the step": yields_too_early,
        "yields x_t before x0_hat: the order is x0_hat, x_t": other_order,
        "gives the step its timesteps the wrong way round: now comes before then": step_reversed,
        "goes through the timesteps from the last to the first: they come in the order of the trajectory already": backwards,
        "keeps the prediction of the first step: look again at each step": looks_once,
        "hands back one pair instead of one for each step: `yield` stands inside the loop": only_the_last,
        "leaves the last step out: pairwise gives one pair for each step, the last of them ends at 0": stops_early,
    }
    for sentence, slip in mistakes.items():
        if _same(got, list(slip(*arguments))):
            return sentence
    if not all(isinstance(pair, tuple) and len(pair) == 2 for pair in got):
        raise Misuse("yields something other than two tensors a step: `yield x0_hat, x_t`")
    if len(got) != len(expected):
        return f"yields {len(got)} pairs for {len(expected)} steps: one pair each time round the loop"
    steps = enumerate(zip(got, expected), start=1)
    return next((said for i, pairs in steps for said in _pair_differences(i, *pairs) if said), None)


def _pair_differences(i, got, expected):
    for name, one, other in zip(("x0_hat", "x_t"), got, expected):
        yield difference(one, other, of=f"as the {name} of step {i}")


def _same(got, other) -> bool:
    def flat(pairs):
        return [value for pair in pairs if isinstance(pair, tuple) for value in pair]

    one, two = flat(got), flat(other)
    return len(got) == len(other) and len(one) == len(two) and all(difference(a, b) is None for a, b in zip(one, two))


def looks_at_then(look, step, x_t, timesteps):
    for now, then in pairwise(timesteps):
        x0_hat = look(x_t, then)
        x_t = step(x_t, x0_hat, now, then)
        yield x0_hat, x_t


def never_moves(look, step, x_t, timesteps):
    for now, then in pairwise(timesteps):
        x0_hat = look(x_t, now)
        yield x0_hat, step(x_t, x0_hat, now, then)


def yields_too_early(look, step, x_t, timesteps):
    for now, then in pairwise(timesteps):
        x0_hat = look(x_t, now)
        yield x0_hat, x_t
        x_t = step(x_t, x0_hat, now, then)


def other_order(look, step, x_t, timesteps):
    for x0_hat, x in walk(look, step, x_t, timesteps):
        yield x, x0_hat


def step_reversed(look, step, x_t, timesteps):
    return walk(look, lambda x, x0_hat, now, then: step(x, x0_hat, then, now), x_t, timesteps)


def backwards(look, step, x_t, timesteps):
    return walk(look, step, x_t, timesteps[::-1])


def looks_once(look, step, x_t, timesteps):
    x0_hat = look(x_t, timesteps[0])
    for now, then in pairwise(timesteps):
        x_t = step(x_t, x0_hat, now, then)
        yield x0_hat, x_t


def only_the_last(look, step, x_t, timesteps):
    *_, last = walk(look, step, x_t, timesteps)
    yield last


def stops_early(look, step, x_t, timesteps):
    return walk(look, step, x_t, timesteps[:-1])


def yields_one_tensor(look, step, x_t, timesteps):
    for _, x in walk(look, step, x_t, timesteps):
        yield x


def index_too_far(look, step, x_t, timesteps):
    for i in range(len(timesteps)):
        x0_hat = look(x_t, timesteps[i])
        x_t = step(x_t, x0_hat, timesteps[i], timesteps[i + 1])
        yield x0_hat, x_t


def look_without_t(look, step, x_t, timesteps):
    for now, then in pairwise(timesteps):
        x0_hat = look(x_t)
        x_t = step(x_t, x0_hat, now, then)
        yield x0_hat, x_t


# ------------------------------------------------------------------------------------------------------ ddpm_step


def ddpm_step(alpha_bar, x_t, x0_hat, now, then, eps_new):
    r = (1 - alpha_bar[now] / alpha_bar[then]) / (1 - alpha_bar[now])
    eps_hat = (x_t - alpha_bar[now].sqrt() * x0_hat) / (1 - alpha_bar[now]).sqrt()
    noise = (1 - r).sqrt() * eps_hat + r.sqrt() * eps_new
    return alpha_bar[then].sqrt() * x0_hat + (1 - alpha_bar[then]).sqrt() * noise


def library_ddpm_step(alpha_bar, x_t, x0_hat, now, then, eps_new):
    return _library_step(alpha_bar, x_t, x0_hat, now, then, 1.0, lambda: eps_new)


def check_ddpm_step(function) -> str | None:
    generator = torch.Generator().manual_seed(0)
    x_t, x0_hat, eps_new = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(3))
    alpha_bar = torch.linspace(0.99, 0.0, 10)
    arguments = (alpha_bar, x_t, x0_hat, 3, 2, eps_new)
    mistakes = {
        "adds the new noise without making room: multiply eps_hat by sqrt(1 - r), or there is too much noise at then": no_room,
        "mixes the two noises by 1 - r and r without their square roots: it is the variances that add up to 1": no_roots_in_mix,
        "gives eps_hat the share r and the new noise the share 1 - r: r is the part that is new": shares_swapped,
        "leaves out the denominator of r, 1 - alpha_bar[now]: the share of new noise comes out too small": undivided_share,
        "divides by 1 - alpha_bar[then] in r: the denominator belongs to now, where the noise is": other_denominator,
        "is ddim_step: eps_new is not used": no_new_noise,
        "renews all of the noise: only the share r of the variance is new, the rest is eps_hat": all_new,
        "scales the mixed noise for now: at then its size is sqrt(1 - alpha_bar[then])": scaled_for_now,
        "returns the mixed noise: the last line jumps with it from x0_hat to x_then": mixed_noise_alone,
        "mixes eps_new with x_t: the noise that is kept is eps_hat, x_t without its picture": mixes_x_t,
    }
    mistakes = {sentence: slip(*arguments) for sentence, slip in mistakes.items()}
    got = function(*arguments)
    if isinstance(got, torch.Tensor) and got.isnan().any():
        return "takes the root of something negative, so r is not between 0 and 1: alpha_bar[now] / alpha_bar[then], in this order, is taken from 1"
    start, terms = (alpha_bar, x_t, x0_hat, 9, 7, eps_new), {"x_t": x_t, "x0_hat": x0_hat, "eps_new": eps_new}
    return difference(got, ddpm_step(*arguments), mistakes, terms=terms) or difference(
        function(*start), ddpm_step(*start), of="from alpha_bar[now] = 0", terms=terms
    )


def _mixed(alpha_bar, x_t, x0_hat, now, then, eps_new, of_eps_hat, of_new):
    eps_hat = noise_alone(alpha_bar, x_t, x0_hat, now, then)
    return alpha_bar[then].sqrt() * x0_hat + (1 - alpha_bar[then]).sqrt() * (of_eps_hat * eps_hat + of_new * eps_new)


def _share(alpha_bar, now, then):
    return (1 - alpha_bar[now] / alpha_bar[then]) / (1 - alpha_bar[now])


def no_room(alpha_bar, x_t, x0_hat, now, then, eps_new):
    return _mixed(alpha_bar, x_t, x0_hat, now, then, eps_new, 1, _share(alpha_bar, now, then).sqrt())


def no_roots_in_mix(alpha_bar, x_t, x0_hat, now, then, eps_new):
    r = _share(alpha_bar, now, then)
    return _mixed(alpha_bar, x_t, x0_hat, now, then, eps_new, 1 - r, r)


def shares_swapped(alpha_bar, x_t, x0_hat, now, then, eps_new):
    r = _share(alpha_bar, now, then)
    return _mixed(alpha_bar, x_t, x0_hat, now, then, eps_new, r.sqrt(), (1 - r).sqrt())


def undivided_share(alpha_bar, x_t, x0_hat, now, then, eps_new):
    r = 1 - alpha_bar[now] / alpha_bar[then]
    return _mixed(alpha_bar, x_t, x0_hat, now, then, eps_new, (1 - r).sqrt(), r.sqrt())


def other_denominator(alpha_bar, x_t, x0_hat, now, then, eps_new):
    r = (1 - alpha_bar[now] / alpha_bar[then]) / (1 - alpha_bar[then])
    return _mixed(alpha_bar, x_t, x0_hat, now, then, eps_new, (1 - r).sqrt(), r.sqrt())


def no_new_noise(alpha_bar, x_t, x0_hat, now, then, eps_new):
    return ddim_step(alpha_bar, x_t, x0_hat, now, then)


def all_new(alpha_bar, x_t, x0_hat, now, then, eps_new):
    return _mixed(alpha_bar, x_t, x0_hat, now, then, eps_new, 0, 1)


def scaled_for_now(alpha_bar, x_t, x0_hat, now, then, eps_new):
    noise = mixed_noise_alone(alpha_bar, x_t, x0_hat, now, then, eps_new)
    return alpha_bar[then].sqrt() * x0_hat + (1 - alpha_bar[now]).sqrt() * noise


def mixed_noise_alone(alpha_bar, x_t, x0_hat, now, then, eps_new):
    r = _share(alpha_bar, now, then)
    return (1 - r).sqrt() * noise_alone(alpha_bar, x_t, x0_hat, now, then) + r.sqrt() * eps_new


def mixes_x_t(alpha_bar, x_t, x0_hat, now, then, eps_new):
    r = _share(alpha_bar, now, then)
    return alpha_bar[then].sqrt() * x0_hat + (1 - alpha_bar[then]).sqrt() * ((1 - r).sqrt() * x_t + r.sqrt() * eps_new)


def ratio_upside_down(alpha_bar, x_t, x0_hat, now, then, eps_new):
    r = (1 - alpha_bar[then] / alpha_bar[now]) / (1 - alpha_bar[now])
    return _mixed(alpha_bar, x_t, x0_hat, now, then, eps_new, (1 - r).sqrt(), r.sqrt())


# ------------------------------------------------------------------------------------------------------ what appears when it is right


def _library_step(alpha_bar, x_t, x0_hat, now, then, eta, noise):
    """minidiff's own step, from a model whose prediction is v: it gives this x0_hat."""
    level, next_level = (Level(t, float(alpha_bar[t])) for t in (now, then))
    eps_hat = (x_t - level.sqrt_alpha_bar * x0_hat) / level.sqrt_one_minus_alpha_bar
    v = level.sqrt_alpha_bar * eps_hat - level.sqrt_one_minus_alpha_bar * x0_hat
    return ddim(Denoiser(lambda x, t: v, "v", x_t.dtype), x_t, level, next_level, eta, noise)[0]


def _ring(count=8, radius=1.5):
    angles = torch.arange(count) * 2 * torch.pi / count
    return radius * torch.stack([angles.cos(), angles.sin()], dim=-1)


ALPHA_BAR = NoiseSchedule(SD1.schedule).alpha_bar.float()
TIMESTEPS = [*range(999, 0, -37), 0]


def _look_at_ring(x_t, t):
    """The best prediction of x_0 when the data are the points of a ring: their mean, weighted by how likely each led to x_t."""
    points, a = _ring(), ALPHA_BAR[t]
    far = (x_t[:, None] - a.sqrt() * points).square().sum(-1)
    return (-far / (2 * (1 - a))).softmax(dim=-1) @ points


def _trajectories(walking, step) -> torch.Tensor:
    """[steps + 1, points, 2], from noise to the ring."""
    x_T = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
    return torch.stack([x_T, *(x_t for _, x_t in walking(_look_at_ring, step, x_T, TIMESTEPS))])


def _drawn(paths) -> Figure:
    fig, axis = plt.subplots(figsize=(6, 6))
    axis.plot(paths[..., 0], paths[..., 1], linewidth=0.8, alpha=0.7)
    axis.scatter(*paths[0].T, s=14, facecolors="none", edgecolors="grey", label="noise")
    axis.scatter(*paths[-1].T, s=26, color="black", label="end", zorder=3)
    axis.scatter(*_ring().T, s=160, facecolors="none", edgecolors="black", label="data")
    axis.set(aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
    axis.legend(loc="upper right")
    return fig


def _from_data(paths) -> str:
    off = torch.cdist(paths[-1], _ring()).amin(dim=1).mean()
    return f"{len(paths[0])} points of noise end {off:.2f} from the nearest point of a ring, on average, in {len(paths) - 1} steps"


def number_ddim_step(function) -> str:
    x_0, eps = torch.randn(2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    high, low = ((ALPHA_BAR[t].sqrt() * x_0 + (1 - ALPHA_BAR[t]).sqrt() * eps) for t in (750, 250))
    return f"with the true x_0, your step from t = 750 to 250 is off by {distance(function(ALPHA_BAR, high, x_0, 750, 250), low):.0e}"


def picture_ddim_step(function) -> Figure:
    return _drawn(_trajectories(walk, partial(function, ALPHA_BAR)))


def number_walk(function) -> str:
    return _from_data(_trajectories(function, partial(ddim_step, ALPHA_BAR)))


def _drawing(function):
    generator = torch.Generator().manual_seed(1)
    return lambda x_t, x0_hat, now, then: function(ALPHA_BAR, x_t, x0_hat, now, then, torch.randn(x_t.shape, generator=generator))


def number_ddpm_step(function) -> str:
    return _from_data(_trajectories(walk, _drawing(function)))


def picture_ddpm_step(function) -> Figure:
    return _drawn(_trajectories(walk, _drawing(function)))


EXERCISES = (
    Exercise(
        ddim_step,
        check_ddim_step,
        wrong=(
            (unmoved, "ends at x_t again"),
            (not_separated, "scales x_t itself"),
            (undivided, "does not divide"),
            (without_roots, "without their square roots"),
            (without_noise, "the picture alone"),
            (swapped, "swaps the timesteps"),
            (root_too_early, "around the whole difference"),
            (added, "adds x0_hat to x_t"),
            (noise_alone, "returns eps_hat"),
            (old_share, "x_t's share of x0_hat"),
            (one_root_forgotten, "the factor of that term"),
            (table_whole, "take one entry of a table with [t]"),
            (table_called, "is taken with [ ]"),
            (root_of_a_float, "** 0.5"),
            (in_place, "changes its argument x_t"),
            (not_returned, "has to be `return`"),
        ),
        library=library_ddim_step,
        number=number_ddim_step,
        picture=picture_ddim_step,
    ),
    Exercise(
        walk,
        check_walk,
        wrong=(
            (looks_at_then, "asks look at `then`"),
            (never_moves, "from the same x_t"),
            (yields_too_early, "before the step"),
            (other_order, "before x0_hat"),
            (step_reversed, "the wrong way round"),
            (backwards, "from the last to the first"),
            (looks_once, "the prediction of the first step"),
            (only_the_last, "inside the loop"),
            (stops_early, "leaves the last step out"),
            (yields_one_tensor, "other than two tensors"),
            (index_too_far, "behind the last one"),
            (look_without_t, "without 1 of its arguments"),
        ),
        number=number_walk,
    ),
    Exercise(
        ddpm_step,
        check_ddpm_step,
        wrong=(
            (no_room, "without making room"),
            (no_roots_in_mix, "it is the variances"),
            (shares_swapped, "is the part that is new"),
            (undivided_share, "leaves out the denominator"),
            (other_denominator, "the denominator belongs to now"),
            (no_new_noise, "eps_new is not used"),
            (all_new, "renews all"),
            (scaled_for_now, "scales the mixed noise for now"),
            (mixed_noise_alone, "returns the mixed noise"),
            (mixes_x_t, "mixes eps_new with x_t"),
            (ratio_upside_down, "the root of something negative"),
        ),
        library=library_ddpm_step,
        number=number_ddpm_step,
        picture=picture_ddpm_step,
    ),
)
