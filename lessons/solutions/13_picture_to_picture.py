"""Answers of lesson 13."""

from itertools import pairwise

import torch
import torch.nn.functional as F
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from lessons.common import picture_grid
from lessons.exercises import Exercise, Misuse, difference
from minidiff.config import SD1
from minidiff.editing import masks
from minidiff.editing.start import add_noise
from minidiff.samplers import Level
from minidiff.schedule import NoiseSchedule

# ------------------------------------------------------------------------------------------------------ noised_start


def noised_start(alpha_bar, timesteps, strength, x_0, eps):
    wanted = strength * (len(alpha_bar) - 1)
    i = int((timesteps - wanted).abs().argmin())
    a = alpha_bar[timesteps[i]]
    return i, a.sqrt() * x_0 + (1 - a).sqrt() * eps


def library_noised_start(alpha_bar, timesteps, strength, x_0, eps):
    i = _nearest(timesteps, strength * (len(alpha_bar) - 1))
    return i, add_noise(x_0, _level(alpha_bar, int(timesteps[i])), eps)


def check_noised_start(function) -> str | None:
    """Of unevenly spaced timesteps, so that no two slips start at the same one."""
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 2, 3, 4, 4, generator=generator)
    alpha_bar, timesteps = torch.linspace(0.99, 0.0, 101), torch.tensor([100, 97, 94, 91, 70, 50, 30, 10])
    arguments = (alpha_bar, timesteps, 0.66, x_0, eps)
    slips = {
        "counts steps instead of noise, so that strength would mean another noise with other timesteps: look for the one nearest to strength (T - 1)": counts_steps,
        "takes the strength the wrong way round: 1 is all noise, the highest timestep": strength_reversed,
        "starts at the last timestep: multiply strength by T - 1 before comparing, and take distances without their sign (abs)": unscaled,
        "takes the first timestep below the wanted one: the nearest one may lie above": first_below,
        "noises to the wanted timestep, not to the visited one: the loop would be told another t than the noise that is there": noised_to_wanted,
        "looks up alpha_bar[i]: i counts steps, the timestep is timesteps[i]": index_for_timestep,
        "returns x_0 without noise: the model would have nothing to do": clean,
        "returns the noise alone: nothing of the picture is left": noise_alone,
        "mixes by alpha_bar and 1 - alpha_bar without their square roots": without_roots,
        "swaps the two factors: sqrt(alpha_bar) belongs to x_0, sqrt(1 - alpha_bar) to eps": factors_swapped,
        "adds the noise and does not shrink x_0: its factor is sqrt(alpha_bar)": x_0_not_shrunk,
    }
    i, x_t = _index_and_latent(function(*arguments))
    expected_i, expected = noised_start(*arguments)
    mistakes = {sentence: slip(*arguments)[1] for sentence, slip in slips.items()}
    said = difference(x_t, expected, mistakes, terms={"x_0": x_0, "eps": eps})
    if said or i is None:
        return said
    if i == int(timesteps[expected_i]):
        return "returns the timestep: the loop asks for its index, the i of timesteps[i]"
    arguments = (alpha_bar, timesteps, 1.0, x_0, eps)
    return difference(i, expected_i, of="as the index") or difference(
        _index_and_latent(function(*arguments))[1], noised_start(*arguments)[1], of="at strength 1"
    )


def _index_and_latent(got):
    """The two things that were returned, or Misuse."""
    if got is None:
        return None, None
    if not (isinstance(got, tuple | list) and len(got) == 2):
        raise Misuse("returns something other than an index and a latent: `return i, x_t`")
    i, x_t = got
    if isinstance(i, torch.Tensor) and i.numel() > 1:
        raise Misuse("returns the latent before the index: `return i, x_t`")
    return int(i), x_t


def _level(alpha_bar, t: int) -> Level:
    return Level(t, float(alpha_bar[t]))


def _nearest(timesteps, wanted: float) -> int:
    return min(range(len(timesteps)), key=lambda i: abs(int(timesteps[i]) - wanted))


def _noised(alpha_bar, t, x_0, eps):
    return alpha_bar[t].sqrt() * x_0 + (1 - alpha_bar[t]).sqrt() * eps


def counts_steps(alpha_bar, timesteps, strength, x_0, eps):
    i = len(timesteps) - int(len(timesteps) * strength)
    return i, _noised(alpha_bar, timesteps[i], x_0, eps)


def strength_reversed(alpha_bar, timesteps, strength, x_0, eps):
    return noised_start(alpha_bar, timesteps, 1 - strength, x_0, eps)


def unscaled(alpha_bar, timesteps, strength, x_0, eps):
    i = int((timesteps - strength).abs().argmin())
    return i, _noised(alpha_bar, timesteps[i], x_0, eps)


def first_below(alpha_bar, timesteps, strength, x_0, eps):
    i = next(i for i, t in enumerate(timesteps) if t <= strength * (len(alpha_bar) - 1))
    return i, _noised(alpha_bar, timesteps[i], x_0, eps)


def noised_to_wanted(alpha_bar, timesteps, strength, x_0, eps):
    i, _ = noised_start(alpha_bar, timesteps, strength, x_0, eps)
    return i, _noised(alpha_bar, round(strength * (len(alpha_bar) - 1)), x_0, eps)


def index_for_timestep(alpha_bar, timesteps, strength, x_0, eps):
    i, _ = noised_start(alpha_bar, timesteps, strength, x_0, eps)
    return i, _noised(alpha_bar, i, x_0, eps)


def clean(alpha_bar, timesteps, strength, x_0, eps):
    return noised_start(alpha_bar, timesteps, strength, x_0, eps)[0], x_0.clone()


def noise_alone(alpha_bar, timesteps, strength, x_0, eps):
    return noised_start(alpha_bar, timesteps, strength, x_0, eps)[0], eps.clone()


def without_roots(alpha_bar, timesteps, strength, x_0, eps):
    i, _ = noised_start(alpha_bar, timesteps, strength, x_0, eps)
    a = alpha_bar[timesteps[i]]
    return i, a * x_0 + (1 - a) * eps


def factors_swapped(alpha_bar, timesteps, strength, x_0, eps):
    return noised_start(alpha_bar, timesteps, strength, eps, x_0)


def x_0_not_shrunk(alpha_bar, timesteps, strength, x_0, eps):
    i, _ = noised_start(alpha_bar, timesteps, strength, x_0, eps)
    return i, x_0 + (1 - alpha_bar[timesteps[i]]).sqrt() * eps


def timestep_for_index(alpha_bar, timesteps, strength, x_0, eps):
    i, x_t = noised_start(alpha_bar, timesteps, strength, x_0, eps)
    return int(timesteps[i]), x_t


def latent_first(alpha_bar, timesteps, strength, x_0, eps):
    return noised_start(alpha_bar, timesteps, strength, x_0, eps)[::-1]


def latent_alone(alpha_bar, timesteps, strength, x_0, eps):
    return noised_start(alpha_bar, timesteps, strength, x_0, eps)[1]


def wanted_as_index(alpha_bar, timesteps, strength, x_0, eps):
    i = round(strength * (len(alpha_bar) - 1))
    return i, _noised(alpha_bar, timesteps[i], x_0, eps)


ALPHA_BAR = NoiseSchedule(SD1.schedule).alpha_bar.float()
TIMESTEPS = torch.tensor([*range(999, 0, -37), 0])
STRENGTHS = (0.2, 0.4, 0.6, 0.8, 1.0)


def _disc(side: int = 48):
    y, x = torch.meshgrid(*[torch.linspace(-1, 1, side)] * 2, indexing="ij")
    return (x.square() + y.square() < 0.4).float()[None, None] * 2 - 1


def _starts(function):
    """Strength, index and noised disc."""
    x_0 = _disc()
    eps = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0))
    return [(strength, *function(ALPHA_BAR, TIMESTEPS, strength, x_0, eps)) for strength in STRENGTHS]


def number_noised_start(function) -> str:
    steps = len(TIMESTEPS) - 1
    found = [f"{strength:g} at t = {TIMESTEPS[i]}, {steps - i} of {steps} steps left" for strength, i, _ in _starts(function)]
    return "your edits start with strength " + "; ".join(found[1::2])


def picture_noised_start(function) -> Figure:
    return picture_grid([[x_t[0, 0] for _, _, x_t in _starts(function)]], [f"{strength:g}" for strength in STRENGTHS])


# ------------------------------------------------------------------------------------------------------ blend


def blend(alpha_bar, x_t, x_0, eps, cells, then):
    a = alpha_bar[then]
    known = a.sqrt() * x_0 + (1 - a).sqrt() * eps
    return cells * x_t + (1 - cells) * known


def library_blend(alpha_bar, x_t, x_0, eps, cells, then):
    return cells * x_t + (1 - cells) * add_noise(x_0, _level(alpha_bar, then), eps)


def check_blend(function) -> str | None:
    """In the middle of the trajectory, and at its end."""
    generator = torch.Generator().manual_seed(0)
    x_t, x_0, eps = torch.randn(3, 2, 3, 4, 4, generator=generator)
    alpha_bar, cells = torch.linspace(0.99, 0.0, 10), torch.zeros(1, 1, 4, 4)
    cells[:, :, 1:3, 1:] = 1
    arguments, end = (alpha_bar, x_t, x_0, eps, cells, 4), (alpha_bar, x_t, x_0, eps, cells, 0)
    slips = {
        "puts back x_0 without noise: the U-Net will be told `then`, and has to find the noise of `then` everywhere": known_clean,
        "keeps x_t outside the hole and puts the original back inside: cells is 1 where something new should grow": other_way_round,
        "puts nothing back: outside the hole the original belongs": nothing_known,
        "puts the original back everywhere: x_t stays where cells is 1": known_everywhere,
        "adds the known part to x_t, which is there as well: multiply x_t by cells": x_t_not_cut,
        "adds x_t to the known part, which is in the hole as well: multiply the known part by 1 - cells": known_not_cut,
        "puts back the noise alone: x_0, shrunk by sqrt(alpha_bar[then]), belongs to it": known_noise,
        "takes alpha_bar and 1 - alpha_bar without their square roots for the known part": known_without_roots,
        "noises x_t as well: it comes out of the step with the noise of `then` on it": x_t_noised,
        "adds noise to x_0 without shrinking it: its factor is sqrt(alpha_bar[then])": known_not_shrunk,
        "takes the last entry of alpha_bar, pure noise, whatever `then` is": always_last,
    }
    mistakes = {sentence: slip(*arguments) for sentence, slip in slips.items()}
    got = function(*arguments)
    if isinstance(got, torch.Tensor) and not torch.equal(got, function(*arguments)):
        return "draws fresh noise: it gives another result each time, and the known part would follow no one trajectory; eps is the noise"
    terms = {"x_t in the hole": cells * x_t, "x_0 outside": (1 - cells) * x_0, "eps outside": (1 - cells) * eps}
    return difference(got, blend(*arguments), mistakes, terms=terms) or difference(
        function(*end), blend(*end), of="at then = 0", terms=terms
    )


def known_clean(alpha_bar, x_t, x_0, eps, cells, then):
    return cells * x_t + (1 - cells) * x_0


def other_way_round(alpha_bar, x_t, x_0, eps, cells, then):
    return blend(alpha_bar, x_t, x_0, eps, 1 - cells, then)


def nothing_known(alpha_bar, x_t, x_0, eps, cells, then):
    return x_t.clone()


def known_everywhere(alpha_bar, x_t, x_0, eps, cells, then):
    return _noised(alpha_bar, then, x_0, eps)


def x_t_not_cut(alpha_bar, x_t, x_0, eps, cells, then):
    return x_t + (1 - cells) * _noised(alpha_bar, then, x_0, eps)


def known_not_cut(alpha_bar, x_t, x_0, eps, cells, then):
    return cells * x_t + _noised(alpha_bar, then, x_0, eps)


def known_noise(alpha_bar, x_t, x_0, eps, cells, then):
    return cells * x_t + (1 - cells) * (1 - alpha_bar[then]).sqrt() * eps


def known_without_roots(alpha_bar, x_t, x_0, eps, cells, then):
    return cells * x_t + (1 - cells) * (alpha_bar[then] * x_0 + (1 - alpha_bar[then]) * eps)


def x_t_noised(alpha_bar, x_t, x_0, eps, cells, then):
    return _noised(alpha_bar, then, cells * x_t + (1 - cells) * x_0, eps)


def known_not_shrunk(alpha_bar, x_t, x_0, eps, cells, then):
    return cells * x_t + (1 - cells) * (x_0 + (1 - alpha_bar[then]).sqrt() * eps)


def always_last(alpha_bar, x_t, x_0, eps, cells, then):
    return blend(alpha_bar, x_t, x_0, eps, cells, -1)


def fresh_noise(alpha_bar, x_t, x_0, eps, cells, then):
    return blend(alpha_bar, x_t, x_0, torch.randn_like(eps), cells, then)


def written_into_x_t(alpha_bar, x_t, x_0, eps, cells, then):
    outside = (cells == 0).expand_as(x_t)
    x_t[outside] = _noised(alpha_bar, then, x_0, eps)[outside]
    return x_t


def whole_table(alpha_bar, x_t, x_0, eps, cells, then):
    return cells * x_t + (1 - cells) * (alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * eps)


def _ring(count: int = 8, radius: float = 1.5):
    angles = (torch.arange(count) + 0.5) * 2 * torch.pi / count
    return radius * torch.stack([angles.cos(), angles.sin()], dim=-1)


def _look_at_ring(x_t, t: int):
    """The best prediction of x_0 when the data are the points of a ring: their mean, weighted by how likely each led to x_t."""
    points, a = _ring(), ALPHA_BAR[t]
    far = (x_t[:, None] - a.sqrt() * points).square().sum(-1)
    return (-far / (2 * (1 - a))).softmax(dim=-1) @ points


def _trajectories(function):
    """[steps + 1, points, 2]: DDIM on a ring, with the first number of the first point known and the second one free."""
    known = _ring()[:1]
    x_t = torch.randn(24, 2, generator=torch.Generator().manual_seed(0))
    eps, cells = x_t, torch.tensor([0.0, 1.0]).reshape(1, 1, 1, 2)
    x_0, path = known.expand_as(eps), [x_t]
    as_latents = lambda rows: rows.reshape(-1, 1, 1, 2)  # a picture of one row, two cells and one channel
    for now, then in pairwise(TIMESTEPS.tolist()):
        x0_hat, a = _look_at_ring(x_t, now), ALPHA_BAR[now]
        x_t = _noised(ALPHA_BAR, then, x0_hat, (x_t - a.sqrt() * x0_hat) / (1 - a).sqrt())
        x_t = function(ALPHA_BAR, as_latents(x_t), as_latents(x_0), as_latents(eps), cells, then).reshape(-1, 2)
        path.append(x_t)
    return torch.stack(path)


def number_blend(function) -> str:
    ends, points = _trajectories(function)[-1], _ring()
    fitting = points[(points[:, 0] - points[0, 0]).abs() < 1e-4]
    near = torch.cdist(ends, fitting).amin(dim=1) < 0.2
    return f"{int(near.sum())} of {len(ends)} points end on the {len(fitting)} points of the ring whose first number is the known one"


def picture_blend(function) -> Figure:
    paths = _trajectories(function)
    fig, axis = plt.subplots(figsize=(6, 6))
    axis.axvline(float(_ring()[0, 0]), color="grey", linestyle="--", linewidth=1, label="known")
    axis.plot(paths[..., 0], paths[..., 1], linewidth=0.8, alpha=0.7)
    axis.scatter(*paths[0].T, s=14, facecolors="none", edgecolors="grey", label="noise")
    axis.scatter(*paths[-1].T, s=26, color="black", label="end", zorder=3)
    axis.scatter(*_ring().T, s=160, facecolors="none", edgecolors="black", label="data")
    axis.set(aspect="equal", xlim=(-3, 3), ylim=(-3, 3))
    axis.legend(loc="upper left")
    return fig


# ------------------------------------------------------------------------------------------------------ paste


def paste(original, made, mask, width):
    grown = [F.max_pool2d(mask, 2 * d + 1, stride=1, padding=d) for d in range(width + 1)]
    opacity = torch.stack(grown).mean(dim=0)
    return original + opacity * (made - original)


def library_paste(original, made, mask, width):
    return masks.paste(original, made, masks.feather(mask, width))


def check_paste(function) -> str | None:
    generator = torch.Generator().manual_seed(0)
    original, made = torch.randn(1, 3, 12, 12, generator=generator), torch.randn(2, 3, 12, 12, generator=generator)
    mask = torch.zeros(1, 1, 12, 12)
    mask[:, :, 4:7, 5:8] = 1
    arguments = (original, made, mask, 3)
    slips = {
        "has no feather, so the seam shows: the opacity falls from 1 to 0 over the pixels around the mask": hard_edge,
        "shows the original in the hole and what was made around it: the opacity goes with made": pasted_wrong_way,
        "adds the masks up instead of taking their mean: the opacity is more than 1": summed,
        "grows the mask by less than width pixels: d goes from 0 to width, range(width + 1)": one_too_few,
        "leaves out the mask itself, d = 0: the opacity falls too slowly": starts_at_one,
        "is opaque over all of the feather: the mean of all the grown masks is needed, not the largest": largest_only,
        "blurs the mask, so that its own rim is no longer opaque and the old thing shines through": blurred,
        "adds what was made to the original: it is their difference that is added": original_not_taken_off,
        "returns the opacity: the last line mixes the two pictures by it": opacity_alone,
        "returns what was made, all of it: beyond the feather the original belongs": made_alone,
    }
    mistakes = {sentence: slip(*arguments) for sentence, slip in slips.items()}
    got = function(*arguments)
    said = difference(got, paste(*arguments), mistakes, tolerance=1e-5)
    beyond = (F.max_pool2d(mask, 7, stride=1, padding=3) == 0).expand(2, 3, -1, -1)
    if said is None and not torch.equal(got[beyond], original.expand_as(got)[beyond]):
        return (
            "changes the original's last digits beyond the feather, where nothing should be added: original + opacity * (made - original)"
        )
    return said


def _opacity(mask, distances):
    return torch.stack([F.max_pool2d(mask, 2 * d + 1, stride=1, padding=d) for d in distances])


def _mixed(original, made, opacity):
    return original + opacity * (made - original)


def hard_edge(original, made, mask, width):
    return _mixed(original, made, mask)


def pasted_wrong_way(original, made, mask, width):
    return _mixed(original, made, 1 - _opacity(mask, range(width + 1)).mean(dim=0))


def summed(original, made, mask, width):
    return _mixed(original, made, _opacity(mask, range(width + 1)).sum(dim=0))


def one_too_few(original, made, mask, width):
    return _mixed(original, made, _opacity(mask, range(width)).mean(dim=0))


def starts_at_one(original, made, mask, width):
    return _mixed(original, made, _opacity(mask, range(1, width + 1)).mean(dim=0))


def largest_only(original, made, mask, width):
    return _mixed(original, made, _opacity(mask, [width])[0])


def blurred(original, made, mask, width):
    return _mixed(original, made, F.avg_pool2d(mask, 2 * width + 1, stride=1, padding=width))


def original_not_taken_off(original, made, mask, width):
    return original + _opacity(mask, range(width + 1)).mean(dim=0) * made


def opacity_alone(original, made, mask, width):
    return _opacity(mask, range(width + 1)).mean(dim=0)


def made_alone(original, made, mask, width):
    return made.clone()


def from_the_far_end(original, made, mask, width):
    opacity = _opacity(mask, range(width + 1)).mean(dim=0)
    return made + (1 - opacity) * (original - made)


def even_window(original, made, mask, width):
    return _mixed(
        original, made, torch.stack([F.max_pool2d(mask, 2 * d + 2, stride=1, padding=d) for d in range(1, width + 1)]).mean(dim=0)
    )


def number_paste(function) -> str:
    black, white, mask = torch.zeros(1, 3, 32, 32), torch.ones(1, 3, 32, 32), torch.zeros(1, 1, 32, 32)
    mask[:, :, 12:20, 12:20] = 1
    new = function(black, white, mask, 4)[0, 0]
    inside, outside = int((new == 1).sum()), int((new == 0).sum())
    return f"of {new.numel()} pixels {inside} are white, {outside} still black, and {new.numel() - inside - outside} in the feather"


EXERCISES = (
    Exercise(
        noised_start,
        check_noised_start,
        wrong=(
            (counts_steps, "counts steps instead of noise"),
            (strength_reversed, "the strength the wrong way round"),
            (unscaled, "starts at the last timestep"),
            (first_below, "the first timestep below"),
            (noised_to_wanted, "noises to the wanted timestep"),
            (index_for_timestep, "looks up alpha_bar[i]"),
            (clean, "returns x_0 without noise"),
            (noise_alone, "returns the noise alone"),
            (without_roots, "without their square roots"),
            (factors_swapped, "swaps the two factors"),
            (x_0_not_shrunk, "does not shrink x_0"),
            (timestep_for_index, "returns the timestep"),
            (latent_first, "the latent before the index"),
            (latent_alone, "other than an index and a latent"),
            (wanted_as_index, "of an axis of 8"),
        ),
        library=library_noised_start,
        number=number_noised_start,
        picture=picture_noised_start,
    ),
    Exercise(
        blend,
        check_blend,
        wrong=(
            (known_clean, "puts back x_0 without noise"),
            (other_way_round, "puts the original back inside"),
            (nothing_known, "puts nothing back"),
            (known_everywhere, "puts the original back everywhere"),
            (x_t_not_cut, "adds the known part to x_t"),
            (known_not_cut, "adds x_t to the known part"),
            (known_noise, "puts back the noise alone"),
            (known_without_roots, "without their square roots"),
            (x_t_noised, "noises x_t as well"),
            (known_not_shrunk, "without shrinking it"),
            (always_last, "takes the last entry"),
            (fresh_noise, "draws fresh noise"),
            (written_into_x_t, "changes its argument x_t"),
            (whole_table, "take one entry of a table with [t]"),
        ),
        library=library_blend,
        number=number_blend,
        picture=picture_blend,
    ),
    Exercise(
        paste,
        check_paste,
        wrong=(
            (hard_edge, "has no feather"),
            (pasted_wrong_way, "shows the original in the hole"),
            (summed, "adds the masks up"),
            (one_too_few, "by less than width pixels"),
            (starts_at_one, "leaves out the mask itself"),
            (largest_only, "opaque over all of the feather"),
            (blurred, "blurs the mask"),
            (original_not_taken_off, "adds what was made to the original"),
            (opacity_alone, "returns the opacity"),
            (made_alone, "returns what was made, all of it"),
            (from_the_far_end, "changes the original's last digits"),
            (even_window, "two tensors that do not fit"),
        ),
        library=library_paste,
        number=number_paste,
    ),
)
