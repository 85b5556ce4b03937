"""Samplers: from noise back to a latent, a few dozen noise levels at a time.

    x = noise --> model(x_t, t) --> x0_hat, eps_hat --> x_t of the next level --> ... --> x_t = latent for the decoder

Each sampler is one pure step function, from the noise level `now` to the lower level `then`; `sample` walks it over all
levels. x_t is always in variance-preserving coordinates, x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps; papers that
write x = x_0 + sigma eps instead (Karras et al. 2022) mean x_t / sqrt(alpha_bar), with sigma = sqrt((1 - alpha_bar) / alpha_bar).

    ddpm             Ho et al. 2020, the small variance; any number of steps
    ddim             Song et al. 2021; eta 0 draws no noise, eta 1 is ddpm's variance
    plms             Liu et al. 2022 ("Pseudo numerical methods"), the linear multistep method, begun by one improved Euler step
    euler, heun      heun is algorithm 1 of Karras et al. 2022, euler its first half
    euler_ancestral  k-diffusion: an Euler step to a lower level than asked for, then noise back up to it
    dpmpp_2m         Lu et al. 2022 ("DPM-Solver++"), 2M with the midpoint rule; first and last step of first order
    dpmpp_2m_karras  the same over the levels of Karras et al. 2022, eq. 5, each shown to the model as the nearest timestep

Every trajectory equals diffusers' scheduler of that name (plms: PNDMScheduler with skip_prk_steps; the rest: final sigma 0,
set_alpha_to_one False, steps_offset 1). Left out: clipping and thresholding of x0_hat, which latents do not want, and churn.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import log, sqrt

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.schedule import SPACINGS, NoiseSchedule

SAMPLERS = ("ddpm", "ddim", "plms", "euler", "euler_ancestral", "heun", "dpmpp_2m", "dpmpp_2m_karras")

# Where sigma would be infinite: the smallest positive half-precision number, as diffusers has it.
SMALLEST_ALPHA_BAR = 2.0**-24

# Adams-Bashforth weights, newest prediction first, by the number of predictions at hand; four are Liu et al. 2022, eq. 12.
MULTISTEP = {2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}


@dataclass(frozen=True)
class Step:
    """One step of a sampler, numbered from 0.

    t: the timestep at which the step began. x0_hat: what the model took the clean latent for, there.
    x_t: the latent after the step; that of the last step is what is decoded.
    attention_maps: where they were asked for, the cross-attention of the step's first model call (see attention_maps.py).
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
    def signal(self) -> float:
        return sqrt(self.alpha_bar)

    @property
    def noise(self) -> float:
        return sqrt(1 - self.alpha_bar)

    @property
    def sigma(self) -> float:
        return self.noise / self.signal


@dataclass(frozen=True)
class Denoiser:
    """A model and how to read its answer. Steps are computed in float32 at least; the model sees its own dtype."""

    model: Callable[[Tensor, Tensor], Tensor]
    prediction: str
    dtype: torch.dtype

    def predict(self, x_t: Float[Tensor, "B *dims"], level: Level) -> Float[Tensor, "B *dims"]:
        """The raw prediction, eps or v."""
        t_dtype = torch.int64 if isinstance(level.t, int) else torch.float32
        t = torch.full((x_t.shape[0],), level.t, dtype=t_dtype, device=x_t.device)
        return self.model(x_t.to(self.dtype), t).to(x_t.dtype)

    def split(self, raw: Float[Tensor, "B *dims"], x_t: Float[Tensor, "B *dims"], level: Level) -> tuple[Tensor, Tensor]:
        """x0_hat and eps_hat, with x_t = sqrt(alpha_bar) x0_hat + sqrt(1 - alpha_bar) eps_hat."""
        if self.prediction == "eps":
            return (x_t - level.noise * raw) / level.signal, raw
        return level.signal * x_t - level.noise * raw, level.signal * raw + level.noise * x_t

    def __call__(self, x_t: Float[Tensor, "B *dims"], level: Level) -> tuple[Tensor, Tensor]:
        return self.split(self.predict(x_t, level), x_t, level)


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
) -> Iterator[Step]:
    """Walk from noise to a latent; yields `steps` Steps.

    model(x_t, t): the raw prediction, eps or v as schedule.config.prediction says; t is (B,), int64, but float32 for euler,
        euler_ancestral and heun over "linspace", which visit fractional timesteps. Called 2 steps - 1 times by heun,
        steps + 1 times by plms, steps times by the others.
    x: unit normal, whatever the sampler. spacing: leading, linspace or trailing; None is the schedule's own; dpmpp_2m_karras
        has a spacing of its own and uses neither. eta: for ddim, 0..1. noise(): a fresh unit normal of x's shape, for ddpm,
        euler_ancestral and ddim with eta > 0.

    With zero terminal SNR, samplers that divide by sqrt(alpha_bar) start from alpha_bar = 2^-24; ddpm and ddim from 0.
    Raises ValueError, before the model is called, for an argument outside these.
    """
    spacing = schedule.config.spacing if spacing is None else spacing
    _check(sampler, steps, spacing, eta, noise, schedule)
    visited = levels(schedule, sampler, steps, spacing)
    if schedule.config.prediction == "eps" and visited[0].alpha_bar == 0:
        raise ValueError(
            f"sampler {sampler!r} cannot start an eps-model at timestep {visited[0].t}, where zero terminal SNR leaves nothing "
            "but noise to divide by; use a v-model, another sampler or spacing 'leading'"
        )
    return _walk(Denoiser(model, schedule.config.prediction, x.dtype), x, visited, sampler, eta, noise)


def _walk(
    denoise: Denoiser, x: Tensor, visited: list[Level], sampler: str, eta: float, noise: Callable[[], Tensor] | None
) -> Iterator[Step]:
    x_t = x.to(torch.promote_types(x.dtype, torch.float32))
    history, previous = (), None
    for i, (now, then) in enumerate(pairwise(visited)):
        if sampler == "ddpm":
            x_t, x0_hat = ddpm(denoise, x_t, now, then, noise)
        elif sampler == "ddim":
            x_t, x0_hat = ddim(denoise, x_t, now, then, eta, noise)
        elif sampler == "plms":
            x_t, x0_hat, history = plms(denoise, x_t, now, then, history)
        elif sampler == "euler":
            x_t, x0_hat = euler(denoise, x_t, now, then)
        elif sampler == "euler_ancestral":
            x_t, x0_hat = euler_ancestral(denoise, x_t, now, then, noise)
        elif sampler == "heun":
            x_t, x0_hat = heun(denoise, x_t, now, then)
        else:
            x_t, x0_hat = dpmpp_2m(denoise, x_t, now, then, previous)
            previous = now, x0_hat
        yield Step(i, now.t, x_t.to(x.dtype), x0_hat.to(x.dtype))


def ddpm(denoise: Denoiser, x_t: Float[Tensor, "B *dims"], now: Level, then: Level, noise: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """Draw from q(x_then | x_now, x0_hat) (DDPM eq. 6 and 7, with the betas of the jump from `then` to `now`)."""
    x0_hat, _ = denoise(x_t, now)
    alpha = now.alpha_bar / then.alpha_bar
    to_x0 = then.signal * (1 - alpha) / (1 - now.alpha_bar)
    to_x_t = sqrt(alpha) * (1 - then.alpha_bar) / (1 - now.alpha_bar)
    variance = (1 - then.alpha_bar) / (1 - now.alpha_bar) * (1 - alpha)
    x_t = to_x0 * x0_hat + to_x_t * x_t
    if variance > 0:
        x_t = x_t + sqrt(variance) * noise()
    return x_t, x0_hat


def ddim(
    denoise: Denoiser, x_t: Float[Tensor, "B *dims"], now: Level, then: Level, eta: float, noise: Callable[[], Tensor] | None
) -> tuple[Tensor, Tensor]:
    """DDIM eq. 12 with sigma of eq. 16, here written sigma^2 = renewed (1 - alpha_bar_then); alpha there is alpha_bar here."""
    x0_hat, eps_hat = denoise(x_t, now)
    renewed = eta**2 * (1 - now.alpha_bar / then.alpha_bar) / (1 - now.alpha_bar)  # share of the noise that is drawn afresh
    x_t = then.signal * x0_hat + sqrt(1 - renewed) * then.noise * eps_hat
    if renewed > 0:
        x_t = x_t + sqrt(renewed) * then.noise * noise()
    return x_t, x0_hat


def plms(
    denoise: Denoiser, x_t: Float[Tensor, "B *dims"], now: Level, then: Level, history: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """A ddim step with the prediction extrapolated from this and up to three earlier ones (history, newest first).

    A v-model's predictions are extrapolated as they are and then turned into eps with the present x_t, as diffusers does;
    that is only of first order (with eps-models plms is of second).
    """
    raw = denoise.predict(x_t, now)

    def move(prediction: Tensor) -> Tensor:
        x0_hat, eps_hat = denoise.split(prediction, x_t, now)
        return then.signal * x0_hat + then.noise * eps_hat

    if history:
        recent = (raw, *history)
        extrapolated = sum(weight * prediction for weight, prediction in zip(MULTISTEP[len(recent)], recent))
    else:
        extrapolated = (raw + denoise.predict(move(raw), then)) / 2
    x0_hat, _ = denoise.split(raw, x_t, now)
    return move(extrapolated), x0_hat, (raw, *history)[:3]


def euler(denoise: Denoiser, x_t: Float[Tensor, "B *dims"], now: Level, then: Level) -> tuple[Tensor, Tensor]:
    """x + (sigma_then - sigma_now) dx/dsigma with dx/dsigma = eps_hat (Karras et al. 2022, eq. 3 and 4)."""
    x0_hat, eps_hat = denoise(x_t, now)
    x = x0_hat + then.sigma * eps_hat  # x is x0_hat + sigma_now eps_hat; sigma_now may be 4096, so it is not added and taken off
    return then.signal * x, x0_hat


def euler_ancestral(
    denoise: Denoiser, x_t: Float[Tensor, "B *dims"], now: Level, then: Level, noise: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """Euler down to sigma_down, then noise of sigma_up, with sigma_down^2 + sigma_up^2 = sigma_then^2.

    Worked out, this is ddpm; they differ only in the levels that they visit over "linspace" and at zero terminal SNR.
    """
    x0_hat, eps_hat = denoise(x_t, now)
    sigma_down = then.sigma**2 / now.sigma
    sigma_up = sqrt(then.sigma**2 - sigma_down**2)
    x = x0_hat + sigma_down * eps_hat
    if sigma_up > 0:
        x = x + sigma_up * noise()
    return then.signal * x, x0_hat


def heun(denoise: Denoiser, x_t: Float[Tensor, "B *dims"], now: Level, then: Level) -> tuple[Tensor, Tensor]:
    """An Euler step, corrected to the mean of the slopes at its two ends (Karras et al. 2022, algorithm 1, lines 6-8).

    From the start of zero terminal SNR the slopes' mean would be multiplied by sigma = 4096. There the mean is taken of the x0_hat at
    the two ends, the slope of the same curve x / sigma over 1 / sigma: of second order too, and within bounds.
    """
    x0_hat, slope = denoise(x_t, now)
    x = x0_hat + then.sigma * slope
    if then.sigma > 0:
        x0_then, slope_then = denoise(then.signal * x, then)
        if now.alpha_bar == SMALLEST_ALPHA_BAR:
            x = x + (1 - then.sigma / now.sigma) * (x0_then - x0_hat) / 2
        else:
            x = x + (then.sigma - now.sigma) * (slope_then - slope) / 2
    return then.signal * x, x0_hat


def dpmpp_2m(
    denoise: Denoiser, x_t: Float[Tensor, "B *dims"], now: Level, then: Level, previous: tuple[Level, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """DPM-Solver++(2M), algorithm 2: x0_hat extrapolated to the middle of the step in lambda = -log(sigma).

    previous: the level of the last step and its x0_hat; None at the first. h is the step in lambda, exp(-h) the ratio of sigmas.
    """
    x0_hat, _ = denoise(x_t, now)
    extrapolated = x0_hat
    if previous is not None and then.sigma > 0:
        earlier, x0_earlier = previous
        r = log(earlier.sigma / now.sigma) / log(now.sigma / then.sigma)
        extrapolated = (1 + 1 / (2 * r)) * x0_hat - 1 / (2 * r) * x0_earlier
    x_t = then.noise / now.noise * x_t + then.signal * (1 - then.sigma / now.sigma) * extrapolated
    return x_t, x0_hat


def levels(schedule: NoiseSchedule, sampler: str, steps: int, spacing: str) -> list[Level]:
    """The steps + 1 noise levels from start to end that diffusers' scheduler of this name visits.

    ddim and plms end at alpha_bar of timestep 0, as the original code; the others at no noise.
    """
    T = schedule.config.timesteps
    alpha_bar = schedule.alpha_bar.numpy().copy()
    if schedule.config.zero_terminal_snr and sampler not in ("ddpm", "ddim"):
        alpha_bar[-1] = SMALLEST_ALPHA_BAR
    end = Level(0, float(alpha_bar[0]) if sampler in ("ddim", "plms") else 1.0)

    if sampler == "dpmpp_2m_karras":
        sigma = np.sqrt((1 - alpha_bar) / alpha_bar)
        sigmas = karras_sigmas(sigma[0], sigma[-1], steps)
        t = np.interp(np.log(sigmas), np.log(sigma), np.arange(T)).round()
        visited = [Level(int(t_i), 1 / (1 + sigma_i**2)) for t_i, sigma_i in zip(t, sigmas.tolist())]
    elif spacing == "linspace" and sampler in ("euler", "euler_ancestral", "heun"):
        sigma = np.sqrt((1 - alpha_bar) / alpha_bar)
        t = np.linspace(0, T - 1, steps)[::-1]
        sigmas = np.interp(t, np.arange(T), sigma)
        visited = [Level(t_i, 1 / (1 + sigma_i**2)) for t_i, sigma_i in zip(t.tolist(), sigmas.tolist())]
    else:
        # dpmpp_2m counts its end as one of the evenly spaced timesteps
        extra = 1 if sampler == "dpmpp_2m" and spacing != "trailing" else 0
        t = schedule.timesteps(steps + extra, spacing)[:steps].tolist()
        visited = [Level(t_i, float(alpha_bar[t_i])) for t_i in t]
    return [*visited, end]


def karras_sigmas(sigma_min: float, sigma_max: float, steps: int) -> Float[np.ndarray, "S"]:
    """Falling from sigma_max to sigma_min, evenly in sigma^(1/7) (Karras et al. 2022, eq. 5 with rho = 7)."""
    rho = 7.0
    return np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps) ** rho


def _check(sampler: str, steps: int, spacing: str, eta: float, noise: Callable[[], Tensor] | None, schedule: NoiseSchedule):
    T = schedule.config.timesteps
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler {sampler!r} unknown; choose {', '.join(SAMPLERS)}")
    if spacing not in SPACINGS:
        raise ValueError(f"spacing {spacing!r} unknown; choose {', '.join(SPACINGS)}")
    most = T - 1 if sampler == "dpmpp_2m" and spacing != "trailing" else T
    if not 1 <= steps <= most:
        raise ValueError(f"steps {steps} is outside 1..{most} for sampler {sampler!r}; the model knows {T} timesteps")
    if not 0 <= eta <= 1:
        raise ValueError(f"eta {eta} is outside 0..1; 0 draws no noise, 1 is the variance of ddpm")
    if eta != 0 and sampler != "ddim":
        raise ValueError(f"eta {eta} belongs to sampler 'ddim'; leave it out for {sampler!r}")
    if noise is None and (sampler in ("ddpm", "euler_ancestral") or eta > 0):
        raise ValueError(f"sampler {sampler!r} draws noise; give noise=, a function that returns a fresh unit normal like x")
