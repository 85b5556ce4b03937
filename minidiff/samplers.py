"""Samplers: from noise back to a latent, a few dozen noise levels at a time.

    x = noise --> model(x_t, t) --> x0_hat, eps_hat --> x_t of the next level --> ... --> x_t = latent for the decoder

Each sampler is one pure step function, from a noise level to the next lower one, and a row of facts in SAMPLERS, at the end of this file;
`sample` is the denoising loop over all levels. x_t is always in variance-preserving coordinates,
x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps; papers that write x = x_0 + sigma eps instead (Karras et al. 2022) mean
x_t / sqrt(alpha_bar), with sigma = sqrt((1 - alpha_bar) / alpha_bar).

The step functions share their first arguments: denoise, the model with its answer turned into x0_hat and eps_hat; x_t, the latent, in
float32 at least; level, where x_t is; and next_level, a lower one. They return the latent at next_level and x0_hat; multistep samplers also
return the history that their next step takes.

Papers: Ho et al. 2020 (ddpm), Song et al. 2021 (ddim), Liu et al. 2022, "Pseudo numerical methods" (plms), Karras et al. 2022 (euler,
heun, and the levels of dpmpp_2m_karras), Lu et al. 2022, "DPM-Solver++" (dpmpp_2m).
Every trajectory equals diffusers' scheduler of that name (plms: PNDMScheduler with skip_prk_steps; the rest: final sigma 0,
set_alpha_to_one False, steps_offset 1). Left out: clipping and thresholding of x0_hat, which latents do not want, and churn.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import log, sqrt

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.config import check_choice
from minidiff.schedule import SPACINGS, NoiseSchedule

# Where sigma would be infinite: the smallest positive half-precision number, as diffusers has it.
SMALLEST_ALPHA_BAR = 2.0**-24

# Adams-Bashforth weights, newest prediction first, by the number of predictions at hand; four are Liu et al. 2022, eq. 12.
MULTISTEP = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


@dataclass(frozen=True)
class Step:
    """One step of a sampler, numbered from 0.

    t: the timestep at which the step began. x0_hat: what the model took the clean latent for, there.
    x_t: the latent after the step; that of the last step is decoded.
    attention_maps: the cross-attention of the step's first model call, if it was recorded (see attention_maps.py).
    """

    i: int
    t: int | float
    x_t: Float[Tensor, "B *dims"]
    x0_hat: Float[Tensor, "B *dims"]
    attention_maps: dict[str, Tensor] | None = None


@dataclass(frozen=True)
class Level:
    """A noise level, and the timestep by which the model knows it (fractional between two of its own)."""

    t: int | float
    alpha_bar: float

    @property
    def sqrt_alpha_bar(self) -> float:
        """Return the factor of x_0 in x_t."""
        return sqrt(self.alpha_bar)

    @property
    def sqrt_one_minus_alpha_bar(self) -> float:
        """Return the factor of eps in x_t."""
        return sqrt(1 - self.alpha_bar)

    @property
    def sigma(self) -> float:
        """Return the noise level sigma of x = x_0 + sigma eps (Karras et al. 2022)."""
        return self.sqrt_one_minus_alpha_bar / self.sqrt_alpha_bar


@dataclass(frozen=True)
class Denoiser:
    """A model and how to read its answer. Steps are computed in float32 at least; the model sees its own dtype."""

    model: Callable[[Tensor, Tensor], Tensor]
    prediction: str
    dtype: torch.dtype

    def model_output(self, x_t: Float[Tensor, "B *dims"], level: Level) -> Float[Tensor, "B *dims"]:
        """Return the model's prediction as it is, eps or v."""
        t_dtype = torch.int64 if isinstance(level.t, int) else torch.float32
        t = torch.full((x_t.shape[0],), level.t, dtype=t_dtype, device=x_t.device)
        return self.model(x_t.to(self.dtype), t).to(x_t.dtype)

    def to_x0_eps(self, output: Float[Tensor, "B *dims"], x_t: Float[Tensor, "B *dims"], level: Level) -> tuple[Tensor, Tensor]:
        """Turn the model's output into x0_hat and eps_hat, with x_t = sqrt(alpha_bar) x0_hat + sqrt(1 - alpha_bar) eps_hat."""
        a, s = level.sqrt_alpha_bar, level.sqrt_one_minus_alpha_bar
        if self.prediction == "eps":
            return (x_t - s * output) / a, output
        return a * x_t - s * output, a * output + s * x_t

    def __call__(self, x_t: Float[Tensor, "B *dims"], level: Level) -> tuple[Tensor, Tensor]:
        """Return x0_hat and eps_hat at x_t."""
        return self.to_x0_eps(self.model_output(x_t, level), x_t, level)


# ------------------------------------------------------------------------------------------------------ the denoising loop


def sample(
    model: Callable[[Tensor, Tensor], Tensor],
    x: Float[Tensor, "B *dims"],
    schedule: NoiseSchedule,
    *,
    sampler: str = "ddim",
    steps: int = 30,
    spacing: str | None = None,
    eta: float = 0.0,
    noise: Callable[[], Tensor] | None = None,
    start: int = 0,
) -> Generator[Step, Tensor | None, None]:
    """Denoise x level by level; yield one Step per step.

    A caller may change the latent between two steps: `send(x_t)` replaces it and returns the next Step. A multistep sampler keeps what the
    model said at earlier steps, about the latents as they were then.

    Args:
        model: model(x_t, t) -> prediction, eps or v as schedule.config.prediction says; t has shape (B,), int64, or float32 where a sampler
            visits timesteps between two of the model's own. It is called SAMPLERS[sampler].model_calls(steps) times.
        x: unit normal, whatever the sampler; with `start`, the latent at that level.
        schedule: of the model: alpha_bar by timestep, and what the model predicts.
        sampler: a name in SAMPLERS.
        steps: 1..T, the number of levels from pure noise on.
        spacing: leading, linspace or trailing; None is the schedule's own. A sampler with a spacing of its own ignores it.
        eta: 0..1, for ddim: how much of the noise is drawn afresh.
        noise: a function that returns a fresh unit normal of x's shape, for samplers that draw noise.
        start: 0..steps-1, the index of the level to begin at, among those that `levels` returns; that many steps are left out.

    With zero terminal SNR, samplers that divide by sqrt(alpha_bar) start from alpha_bar = 2^-24; ddpm and ddim from 0.
    Raises ValueError, before the model is called, for an argument outside these.
    """
    visited = levels(schedule, sampler, steps, spacing)[start:]
    _check(sampler, steps, eta, noise, start)
    if schedule.config.prediction == "eps" and visited[0].alpha_bar == 0:
        raise ValueError(
            f"sampler {sampler!r} cannot start an eps-model at timestep {visited[0].t}, where zero terminal SNR leaves nothing "
            "but noise to divide by; use a v-model, another sampler or spacing 'leading'"
        )
    row = SAMPLERS[sampler]
    own = ({"eta": eta} if row.takes_eta else {}) | ({"noise": noise} if row.takes_eta or row.draws_noise else {})
    step = partial(row.step, Denoiser(model, schedule.config.prediction, x.dtype), **own)
    return _denoising_loop(step, row.multistep, x, visited, start)


def _denoising_loop(
    step: Callable[..., tuple], multistep: bool, x: Tensor, visited: list[Level], start: int
) -> Generator[Step, Tensor | None, None]:
    x_t = x.to(torch.promote_types(x.dtype, torch.float32))
    history = ()
    for i, (level, next_level) in enumerate(pairwise(visited), start):
        if multistep:
            x_t, x0_hat, history = step(x_t, level, next_level, history)
        else:
            x_t, x0_hat = step(x_t, level, next_level)
        sent = yield Step(i, level.t, x_t.to(x.dtype), x0_hat.to(x.dtype))
        if sent is not None:
            if sent.shape != x_t.shape:
                raise ValueError(f"a latent of shape {tuple(sent.shape)} was sent; expected {tuple(x_t.shape)}")
            x_t = sent.to(x_t)


def _check(sampler: str, steps: int, eta: float, noise: Callable[[], Tensor] | None, start: int) -> None:
    row = SAMPLERS[sampler]
    if not 0 <= start < steps:
        raise ValueError(f"start {start} is outside 0..{steps - 1}; it is one of the levels that {steps} steps begin at")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} is outside 0..1; 0 draws no noise, 1 is the variance of ddpm")
    if eta != 0 and not row.takes_eta:
        takers = " or ".join(repr(name) for name, other in SAMPLERS.items() if other.takes_eta)
        raise ValueError(f"eta {eta} belongs to sampler {takers}; leave it out for {sampler!r}")
    if noise is None and (row.draws_noise or eta > 0):
        raise ValueError(f"sampler {sampler!r} draws noise; give noise=, a function that returns a fresh unit normal like x")


# ------------------------------------------------------------------------------------------------------ one step


def ddpm(
    denoise: Denoiser, x_t: Float[Tensor, "B *dims"], level: Level, next_level: Level, noise: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """Draw from q(x_next | x_t, x0_hat) (DDPM eq. 6 and 7, with the betas of the jump from next_level to level).

    Args:
        denoise, x_t, level, next_level: shared by all steps, see the head of this file.
        noise: returns a fresh unit normal of x_t's shape.
    """
    x0_hat, _ = denoise(x_t, level)
    alpha = level.alpha_bar / next_level.alpha_bar
    to_x0 = next_level.sqrt_alpha_bar * (1 - alpha) / (1 - level.alpha_bar)
    to_x_t = sqrt(alpha) * (1 - next_level.alpha_bar) / (1 - level.alpha_bar)
    variance = (1 - next_level.alpha_bar) / (1 - level.alpha_bar) * (1 - alpha)
    x_t = to_x0 * x0_hat + to_x_t * x_t
    if variance > 0:
        x_t = x_t + sqrt(variance) * noise()
    return x_t, x0_hat


def ddim(
    denoise: Denoiser, x_t: Float[Tensor, "B *dims"], level: Level, next_level: Level, eta: float, noise: Callable[[], Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Take a step of DDIM eq. 12, with sigma of eq. 16 written as sigma^2 = fresh (1 - alpha_bar_next); alpha there is alpha_bar here.

    Args:
        denoise, x_t, level, next_level: shared by all steps, see the head of this file.
        eta: 0..1, how much of the noise is drawn afresh; 1 is the variance of ddpm.
        noise: returns a fresh unit normal of x_t's shape; may be None at eta 0.
    """
    x0_hat, eps_hat = denoise(x_t, level)
    fresh = eta**2 * (1 - level.alpha_bar / next_level.alpha_bar) / (1 - level.alpha_bar)  # the share of the noise that is drawn anew
    x_t = next_level.sqrt_alpha_bar * x0_hat + sqrt(1 - fresh) * next_level.sqrt_one_minus_alpha_bar * eps_hat
    if fresh > 0:
        assert noise is not None, "`sample` has checked this"
        x_t = x_t + sqrt(fresh) * next_level.sqrt_one_minus_alpha_bar * noise()
    return x_t, x0_hat


def plms(
    denoise: Denoiser, x_t: Float[Tensor, "B *dims"], level: Level, next_level: Level, history: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """Take a ddim step with the model's output extrapolated from this and up to three earlier ones.

    A v-model's outputs are extrapolated as they are and then turned into eps with the present x_t, as diffusers does;
    that is only of first order (with eps-models plms is of second).

    Args:
        denoise, x_t, level, next_level: shared by all steps, see the head of this file.
        history: the model's outputs at up to three earlier steps, newest first; () at the first step.
    """
    output = denoise.model_output(x_t, level)

    def ddim_step(output: Tensor) -> Tensor:
        x0_hat, eps_hat = denoise.to_x0_eps(output, x_t, level)
        return next_level.sqrt_alpha_bar * x0_hat + next_level.sqrt_one_minus_alpha_bar * eps_hat

    if history:
        recent = (output, *history)
        weighted = [weight * earlier for weight, earlier in zip(MULTISTEP[len(recent)], recent)]
        extrapolated = sum(weighted, torch.zeros_like(output))
    else:
        extrapolated = (output + denoise.model_output(ddim_step(output), next_level)) / 2
    x0_hat, _ = denoise.to_x0_eps(output, x_t, level)
    return ddim_step(extrapolated), x0_hat, (output, *history)[:3]


def euler(denoise: Denoiser, x_t: Float[Tensor, "B *dims"], level: Level, next_level: Level) -> tuple[Tensor, Tensor]:
    """Add (sigma_next - sigma) dx/dsigma to x, with dx/dsigma = eps_hat (Karras et al. 2022, eq. 3 and 4).

    Args:
        denoise, x_t, level, next_level: shared by all steps, see the head of this file.
    """
    x0_hat, eps_hat = denoise(x_t, level)
    x = x0_hat + next_level.sigma * eps_hat  # x is x0_hat + sigma eps_hat; sigma may be 4096, so it is not added and taken off
    return next_level.sqrt_alpha_bar * x, x0_hat


def euler_ancestral(
    denoise: Denoiser, x_t: Float[Tensor, "B *dims"], level: Level, next_level: Level, noise: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """Take an Euler step to sigma_down, then add noise of sigma_up, with sigma_down^2 + sigma_up^2 = sigma_next^2 (k-diffusion).

    Worked out, this is ddpm; they differ only in the levels that they visit over "linspace" and at zero terminal SNR.

    Args:
        denoise, x_t, level, next_level: shared by all steps, see the head of this file.
        noise: returns a fresh unit normal of x_t's shape.
    """
    x0_hat, eps_hat = denoise(x_t, level)
    sigma_down = next_level.sigma**2 / level.sigma
    sigma_up = sqrt(next_level.sigma**2 - sigma_down**2)
    x = x0_hat + sigma_down * eps_hat
    if sigma_up > 0:
        x = x + sigma_up * noise()
    return next_level.sqrt_alpha_bar * x, x0_hat


def heun(denoise: Denoiser, x_t: Float[Tensor, "B *dims"], level: Level, next_level: Level) -> tuple[Tensor, Tensor]:
    """Take an Euler step, corrected to the mean of the slopes at its two ends (Karras et al. 2022, algorithm 1, lines 6-8).

    From the start of zero terminal SNR the slopes' mean would be multiplied by sigma = 4096. There the mean is taken of the x0_hat at
    the two ends, the slope of the same curve x / sigma over 1 / sigma: of second order too, and within bounds.

    Args:
        denoise, x_t, level, next_level: shared by all steps, see the head of this file.
    """
    x0_hat, slope = denoise(x_t, level)
    x = x0_hat + next_level.sigma * slope
    if next_level.sigma > 0:
        next_x0_hat, next_slope = denoise(next_level.sqrt_alpha_bar * x, next_level)
        if level.alpha_bar == SMALLEST_ALPHA_BAR:
            x = x + (1 - next_level.sigma / level.sigma) * (next_x0_hat - x0_hat) / 2
        else:
            x = x + (next_level.sigma - level.sigma) * (next_slope - slope) / 2
    return next_level.sqrt_alpha_bar * x, x0_hat


def dpmpp_2m(
    denoise: Denoiser, x_t: Float[Tensor, "B *dims"], level: Level, next_level: Level, history: tuple[Level, Tensor] | tuple[()]
) -> tuple[Tensor, Tensor, tuple[Level, Tensor]]:
    """Take a step of DPM-Solver++(2M), algorithm 2: x0_hat is extrapolated to the middle of the step in lambda = -log(sigma).

    h is the step in lambda, exp(-h) the ratio of sigmas.

    Args:
        denoise, x_t, level, next_level: shared by all steps, see the head of this file.
        history: the level of the last step and its x0_hat; () at the first step.
    """
    x0_hat, _ = denoise(x_t, level)
    extrapolated = x0_hat
    if history and next_level.sigma > 0:
        earlier_level, earlier_x0_hat = history
        r = log(earlier_level.sigma / level.sigma) / log(level.sigma / next_level.sigma)
        extrapolated = (1 + 1 / (2 * r)) * x0_hat - 1 / (2 * r) * earlier_x0_hat
    to_x_t = next_level.sqrt_one_minus_alpha_bar / level.sqrt_one_minus_alpha_bar
    x_t = to_x_t * x_t + next_level.sqrt_alpha_bar * (1 - next_level.sigma / level.sigma) * extrapolated
    return x_t, x0_hat, (level, x0_hat)


# ------------------------------------------------------------------------------------------------------ levels


def levels(schedule: NoiseSchedule, sampler: str, steps: int, spacing: str | None = None) -> list[Level]:
    """Return the steps + 1 noise levels from start to end that diffusers' scheduler of this name visits.

    Args:
        schedule: of the model.
        sampler: a name in SAMPLERS.
        steps: 1..T.
        spacing: leading, linspace or trailing; None is the schedule's own.

    Raises ValueError for an argument outside these.
    """
    spacing, T = schedule.config.spacing if spacing is None else spacing, schedule.config.timesteps
    check_choice("sampler", sampler, SAMPLERS)
    check_choice("spacing", spacing, SPACINGS)
    row = SAMPLERS[sampler]
    most = T - 1 if row.counts_end and spacing != "trailing" else T
    if not 1 <= steps <= most:
        raise ValueError(f"steps {steps} is outside 1..{most} for sampler {sampler!r}; the model knows {T} timesteps")
    alpha_bar = schedule.alpha_bar.numpy().copy()
    if schedule.config.zero_terminal_snr and row.divides_by_signal:
        alpha_bar[-1] = SMALLEST_ALPHA_BAR
    end = Level(0, 1.0 if row.ends_at_zero else float(alpha_bar[0]))
    number = steps + 1 if row.counts_end and spacing != "trailing" else steps
    return [*row.levels(schedule, alpha_bar, number, spacing)[:steps], end]


def timestep_levels(schedule: NoiseSchedule, alpha_bar: Float[np.ndarray, "T"], steps: int, spacing: str) -> list[Level]:
    """Return the levels of the timesteps that the spacing chooses.

    Args:
        schedule: of the model.
        alpha_bar: by timestep, in place of the schedule's: at zero terminal SNR `levels` changes the last one.
        steps: the number of levels, 1..T.
        spacing: leading, linspace or trailing.
    """
    return [Level(t, float(alpha_bar[t])) for t in schedule.timesteps(steps, spacing).tolist()]


def fractional_levels(schedule: NoiseSchedule, alpha_bar: Float[np.ndarray, "T"], steps: int, spacing: str) -> list[Level]:
    """Return the levels of `timestep_levels`, except for "linspace": there t lies between the model's timesteps, and sigma between theirs.

    Args:
        schedule, alpha_bar, steps, spacing: as in `timestep_levels`.
    """
    if spacing != "linspace":
        return timestep_levels(schedule, alpha_bar, steps, spacing)
    sigma = np.sqrt((1 - alpha_bar) / alpha_bar)
    t = np.linspace(0, len(sigma) - 1, steps)[::-1]
    sigmas = np.interp(t, np.arange(len(sigma)), sigma)
    return [Level(t_i, 1 / (1 + sigma_i**2)) for t_i, sigma_i in zip(t.tolist(), sigmas.tolist())]


def karras_levels(schedule: NoiseSchedule, alpha_bar: Float[np.ndarray, "T"], steps: int, spacing: str) -> list[Level]:
    """Return the levels of `karras_sigmas`, each with the nearest timestep.

    Args:
        alpha_bar, steps: as in `timestep_levels`.
        schedule, spacing: not used; the sigmas follow from the first and last alpha_bar alone.
    """
    sigma = np.sqrt((1 - alpha_bar) / alpha_bar)
    sigmas = karras_sigmas(sigma[0], sigma[-1], steps)
    t = np.interp(np.log(sigmas), np.log(sigma), np.arange(len(sigma))).round()
    return [Level(int(t_i), 1 / (1 + sigma_i**2)) for t_i, sigma_i in zip(t, sigmas.tolist())]


def karras_sigmas(sigma_min: float, sigma_max: float, steps: int) -> Float[np.ndarray, "S"]:
    """Return `steps` sigmas that fall from sigma_max to sigma_min, evenly in sigma^(1/7) (Karras et al. 2022, eq. 5 with rho = 7)."""
    rho = 7.0
    return np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps) ** rho


# ------------------------------------------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Sampler:
    """A row of SAMPLERS: a step function and the facts about it. A new sampler is a function and a row.

    step: (denoise, x_t, level, next_level) -> (x_t, x0_hat). It also takes `noise` if it draws any, `eta` and `noise` if it takes eta, and
        a multistep sampler takes its history, () at first, and returns it as a third value.
    web_name: what web interfaces call it, beside the schedule type web_schedule or own_spacing. help: one line for lists.
    order: the power of the step's length with which the error of the trajectory falls.
    calls: model calls of each step, and how many more (or fewer) the whole loop takes.
    levels: (schedule, alpha_bar, steps, spacing) -> the levels to visit, without the end.
    own_spacing: the name of the spacing, if it has one of its own and ignores the schedule's.
    ends_at_zero: whether the last level is no noise at all, rather than that of timestep 0.
    counts_end: whether the end counts as one of the evenly spaced timesteps, but for "trailing".
    divides_by_signal: whether it divides by sqrt(alpha_bar), so that it cannot start where zero terminal SNR makes that 0.
    """

    step: Callable[..., tuple]
    web_name: str
    help: str
    order: int = 1
    calls: tuple[int, int] = (1, 0)
    levels: Callable[[NoiseSchedule, np.ndarray, int, str], list[Level]] = timestep_levels
    own_spacing: str | None = None
    web_schedule: str | None = None
    draws_noise: bool = False
    takes_eta: bool = False
    multistep: bool = False
    ends_at_zero: bool = True
    counts_end: bool = False
    divides_by_signal: bool = True

    def model_calls(self, steps: int) -> int:
        """Return how often the model is called in a loop of `steps` steps."""
        per_step, more = self.calls
        return per_step * steps + more


SAMPLERS = {
    "ddpm": Sampler(ddpm, "DDPM", "Ho et al. 2020, with the small variance; draws noise", draws_noise=True, divides_by_signal=False),
    "ddim": Sampler(
        ddim, "DDIM", "Song et al. 2021; eta 1 has ddpm's variance", takes_eta=True, ends_at_zero=False, divides_by_signal=False
    ),
    "plms": Sampler(
        plms, "PLMS", "linear multistep, begun by an improved Euler step", order=2, calls=(1, 1), multistep=True, ends_at_zero=False
    ),
    "euler": Sampler(euler, "Euler", "the first half of heun", levels=fractional_levels),
    "euler_ancestral": Sampler(
        euler_ancestral, "Euler a", "Euler below the next level, then noise up to it", levels=fractional_levels, draws_noise=True
    ),
    "heun": Sampler(heun, "Heun", "Karras et al. 2022, algorithm 1; two model calls", order=2, calls=(2, -1), levels=fractional_levels),
    "dpmpp_2m": Sampler(
        dpmpp_2m, "DPM++ 2M", "DPM-Solver++, ends of first order", order=2, multistep=True, counts_end=True, web_schedule="Uniform"
    ),
    "dpmpp_2m_karras": Sampler(
        dpmpp_2m, "DPM++ 2M", "the same over Karras et al. 2022, eq. 5", order=2, multistep=True, levels=karras_levels, own_spacing="Karras"
    ),
}
