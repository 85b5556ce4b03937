"""DDIM inversion: against diffusers' inverse scheduler, exact where the model's answer does not depend on x, and there and back."""

import diffusers
import pytest
import torch

from minidiff.editing.inversion import invert
from minidiff.editing.start import encode
from minidiff.samplers import levels
from tests.editing.small import last, picture
from tests.small_models import small_config, small_model

PROMPTS = ["a red apple", "a cat"]


@pytest.fixture
def sd():
    return small_model()


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_each_step_is_that_of_diffusers_inverse_scheduler_with_the_same_prediction(prediction):
    """Theirs tells the model the next level; here it is given what ours predicted."""
    sd = small_model(small_config(prediction))
    theirs = diffusers.DDIMInverseScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        set_alpha_to_one=False,
        clip_sample=False,
        timestep_spacing="leading",
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[prediction],
        rescale_betas_zero_snr=prediction == "v",
    )
    theirs.set_timesteps(10)
    answers, predict = [], sd.predict
    sd.predict = lambda *args: answers.append(predict(*args)) or answers[-1]
    x_0 = encode(sd, torch.cat([picture(0), picture(1)]))
    steps = list(invert(sd, PROMPTS, x_0, steps=10, spacing="leading"))
    x = x_0
    for step, answer, t in zip(steps, answers, theirs.timesteps, strict=True):
        x = theirs.step(answer, t, x).prev_sample
        assert step.t == t
        torch.testing.assert_close(step.x_t, x, rtol=1e-4, atol=1e-4)  # their tables are float32
    assert [step.i for step in steps] == list(range(9, -1, -1))


def test_the_model_is_told_the_level_where_the_latent_is(sd):
    told, predict = [], sd.predict
    sd.predict = lambda x_t, t, conditioning: told.append(t.unique().item()) or predict(x_t, t, conditioning)
    list(invert(sd, PROMPTS[:1], encode(sd, picture()), steps=4))
    assert told == [level.t for level in levels(sd.schedule, "ddim", 4)][:0:-1]


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_it_is_exact_where_the_noise_is_the_same_everywhere(prediction):
    """A model that knows the one noise of its picture: there and back is the identity at any number of steps."""
    sd = small_model(small_config(prediction))
    x_0, eps = encode(sd, picture()), torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    levels_, schedule = levels(sd.schedule, "ddim", 4, "leading"), sd.schedule
    sd.predict = lambda x_t, t, conditioning: schedule.target(x_0, t, eps)
    end = levels_[-1]
    start = end.sqrt_alpha_bar * x_0 + end.sqrt_one_minus_alpha_bar * eps
    *_, noise = invert(sd, PROMPTS[:1], start, steps=4, spacing="leading")
    first = levels_[0]
    torch.testing.assert_close(noise.x_t, first.sqrt_alpha_bar * x_0 + first.sqrt_one_minus_alpha_bar * eps, rtol=1e-4, atol=1e-5)
    back = last(sd.denoise(PROMPTS[:1], steps=4, spacing="leading", guidance_scale=1, x=noise.x_t))
    torch.testing.assert_close(back, start, rtol=1e-4, atol=1e-5)


def test_more_steps_come_back_nearer(sd):
    x_0 = encode(sd, torch.cat([picture(0), picture(1)]))
    errors = []
    for steps in (5, 20, 80):
        *_, noise = invert(sd, PROMPTS, x_0, steps=steps)
        back = last(sd.denoise(PROMPTS, steps=steps, guidance_scale=1, seeds=[0, 1], x=noise.x_t))
        errors.append((back - x_0).square().mean().sqrt().item())
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0] / 3


def test_guidance_is_that_of_the_way_down(sd):
    x_0 = encode(sd, picture())
    plain, guided = (next(iter(invert(sd, PROMPTS[:1], x_0, steps=4, guidance_scale=scale))).x_t for scale in (1.0, 4.0))
    assert not torch.allclose(plain, guided, atol=1e-4)


def test_prompts_and_pictures_that_do_not_pair_up_are_refused_before_any_step(sd):
    x_0 = encode(sd, picture())
    with pytest.raises(ValueError, match="2 prompts for 1 pictures; give one for each"):
        invert(sd, PROMPTS, x_0)
    with pytest.raises(ValueError, match="steps 0 is outside"):
        invert(sd, PROMPTS[:1], x_0, steps=0)
    with pytest.raises(ValueError, match="guidance_scale nan"):
        invert(sd, PROMPTS[:1], x_0, guidance_scale=float("nan"))
