"""Classifier-free guidance: the formula, the two halves in one batch, and what it refuses."""

import math

import pytest
import torch
from jaxtyping import TypeCheckError

from minidiff import guidance
from minidiff.guidance import guide, guided


def inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(3, 4, 6, 6, generator=generator, dtype=dtype)
    context, uncond_context = torch.randn(2, 3, 7, 5, generator=generator, dtype=dtype)
    return x_t, torch.tensor([3, 500, 998]), context, uncond_context


def model(x_t, t, context):
    """Every sample from its own x_t, t and context, every channel otherwise."""
    weight = context.mean((1, 2)).reshape(-1, 1, 1, 1) * torch.arange(1, 5, dtype=x_t.dtype).reshape(4, 1, 1)
    return torch.tanh(x_t * weight + t.reshape(-1, 1, 1, 1) / 1000)


def test_guide_is_the_formula_of_stable_diffusion_on_every_channel():
    uncond, cond = inputs()[0], inputs()[0].flip(0)
    for scale in (-1.0, 0.0, 1.0, 7.5):
        out = guide(uncond, cond, scale)
        for channel in range(4):
            # float64; the same sum written as two weights
            torch.testing.assert_close(out[:, channel], (1 - scale) * uncond[:, channel] + scale * cond[:, channel], rtol=0, atol=1e-12)
    assert torch.equal(guide(uncond, cond, 0.0), uncond)
    torch.testing.assert_close(guide(uncond, cond, 1.0), cond, rtol=0, atol=1e-15)  # float64


def test_the_paper_counts_its_scale_from_zero():
    uncond, cond = inputs()[0], inputs()[0].flip(0)
    w = 2.0  # Ho and Salimans 2022, eq. 6: (1 + w) cond - w uncond
    torch.testing.assert_close(guide(uncond, cond, 1 + w), (1 + w) * cond - w * uncond, rtol=0, atol=1e-12)  # float64


@pytest.mark.parametrize("scale", [-2.0, 0.0, 1.0, 7.5])
def test_both_halves_in_one_batch_equal_two_calls(scale):
    x_t, t, context, uncond_context = inputs()
    expected = guide(model(x_t, t, uncond_context), model(x_t, t, context), scale)
    torch.testing.assert_close(guided(model, context, uncond_context, scale)(x_t, t), expected, rtol=0, atol=1e-12)  # float64


def test_guidance_on_three_of_four_channels_would_be_noticed(monkeypatch):
    def three_channels(uncond, cond, guidance_scale):
        out = cond.clone()
        out[:, :3] = guide(uncond, cond, guidance_scale)[:, :3]
        return out

    monkeypatch.setattr(guidance, "guide", three_channels)
    with pytest.raises(AssertionError):
        test_both_halves_in_one_batch_equal_two_calls(7.5)


def test_the_model_is_called_once_with_twice_the_batch_and_alone_at_scale_one():
    x_t, t, context, uncond_context = inputs()
    batches = []

    def counting(x_t, t, context):
        batches.append((len(x_t), len(t), len(context)))
        return model(x_t, t, context)

    guided(counting, context, uncond_context, 7.5)(x_t, t)
    out = guided(counting, context, uncond_context, 1.0)(x_t, t)
    assert batches == [(6, 6, 6), (3, 3, 3)]
    assert torch.equal(out, model(x_t, t, context))
    assert torch.equal(guided(model, context, None, 1.0)(x_t, t), out)


def test_no_input_changes_and_the_dtype_stays():
    for dtype in (torch.float16, torch.float32):
        tensors = inputs(dtype)
        before = [tensor.clone() for tensor in tensors]
        x_t, t, context, uncond_context = tensors
        out = guided(lambda x_t, t, context: x_t * context.mean(), context, uncond_context, 7.5)(x_t, t)
        assert out.dtype == dtype and out.shape == x_t.shape
        assert all(torch.equal(a, b) for a, b in zip(tensors, before))


@pytest.mark.parametrize("scale", [math.nan, math.inf, -math.inf])
def test_a_scale_that_is_not_finite_is_refused(scale):
    _, _, context, uncond_context = inputs()
    with pytest.raises(ValueError, match=f"guidance_scale {scale} is not a finite number"):
        guided(model, context, uncond_context, scale)


def test_contexts_that_do_not_match_are_refused():
    _, _, context, uncond_context = inputs()
    with pytest.raises((ValueError, TypeCheckError), match="uncond_context"):
        guided(model, context, uncond_context[:1], 7.5)
    with pytest.raises(ValueError, match="guidance_scale 7.5 needs uncond_context"):
        guided(model, context, None, 7.5)
