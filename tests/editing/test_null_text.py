"""Null-text inversion: against the algorithm written out on diffusers' DDIM, back to the picture under guidance, alone as in a batch."""

import diffusers
import pytest
import torch

from minidiff.editing.inversion import invert
from minidiff.editing.null_text import null_text, with_empty_prompts
from minidiff.editing.prompt_to_prompt import AttentionEdit, prompt_to_prompt
from minidiff.editing.start import Sampling, encode
from tests.editing.small import last, picture
from tests.small_models import small_config, small_model

PROMPTS = ["a red apple", "a blue cat"]
STEPS = 8


@pytest.fixture(scope="module")
def sd():
    return small_model()


@pytest.fixture(scope="module")
def x_0(sd):
    return encode(sd, torch.cat([picture(0), picture(1)]))


@pytest.fixture(scope="module")
def up(sd, x_0):
    return list(invert(sd, PROMPTS, x_0, steps=STEPS))


def test_each_step_is_the_papers_on_diffusers_ddim():
    """Their scheduler takes the step, torch's Adam and the two constants are written out, and nothing of ours but the U-Net is used."""
    sd, steps, scale = small_model(small_config("eps")), 4, 3.0
    x_0 = encode(sd, picture(0))
    up = list(invert(sd, PROMPTS[:1], x_0, steps=steps, spacing="leading"))
    learned = list(null_text(sd, PROMPTS[:1], x_0, up, guidance_scale=scale, spacing="leading", iterations=5))
    theirs = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, set_alpha_to_one=False, clip_sample=False
    )
    theirs.set_timesteps(steps)
    latents = [x_0, *(step.x_t for step in up)][::-1]
    cond, empty = sd.encode_prompts(PROMPTS[:1]), sd.encode_prompts([""])
    x = latents[0]
    for i, t in enumerate(theirs.timesteps):
        empty = empty.clone().requires_grad_()
        adam = torch.optim.Adam([empty], lr=1e-2 * (1 - i / 100))
        with torch.no_grad():
            told = sd.unet(x, t[None], cond)
        for _ in range(5):
            untold = sd.unet(x, t[None], empty)
            loss = (theirs.step(untold + scale * (told - untold), t, x).prev_sample - latents[i + 1]).square().mean()
            adam.zero_grad()
            loss.backward(inputs=[empty])
            adam.step()
            if loss < 1e-5 + 2e-5 * i:
                break
        empty = empty.detach()
        with torch.no_grad():
            untold = sd.unet(x, t[None], empty)
            x = theirs.step(untold + scale * (told - untold), t, x).prev_sample
        assert learned[i].t == t
        # Adam divides by the gradient's size, so rounding of a small gradient is seen at 1e-3 of a rate of 1e-2.
        torch.testing.assert_close(learned[i].empty, empty, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(learned[i].x_t, x, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_guidance_comes_nearer_to_the_picture_the_more_is_learned(sd, x_0, up):
    """A random U-Net says little by its text, so it only comes nearer; README.md has the bundled model's way back."""
    one, x_0 = [type(step)(step.i, step.t, step.x_t[:1], step.x0_hat[:1]) for step in up], x_0[:1]
    down = dict(steps=STEPS, x=one[-1].x_t)
    ends = [last(sd.denoise(PROMPTS[0], **down))]
    for iterations in (20, 60):
        learned = list(null_text(sd, PROMPTS[:1], x_0, one, iterations=iterations))
        ends.append(last(sd.denoise(PROMPTS[0], **down, model=with_empty_prompts(sd.predict, learned))))
        torch.testing.assert_close(ends[-1], learned[-1].x_t, rtol=1e-3, atol=1e-3)  # guidance's halves in one batch, and not
        assert learned[-1].error == pytest.approx((learned[-1].x_t - x_0).square().mean().item(), rel=1e-5)
    errors = [(end - x_0).square().mean().item() for end in ends]
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.8 * errors[0]
    assert [step.i for step in learned] == list(range(STEPS)) and all(1 <= step.iterations <= 60 for step in learned)


def test_each_picture_is_learned_by_itself(sd, x_0, up):
    both = list(null_text(sd, PROMPTS, x_0, up, iterations=2))
    *_, second = null_text(
        sd, PROMPTS[1:], x_0[1:], [type(step)(step.i, step.t, step.x_t[1:], step.x0_hat[1:]) for step in up], iterations=2
    )
    torch.testing.assert_close(both[-1].empty[1:], second.empty, rtol=0, atol=0)
    assert all(p.grad is None for p in sd.unet.parameters())


def test_an_inverted_picture_is_edited_and_its_original_comes_back(sd, x_0, up):
    learned = list(null_text(sd, PROMPTS, x_0, up, iterations=2))
    rows = last(
        prompt_to_prompt(
            sd,
            "a red apple",
            "a red lion",
            AttentionEdit(1.0, 0.5),
            seeds=[0, 0],
            sampling=Sampling(STEPS),
            x=up[-1].x_t,
            model=with_empty_prompts(sd.predict, learned),
        )
    )
    assert rows.shape == (4, *x_0.shape[1:])
    torch.testing.assert_close(rows[0], learned[-1].x_t[0], rtol=1e-3, atol=1e-3)  # the first picture's prompt is the original
    assert not torch.allclose(rows[2:], rows[:2], atol=1e-2)


def test_what_cannot_be_learned_or_used_is_refused_before_any_step(sd, x_0, up):
    with pytest.raises(ValueError, match="guidance_scale 1 does not look at the empty prompt"):
        null_text(sd, PROMPTS, x_0, up, guidance_scale=1)
    with pytest.raises(ValueError, match="iterations 0: give at least 1"):
        null_text(sd, PROMPTS, x_0, up, iterations=0)
    with pytest.raises(ValueError, match="1 prompts for 2 pictures"):
        null_text(sd, PROMPTS[:1], x_0, up)
    half = small_model()
    half.unet.bfloat16()
    with pytest.raises(ValueError, match="needs gradients in float32, and the model is in torch.bfloat16"):
        null_text(half, PROMPTS, x_0, up)
    model = with_empty_prompts(sd.predict, list(null_text(sd, PROMPTS, x_0, up, iterations=1)))
    with pytest.raises(ValueError, match="no empty prompt was learned for t = "):
        last(sd.denoise(PROMPTS, seeds=[0, 0], steps=3, x=up[-1].x_t, model=model))
    with pytest.raises(ValueError, match="3 rows of x_t and 6 of context for 2 inverted pictures"):
        last(sd.denoise(["a cat"] * 3, seeds=[0] * 3, steps=STEPS, model=model))
