"""diffusers' schedulers, set to do what our samplers do, and walked by hand."""

from collections.abc import Callable

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from minidiff.schedule import NoiseSchedule

MODULES = ("ddpm", "ddim", "pndm", "euler_discrete", "euler_ancestral_discrete", "heun_discrete", "dpmsolver_multistep")


class InFloat64:
    """torch or numpy for a module that says float32 where it means the dtype of its tables and steps."""

    def __init__(self, library):
        self.library, self.float32 = library, library.float64

    def __getattr__(self, name: str):
        return getattr(self.library, name)


def build_theirs(sampler: str, schedule: NoiseSchedule, spacing: str) -> diffusers.SchedulerMixin:
    config = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    config |= dict(prediction_type={"eps": "epsilon", "v": "v_prediction"}[schedule.config.prediction], timestep_spacing=spacing)
    zero_snr = dict(rescale_betas_zero_snr=schedule.config.zero_terminal_snr)
    match sampler:
        case "ddpm":
            return diffusers.DDPMScheduler(**config, **zero_snr, clip_sample=False, variance_type="fixed_small")
        case "ddim":
            return diffusers.DDIMScheduler(**config, **zero_snr, clip_sample=False, set_alpha_to_one=False)
        case "plms":
            scheduler = diffusers.PNDMScheduler(**config, skip_prk_steps=True, set_alpha_to_one=False)
        case "euler":
            return diffusers.EulerDiscreteScheduler(**config, **zero_snr)
        case "euler_ancestral":
            return diffusers.EulerAncestralDiscreteScheduler(**config, **zero_snr)
        case "heun":
            scheduler = diffusers.HeunDiscreteScheduler(**config)
        case _:
            return diffusers.DPMSolverMultistepScheduler(
                **config,
                **zero_snr,
                algorithm_type="dpmsolver++",
                solver_type="midpoint",
                solver_order=2,
                use_karras_sigmas=sampler == "dpmpp_2m_karras",
                final_sigmas_type="zero",  # the default, as is lower_order_final: the last step is of first order
            )
    if schedule.config.zero_terminal_snr:
        # These two have no such option; they get the table that diffusers' other schedulers make for themselves.
        scheduler.alphas_cumprod = build_theirs("euler", schedule, spacing).alphas_cumprod
        scheduler.final_alpha_cumprod = scheduler.alphas_cumprod[0]
    return scheduler


def theirs(
    model: Callable[[Tensor, Tensor], Tensor],
    schedule: NoiseSchedule,
    noises: list[Tensor],
    *,
    sampler: str,
    steps: int,
    spacing: str,
    eta: float = 0.0,
    monkeypatch: pytest.MonkeyPatch,
) -> Tensor:
    """diffusers' trajectory in our coordinates, one latent a step.

    Given noise in float64, it keeps its tables in float64 too, and computes in it. As installed, several of its schedulers round
    everything to float32, which would hide an error of 1e-6 and less.
    """
    x, *rest = noises
    rest = iter(rest)
    for module in MODULES:
        path = f"diffusers.schedulers.scheduling_{module}"
        if x.dtype == torch.float64:
            monkeypatch.setattr(f"{path}.torch", InFloat64(torch))
            monkeypatch.setattr(f"{path}.np", InFloat64(np))
        if module in ("ddpm", "ddim", "euler_ancestral_discrete"):
            monkeypatch.setattr(f"{path}.randn_tensor", lambda *_, **__: next(rest))

    scheduler = build_theirs(sampler, schedule, spacing)
    scheduler.set_timesteps(steps)
    if sampler not in ("ddpm", "ddim", "plms"):
        # Without it diffusers skips a level where Karras' rounded timesteps begin with two equal ones.
        scheduler.set_begin_index(0)
    exploding = sampler in ("euler", "euler_ancestral", "heun")  # these keep x_0 + sigma eps
    if exploding:
        x = x * (scheduler.sigmas[0].to(x.dtype) ** 2 + 1) ** 0.5

    trajectory, timesteps = [], scheduler.timesteps
    for i, t in enumerate(timesteps):
        shown = t.float() if t.is_floating_point() else t
        prediction = model(scheduler.scale_model_input(x, t), shown[None].expand(len(x)))
        if sampler in ("ddim", "plms") and i + 1 < len(timesteps) and t > timesteps[i + 1]:
            # These two take the next timestep to be t - 1000 // steps, which is not the one that they visit next where the
            # spacing is uneven. Make it so. (plms visits its second timestep twice.)
            gap = int(t - timesteps[i + 1])
            scheduler.num_inference_steps = 1000 // gap
            assert 1000 // scheduler.num_inference_steps == gap
        extra = dict(eta=eta) if sampler == "ddim" else {}
        x = scheduler.step(prediction, t, x, **extra).prev_sample
        trajectory.append(x / (scheduler.sigmas[scheduler.step_index] ** 2 + 1) ** 0.5 if exploding else x)
    if sampler == "plms":
        trajectory = trajectory[1:]  # the first is the look ahead
    if sampler == "heun":
        trajectory = trajectory[1::2] + trajectory[-1:]  # two calls a step but for the last
    return torch.stack(trajectory)
