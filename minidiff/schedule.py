"""The noise schedule: how a latent turns into noise, and which timesteps a sampler walks back through.

    x_0 --- q_sample(t) ---> x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps        t = 0 (almost clean) .. T-1 (noise)

Stable Diffusion trains on T = 1000 timesteps of the discrete process of Ho et al. 2020 ("Denoising diffusion probabilistic
models", DDPM). Its betas rise as a square: what its code calls "linear" is linear in sqrt(beta). Tables are kept in
float64; what is computed with them follows the dtype and the device of the inputs.

Left out: the cosine and sigmoid schedules, learned variances, predicting x_0 itself; no Stable Diffusion uses them.
"""

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from minidiff.config import ScheduleConfig, check_choice
from minidiff.transfer import to_device

SPACINGS = ("leading", "linspace", "trailing")


class NoiseSchedule:
    """betas and alpha_bar (both float64, shape (T,)), and everything that follows from them.

    DDPM writes alpha_bar for what DDIM's paper writes alpha. Raises ValueError for betas outside (0, 1) and unknown choices.
    """

    betas: Float[Tensor, "T"]
    alpha_bar: Float[Tensor, "T"]

    def __init__(self, config: ScheduleConfig):
        _check(config)
        self.config = config
        self.betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, config.timesteps, dtype=torch.float64) ** 2
        self.alpha_bar = torch.cumprod(1 - self.betas, dim=0)
        if config.zero_terminal_snr:
            self.alpha_bar = zero_terminal_snr(self.alpha_bar)
            alphas = torch.cat([self.alpha_bar[:1], self.alpha_bar[1:] / self.alpha_bar[:-1]])
            self.betas = 1 - alphas

    def q_sample(self, x_0: Float[Tensor, "B *dims"], t: Int[Tensor, "B"], eps: Float[Tensor, "B *dims"]) -> Float[Tensor, "B *dims"]:
        """Compute x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps (DDPM eq. 4); eps: unit normal, t: 0..T-1, one per sample."""
        signal, noise = self._scales(t, x_0)
        return signal * x_0 + noise * eps

    def velocity(self, x_0: Float[Tensor, "B *dims"], t: Int[Tensor, "B"], eps: Float[Tensor, "B *dims"]) -> Float[Tensor, "B *dims"]:
        """Compute v = sqrt(alpha_bar_t) eps - sqrt(1 - alpha_bar_t) x_0 (Salimans and Ho 2022, section 4)."""
        signal, noise = self._scales(t, x_0)
        return signal * eps - noise * x_0

    def target(self, x_0: Float[Tensor, "B *dims"], t: Int[Tensor, "B"], eps: Float[Tensor, "B *dims"]) -> Float[Tensor, "B *dims"]:
        """Return what the U-Net is trained to predict at q_sample(x_0, t, eps): eps, or v, as the config says."""
        return eps if self.config.prediction == "eps" else self.velocity(x_0, t, eps)

    def x0_from_eps(self, x_t: Float[Tensor, "B *dims"], t: Int[Tensor, "B"], eps: Float[Tensor, "B *dims"]) -> Float[Tensor, "B *dims"]:
        """Compute x_0 = (x_t - sqrt(1 - alpha_bar_t) eps) / sqrt(alpha_bar_t) (DDPM eq. 15); infinite where alpha_bar_t is 0."""
        signal, noise = self._scales(t, x_t)
        return (x_t - noise * eps) / signal

    def eps_from_x0(self, x_t: Float[Tensor, "B *dims"], t: Int[Tensor, "B"], x_0: Float[Tensor, "B *dims"]) -> Float[Tensor, "B *dims"]:
        """Compute eps = (x_t - sqrt(alpha_bar_t) x_0) / sqrt(1 - alpha_bar_t), the same equation solved for eps."""
        signal, noise = self._scales(t, x_t)
        return (x_t - signal * x_0) / noise

    def x0_from_v(self, x_t: Float[Tensor, "B *dims"], t: Int[Tensor, "B"], v: Float[Tensor, "B *dims"]) -> Float[Tensor, "B *dims"]:
        """Compute x_0 = sqrt(alpha_bar_t) x_t - sqrt(1 - alpha_bar_t) v: (x_0, eps) turned by an angle is (x_t, v), this turns it back."""
        signal, noise = self._scales(t, x_t)
        return signal * x_t - noise * v

    def eps_from_v(self, x_t: Float[Tensor, "B *dims"], t: Int[Tensor, "B"], v: Float[Tensor, "B *dims"]) -> Float[Tensor, "B *dims"]:
        """Compute eps = sqrt(alpha_bar_t) v + sqrt(1 - alpha_bar_t) x_t, the other half of the same rotation."""
        signal, noise = self._scales(t, x_t)
        return signal * v + noise * x_t

    def snr(self, t: Int[Tensor, "B"]) -> Float[Tensor, "B"]:
        """Return the signal-to-noise ratio alpha_bar_t / (1 - alpha_bar_t), float32 on t's device."""
        return to_device(t.device, (self.alpha_bar / (1 - self.alpha_bar)).float())[t]

    def timesteps(self, steps: int, spacing: str | None = None) -> Int[Tensor, "S"]:
        """Return the `steps` timesteps that a sampler visits, falling; equal to diffusers' for DDIM (steps_offset 1).

        spacing (Lin et al. 2023, table 2; None means the config's):
          leading   every (T // steps)th timestep counted from 1, as in the original code. Seldom reaches T-1, and more than
                    T / 2 steps all have stride 1 and start at t = steps. steps = T visits every timestep.
          linspace  evenly from T-1 to 0, both visited.
          trailing  evenly, counted down from T-1; needed where the last timestep has zero SNR.
        The original's "leading" makes 31 steps of 30 asked for; here the number asked for is made.
        Raises ValueError for steps outside 1..T and an unknown spacing.
        """
        T = self.config.timesteps
        spacing = self.config.spacing if spacing is None else spacing
        check_choice("spacing", spacing, SPACINGS)
        if not 1 <= steps <= T:
            raise ValueError(f"steps {steps} is outside 1..{T}; the model knows {T} timesteps")
        if spacing == "leading":
            offset = 1 if steps < T else 0  # with every timestep visited, counting from 1 would ask for timestep T
            t = np.arange(steps)[::-1] * (T // steps) + offset
        elif spacing == "linspace":
            t = np.linspace(0, T - 1, steps)[::-1].round()
        else:
            t = np.arange(T, 0, -T / steps)[:steps].round() - 1  # arange with a fraction may give one too many
        return torch.from_numpy(t.astype(np.int64))

    def _scales(self, t: Int[Tensor, "B"], like: Float[Tensor, "B *dims"]) -> tuple[Tensor, Tensor]:
        """Return sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), broadcastable to `like`, in its dtype and on its device."""
        shape = "B -> B" + " 1" * (like.ndim - 1)
        tables = (table.sqrt().to(like.dtype) for table in (self.alpha_bar, 1 - self.alpha_bar))  # Apple's GPU has no float64
        signal, noise = (rearrange(to_device(t.device, table)[t], shape) for table in tables)
        return signal, noise


def zero_terminal_snr(alpha_bar: Float[Tensor, "T"]) -> Float[Tensor, "T"]:
    """Shift and scale sqrt(alpha_bar) so that the last entry is 0 and the first is kept (Lin et al. 2023, algorithm 1)."""
    root = alpha_bar.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2


def _check(config: ScheduleConfig):
    if config.timesteps < 2:
        raise ValueError(f"ScheduleConfig: timesteps {config.timesteps}; a schedule has at least 2 (Stable Diffusion: 1000)")
    if not 0 < config.beta_start <= config.beta_end < 1:
        raise ValueError(
            f"ScheduleConfig: beta_start {config.beta_start}, beta_end {config.beta_end}; expected 0 < beta_start <= beta_end < 1"
        )
    check_choice("ScheduleConfig: prediction", config.prediction, ("eps", "v"))
    check_choice("ScheduleConfig: spacing", config.spacing, SPACINGS)
