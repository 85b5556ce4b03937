"""Every sampler's whole trajectory through the bundled U-Net, guided, against diffusers' scheduler walked by hand.

Both sides have the same U-Net, contexts and noise; the reference's guidance is written out here. The U-Net serves as two models: as the
v-model that it is, at zero terminal SNR and trailing timesteps, and as an eps-model on Stable Diffusion 1's schedule, its answers turned
into eps. In float64 the schedulers must agree to the last few digits; in float32 they are as installed.
"""

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

import minidiff.guidance
import weights_loader
from minidiff.config import ScheduleConfig
from minidiff.guidance import guided
from minidiff.pipeline import StableDiffusion
from minidiff.samplers import SAMPLERS, sample
from minidiff.schedule import NoiseSchedule
from tests.parity.schedulers import build_theirs, theirs

# diffusers with NumPy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

GUIDANCE = 4.0
PROMPT, NEGATIVE = "a red apple on a blue background", "a cat"
SHAPE = (8, 16, 16)  # of the bundled model's latents
ETAS = [(name, 0.0) for name in SAMPLERS] + [(name, 1.0) for name, row in SAMPLERS.items() if row.takes_eta]

# A step. Rounding leaves 1e-6 on a U-Net's answer; guidance of 4 takes it 4 and 3 times; what later steps make of a difference is the
# model's own, and five times is more than the bundled one does.
FLOAT32 = 5e-5
# Float64 is 5e8 times finer. Room for diffusers' x at zero terminal SNR, 4096 wide, and for the sqrt(1e-20) noise that its ddpm adds.
FLOAT64 = 1e-10

Model = Callable[[Tensor, Tensor, Tensor], Tensor]


def make_schedule(prediction: str, sampler: str) -> NoiseSchedule:
    if prediction == "eps":
        return NoiseSchedule(ScheduleConfig(prediction="eps"))
    zero_snr = sampler not in ("plms", "heun")  # diffusers has no such option for these two
    return NoiseSchedule(ScheduleConfig(prediction="v", zero_terminal_snr=zero_snr, spacing="trailing"))


@cache
def bundled(dtype: torch.dtype) -> StableDiffusion:
    return weights_loader.load("tiny", dtype=dtype)


def make_model(schedule: NoiseSchedule, dtype: torch.dtype) -> Model:
    """model(x_t, t, context): the U-Net as it is, or with its answer v turned into eps."""
    unet = bundled(dtype).unet
    if schedule.config.prediction == "v":
        return unet
    return lambda x_t, t, context: schedule.eps_from_v(x_t, t.long(), unet(x_t, t, context))


@cache
def contexts(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Of the prompt and of the negative prompt."""
    cond, uncond = bundled(dtype).encode_prompts([PROMPT, NEGATIVE]).split(1)
    return cond, uncond


def noise_list(dtype: torch.dtype) -> list[Tensor]:
    """The starting noise, and one for each of up to 50 steps."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randn(51, 1, *SHAPE, generator=generator, dtype=torch.float64).to(dtype))


@torch.no_grad()
def our_trajectory(model: Model, schedule: NoiseSchedule, dtype: torch.dtype, **settings) -> Tensor:
    x, *rest = noise_list(dtype)
    walk = sample(guided(model, *contexts(dtype), GUIDANCE), x, schedule, noise=iter(rest).__next__, **settings)
    return torch.stack([step.x_t for step in walk])


@torch.no_grad()
def their_trajectory(model: Model, schedule: NoiseSchedule, dtype: torch.dtype, monkeypatch, **settings) -> Tensor:
    cond, uncond = contexts(dtype)

    def guided_by_hand(x, t):
        without, with_prompt = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([uncond, cond])).chunk(2)
        return (1 - GUIDANCE) * without + GUIDANCE * with_prompt

    with monkeypatch.context() as patch:
        return theirs(guided_by_hand, schedule, noise_list(dtype), spacing=schedule.config.spacing, monkeypatch=patch, **settings)


def largest_difference(sampler: str, eta: float, prediction: str, steps: int, dtype: torch.dtype, monkeypatch) -> float:
    """Of x_t after any step. Raises AssertionError where it is more than the tolerance."""
    schedule = make_schedule(prediction, sampler)
    model, settings = make_model(schedule, dtype), dict(sampler=sampler, steps=steps, eta=eta)
    expected = their_trajectory(model, schedule, dtype, monkeypatch, **settings)
    actual = our_trajectory(model, schedule, dtype, **settings)
    assert len(actual) == steps and expected.std() > 0.5
    atol = steps * (FLOAT64 if dtype == torch.float64 else FLOAT32)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)
    return (actual - expected).abs().max().item()


def in_the_default_run(sampler: str, eta: float, prediction: str, steps: int, dtype: torch.dtype) -> bool:
    """50 steps take 5 s in float32 and 10 s in float64."""
    if steps == 50:
        return (sampler, eta, prediction, dtype) in (("ddim", 0.0, "v", torch.float32), ("dpmpp_2m", 0.0, "eps", torch.float32))
    return (prediction, dtype) in (("v", torch.float64), ("eps", torch.float32))


def can_float32(sampler: str, eta: float, prediction: str) -> bool:
    """At zero terminal SNR diffusers' euler begins with x 4096 wide, which float32 knows to 2e-4, and its ddim with eta 1 takes the root of
    a difference that is 0 but for rounding: 1e-3 off, or NaN."""
    return prediction == "eps" or (sampler not in ("euler", "euler_ancestral") and eta == 0)


CASES = [
    pytest.param(
        *case,
        id="-".join(str(value).removeprefix("torch.") for value in case),
        marks=[] if in_the_default_run(*case) else [pytest.mark.slow],
    )
    for steps in (10, 50)
    for prediction in ("v", "eps")
    for dtype in (torch.float32, torch.float64)
    for sampler, eta in ETAS
    if dtype == torch.float64 or can_float32(sampler, eta, prediction)
    for case in [(sampler, eta, prediction, steps, dtype)]
]


@pytest.mark.parametrize("sampler, eta, prediction, steps, dtype", CASES)
def test_every_latent_on_the_way_equals_that_of_diffusers(sampler, eta, prediction, steps, dtype, monkeypatch, record_property):
    error = largest_difference(sampler, eta, prediction, steps, dtype, monkeypatch)
    reference = type(build_theirs(sampler, make_schedule(prediction, sampler), "trailing")).__name__
    name = f"{sampler}, eta 1" if eta else sampler
    record_property("parity", (f"sampler {name}: trajectory of the bundled model", f"diffusers {reference}", str(dtype)[6:], error))


def test_guidance_on_all_channels_but_one_would_be_noticed(monkeypatch):
    right = minidiff.guidance.guide
    largest_difference("ddim", 0.0, "v", 2, torch.float64, monkeypatch)

    def all_but_one(uncond, cond, guidance_scale):
        return torch.cat([right(uncond, cond, guidance_scale)[:, :-1], uncond[:, -1:]], dim=1)

    monkeypatch.setattr(minidiff.guidance, "guide", all_but_one)
    with pytest.raises(AssertionError, match="not close"):
        largest_difference("ddim", 0.0, "v", 2, torch.float64, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["plms", "heun"])
def test_at_zero_terminal_snr_plms_and_heun_converge_to_ddim(sampler):
    schedule = make_schedule("v", "ddim")
    model = make_model(schedule, torch.float32)

    def end(sampler, steps):
        return our_trajectory(model, schedule, torch.float32, sampler=sampler, steps=steps)[-1]

    expected = end("ddim", 200)
    errors = [(end(sampler, steps) - expected).square().mean().sqrt().item() for steps in (10, 40, 160)]
    assert errors == sorted(errors, reverse=True)
    # Of latents of deviation 1 to 1.5. What is left is mostly the noise of timestep 0, 0.03, that ddim and plms end with.
    assert errors[-1] < min(0.05, errors[0] / 3)
