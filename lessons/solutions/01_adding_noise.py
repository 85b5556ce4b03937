"""Answers of lesson 01."""

import torch
from matplotlib.figure import Figure

from lessons.common import distance, picture_grid
from lessons.exercises import Exercise, difference
from minidiff.config import SD1
from minidiff.schedule import NoiseSchedule


def _library(alpha_bar) -> NoiseSchedule:
    """minidiff's own, with another table."""
    schedule = NoiseSchedule(SD1.schedule)
    schedule.alpha_bar = alpha_bar.double()
    return schedule


def _inputs():
    """A batch as large as a picture is wide, where factors of the wrong shape go unnoticed, and a table."""
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(4, 3, 4, 4, generator=generator) for _ in range(2))
    return torch.linspace(0.99, 0.02, 10), one, torch.tensor([0, 2, 5, 9]), other


# ------------------------------------------------------------------------------------------------------ q_sample


def q_sample(alpha_bar, x_0, t, eps):
    a = alpha_bar[t].reshape(-1, 1, 1, 1)
    return a.sqrt() * x_0 + (1 - a).sqrt() * eps


def library_q_sample(alpha_bar, x_0, t, eps):
    return _library(alpha_bar).q_sample(x_0, t, eps)


def check_q_sample(function) -> str | None:
    arguments = _inputs()
    mistakes = {
        "mixes by alpha_bar and 1 - alpha_bar themselves, so the variance does not stay 1: take the square root of each": without_roots,
        "gives the picture the factor of the noise and the noise the picture's: alpha_bar is near 1 at t = 0, where x_t is almost x_0": swapped,
        "takes alpha_bar[t] in shape [4] along the width of the picture, not along the batch: reshape it to [4, 1, 1, 1]": along_the_width,
        "gives the noise the factor 1 - sqrt(alpha_bar), which is not sqrt(1 - alpha_bar)": root_of_the_wrong_thing,
        "adds the noise at its full size: it has a factor too, sqrt(1 - alpha_bar)": noise_unscaled,
        "adds the noise to a picture that is not shrunk: x_0 has a factor too, sqrt(alpha_bar)": picture_unscaled,
        "takes the roots of the picture's factor only: the noise's is a root as well, sqrt(1 - alpha_bar)": one_root_forgotten,
        "returns the picture's part alone: the noise has to be added": without_noise,
    }
    return difference(function(*arguments), q_sample(*arguments), {sentence: slip(*arguments) for sentence, slip in mistakes.items()})


def without_roots(alpha_bar, x_0, t, eps):
    a = alpha_bar[t].reshape(-1, 1, 1, 1)
    return a * x_0 + (1 - a) * eps


def swapped(alpha_bar, x_0, t, eps):
    a = alpha_bar[t].reshape(-1, 1, 1, 1)
    return (1 - a).sqrt() * x_0 + a.sqrt() * eps


def along_the_width(alpha_bar, x_0, t, eps):
    return alpha_bar[t].sqrt() * x_0 + (1 - alpha_bar[t]).sqrt() * eps


def root_of_the_wrong_thing(alpha_bar, x_0, t, eps):
    a = alpha_bar[t].reshape(-1, 1, 1, 1)
    return a.sqrt() * x_0 + (1 - a.sqrt()) * eps


def noise_unscaled(alpha_bar, x_0, t, eps):
    return alpha_bar[t].reshape(-1, 1, 1, 1).sqrt() * x_0 + eps


def picture_unscaled(alpha_bar, x_0, t, eps):
    return x_0 + (1 - alpha_bar[t].reshape(-1, 1, 1, 1)).sqrt() * eps


def one_root_forgotten(alpha_bar, x_0, t, eps):
    a = alpha_bar[t].reshape(-1, 1, 1, 1)
    return a.sqrt() * x_0 + (1 - a) * eps


def without_noise(alpha_bar, x_0, t, eps):
    return alpha_bar[t].reshape(-1, 1, 1, 1).sqrt() * x_0


def whole_table(alpha_bar, x_0, t, eps):
    a = alpha_bar.reshape(-1, 1, 1, 1)
    return a.sqrt() * x_0 + (1 - a).sqrt() * eps


def table_called(alpha_bar, x_0, t, eps):
    return alpha_bar(t) * x_0


def one_timestep(alpha_bar, x_0, t, eps):
    a = float(alpha_bar[t[0]])
    return torch.sqrt(a) * x_0 + torch.sqrt(1 - a) * eps


# ------------------------------------------------------------------------------------------------------ first_noisier


def first_noisier(alpha_bar):
    snr = alpha_bar / (1 - alpha_bar)
    return int((snr > 1).sum())


def check_first_noisier(function) -> str | None:
    """On a table whose picture's and noise's factors pass each other at no round number."""
    alpha_bar = torch.linspace(0.999, 0.01, 40) ** 3
    got = function(alpha_bar)
    if isinstance(got, torch.Tensor) and got.dim() == 1:
        return f"gives {len(got)} values, one for each timestep, expected one number: compare the ratio with 1, count with .sum(), and call int()"
    mistakes = {
        "gives the last timestep with more picture than noise: timesteps count from 0, so the first one after them is the count itself": last_clearer,
        "counts the timesteps with more noise than picture: count those with more picture, where alpha_bar over 1 - alpha_bar is above 1": count_of_noisier,
        "looks where the picture's factor, the root, falls below a half: at equal parts both roots are larger than that": root_below_half,
        "compares the picture's factor with the square of the noise's: square both, or neither": root_against_square,
        "gives the middle of the table: look where alpha_bar is, not where half of the timesteps are": half_way,
        "finds no timestep above 1: alpha_bar alone never is, compare its ratio to 1 - alpha_bar": undivided,
    }
    found = {sentence: slip(alpha_bar) for sentence, slip in mistakes.items()}
    if isinstance(got, torch.Tensor) and got.dim() == 0:
        got = int(got)
    return difference(got, first_noisier(alpha_bar), found)


def last_clearer(alpha_bar):
    return first_noisier(alpha_bar) - 1


def count_of_noisier(alpha_bar):
    return int((alpha_bar / (1 - alpha_bar) < 1).sum())


def root_below_half(alpha_bar):
    return int((alpha_bar.sqrt() > 0.5).sum())


def root_against_square(alpha_bar):
    return int((alpha_bar.sqrt() > 1 - alpha_bar).sum())


def half_way(alpha_bar):
    return len(alpha_bar) // 2


def undivided(alpha_bar):
    return int((alpha_bar > 1).sum())


def whole_ratio(alpha_bar):
    return alpha_bar / (1 - alpha_bar)


def as_a_loop(alpha_bar):
    for t in range(len(alpha_bar) + 1):
        if alpha_bar[t] / (1 - alpha_bar[t]) > 1000:
            return t
    return None


# ------------------------------------------------------------------------------------------------------ x0_from_eps


def x0_from_eps(alpha_bar, x_t, t, eps):
    a = alpha_bar[t].reshape(-1, 1, 1, 1)
    return (x_t - (1 - a).sqrt() * eps) / a.sqrt()


def library_x0_from_eps(alpha_bar, x_t, t, eps):
    return _library(alpha_bar).x0_from_eps(x_t, t, eps)


def check_x0_from_eps(function) -> str | None:
    arguments = _inputs()
    mistakes = {
        "does not divide by sqrt(alpha_bar): what is left after taking off the noise is x_0, but shrunk": undivided_picture,
        "divides the noise alone: put brackets round the whole difference, `/` binds closer than `-`": noise_divided,
        "takes eps off at its full size: in x_t it is multiplied by sqrt(1 - alpha_bar)": whole_noise_off,
        "adds the noise once more: it has to be subtracted": added,
        "takes the noise off with 1 - alpha_bar, without its root": root_forgotten,
        "divides by alpha_bar instead of its square root": divided_by_alpha_bar,
        "divides by the factor of the noise: the picture's, sqrt(alpha_bar), is the one to undo": divided_by_noise,
        "takes alpha_bar[t] along the width of the picture: reshape it to [4, 1, 1, 1] as in q_sample": along_the_width_again,
        "is q_sample once more: it adds noise to x_t, and x_t has it already": forward_again,
    }
    return difference(
        function(*arguments), x0_from_eps(*arguments), {sentence: slip(*arguments) for sentence, slip in mistakes.items()}, tolerance=1e-3
    )


def undivided_picture(alpha_bar, x_t, t, eps):
    return x_t - (1 - alpha_bar[t].reshape(-1, 1, 1, 1)).sqrt() * eps


def noise_divided(alpha_bar, x_t, t, eps):
    a = alpha_bar[t].reshape(-1, 1, 1, 1)
    return x_t - (1 - a).sqrt() * eps / a.sqrt()


def whole_noise_off(alpha_bar, x_t, t, eps):
    return (x_t - eps) / alpha_bar[t].reshape(-1, 1, 1, 1).sqrt()


def added(alpha_bar, x_t, t, eps):
    return x0_from_eps(alpha_bar, x_t, t, -eps)


def root_forgotten(alpha_bar, x_t, t, eps):
    a = alpha_bar[t].reshape(-1, 1, 1, 1)
    return (x_t - (1 - a) * eps) / a.sqrt()


def divided_by_alpha_bar(alpha_bar, x_t, t, eps):
    a = alpha_bar[t].reshape(-1, 1, 1, 1)
    return (x_t - (1 - a).sqrt() * eps) / a


def divided_by_noise(alpha_bar, x_t, t, eps):
    a = alpha_bar[t].reshape(-1, 1, 1, 1)
    return (x_t - (1 - a).sqrt() * eps) / (1 - a).sqrt()


def along_the_width_again(alpha_bar, x_t, t, eps):
    a = alpha_bar[t]
    return (x_t - (1 - a).sqrt() * eps) / a.sqrt()


def forward_again(alpha_bar, x_t, t, eps):
    return q_sample(alpha_bar, x_t, t, eps)


def in_place(alpha_bar, x_t, t, eps):
    a = alpha_bar[t].reshape(-1, 1, 1, 1)
    x_t -= (1 - a).sqrt() * eps
    return x_t / a.sqrt()


# ------------------------------------------------------------------------------------------------------ what appears when it is right

ALPHA_BAR = NoiseSchedule(SD1.schedule).alpha_bar.float()
SHOWN = torch.tensor([0, 100, 250, 500, 750, 999])


def _disks(size=64):
    """One disk for each timestep shown, [B, 1, H, W]: -1 outside, 1 inside; and noise."""
    place = torch.linspace(-1, 1, size)
    disk = (place[:, None] ** 2 + place**2 < 0.4).float() * 2 - 1
    eps = torch.randn(len(SHOWN), 1, size, size, generator=torch.Generator().manual_seed(0))
    return disk.expand(len(SHOWN), 1, size, size), eps


def _drawn(rows, labels) -> Figure:
    return picture_grid([[one[0].clamp(-2, 2) for one in row] for row in rows], [f"t = {t}" for t in SHOWN.tolist()], labels)


def number_q_sample(function) -> str:
    x_0, eps = torch.randn(2, 20, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    variance = function(ALPHA_BAR, x_0, torch.arange(0, 1000, 50), eps).var(dim=(1, 2, 3))
    return f"data of variance 1 have a variance between {variance.min():.2f} and {variance.max():.2f} at 20 timesteps"


def picture_q_sample(function) -> Figure:
    x_0, eps = _disks()
    return _drawn([function(ALPHA_BAR, x_0, SHOWN, eps)], ())


def number_first_noisier(function) -> str:
    return f"Stable Diffusion 1.x: more noise than picture from t = {function(ALPHA_BAR)} on"


def number_x0_from_eps(function) -> str:
    x_0, eps = _disks()
    return f"after q_sample and your function, the disks are off by {distance(_back(function, x_0, eps), x_0):.0e}"


def picture_x0_from_eps(function) -> Figure:
    x_0, eps = _disks()
    return _drawn([q_sample(ALPHA_BAR, x_0, SHOWN, eps), _back(function, x_0, eps)], ("$x_t$", "$x_0$"))


def _back(function, x_0, eps):
    return function(ALPHA_BAR, q_sample(ALPHA_BAR, x_0, SHOWN, eps), SHOWN, eps)


EXERCISES = (
    Exercise(
        q_sample,
        check_q_sample,
        wrong=(
            (without_roots, "square root of each"),
            (swapped, "the factor of the noise and"),
            (along_the_width, "along the width"),
            (root_of_the_wrong_thing, "not sqrt(1 - alpha_bar)"),
            (noise_unscaled, "at its full size"),
            (picture_unscaled, "not shrunk"),
            (one_root_forgotten, "picture's factor only"),
            (without_noise, "part alone"),
            (whole_table, "two tensors that do not fit"),
            (table_called, "is taken with [ ]"),
            (one_timestep, "** 0.5"),
        ),
        library=library_q_sample,
        number=number_q_sample,
        picture=picture_q_sample,
    ),
    Exercise(
        first_noisier,
        check_first_noisier,
        wrong=(
            (last_clearer, "the last timestep with more picture"),
            (count_of_noisier, "counts the timesteps with more noise"),
            (root_below_half, "falls below a half"),
            (root_against_square, "square both, or neither"),
            (half_way, "the middle of the table"),
            (undivided, "finds no timestep"),
            (whole_ratio, "one for each timestep"),
            (as_a_loop, "entry 40 of an axis of 40"),
        ),
        number=number_first_noisier,
    ),
    Exercise(
        x0_from_eps,
        check_x0_from_eps,
        wrong=(
            (undivided_picture, "but shrunk"),
            (noise_divided, "divides the noise alone"),
            (whole_noise_off, "takes eps off"),
            (added, "once more: it has to be"),
            (root_forgotten, "without its root"),
            (divided_by_alpha_bar, "instead of its square root"),
            (divided_by_noise, "is the one to undo"),
            (along_the_width_again, "as in q_sample"),
            (forward_again, "is q_sample once more"),
            (in_place, "changes its argument x_t"),
        ),
        library=library_x0_from_eps,
        number=number_x0_from_eps,
        picture=picture_x0_from_eps,
    ),
)
