"""Inpainting: against diffusers' pipeline with 4 and 9 channels; what is known stays known; samplers, batches, adapters."""

from dataclasses import replace

import diffusers
import pytest
import torch

from minidiff.adapters.custom_diffusion import from_deltas
from minidiff.adapters.lora import merge_lora
from minidiff.editing.canvas import make_canvas
from minidiff.editing.inpaint import inpaint, keep_known, same_noise, with_hole
from minidiff.editing.masks import to_cells
from minidiff.editing.start import Sampling, add_noise, encode, find_start, first_noise
from minidiff.samplers import SAMPLERS, Step
from tests.adapters.learned_lora import random_lora
from tests.editing.small import SIDE, last, left_half, picture
from tests.parity.check import largest_error
from tests.parity.models import INPAINTING, SD1, SD2, SDXL, pipelines
from tests.parity.schedulers import build_theirs
from tests.small_models import small_config, small_model

PROMPTS, NEGATIVE = ["a red apple", "a cat"], "blurry"
THEIRS, THEIRS_XL = diffusers.StableDiffusionInpaintPipeline, diffusers.StableDiffusionXLInpaintPipeline
SDXL_INPAINTING = replace(SDXL, name="SDXL inpainting", unet=replace(SDXL.unet, in_channels=9))


@pytest.fixture
def sd():
    return small_model()


# --- parity -----------------------------------------------------------------------------------------------------------


# Not heun: diffusers blends between its two halves of a step too. plms and those that draw noise: as for image to image.
@pytest.mark.filterwarnings("ignore")  # of diffusers, on models of this size
@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp_2m"])
@pytest.mark.parametrize(
    "shape, strength",
    [(SD1, 1.0), (SD1, 0.6), (SD2, 1.0), (INPAINTING, 1.0), (INPAINTING, 0.6), (SDXL, 0.6), (SDXL_INPAINTING, 1.0)],
    ids=lambda value: str(value),
)
def test_latents_equal_those_of_diffusers_from_the_same_level_and_noise(shape, strength, sampler, monkeypatch):
    ours, theirs = pipelines(shape, torch.float32)
    kind = THEIRS_XL if shape.text_2 else THEIRS
    pipeline = kind(**theirs.components, **({} if shape.text_2 else {"requires_safety_checker": False}))
    pipeline.scheduler = build_theirs(sampler, ours.schedule, "leading")
    pipeline.set_progress_bar_config(disable=True)
    side = 8 * 16
    pixels, mask = torch.cat([picture(i, side, side) for i in range(2)]), left_half(side, side)
    noise = first_noise([0, 1], torch.zeros(2, 4, 16, 16))
    # Theirs draws the posterior's sample and the noise; it is given the mean, and ours.
    monkeypatch.setattr(f"{kind.__module__}.retrieve_latents", lambda encoded, **_: encoded.latent_dist.mode())
    monkeypatch.setattr(f"{kind.__module__}.randn_tensor", lambda *_, **__: noise)
    settings = dict(strength=strength, num_inference_steps=5, guidance_scale=3.0, height=side, width=side, output_type="latent")
    expected = pipeline(PROMPTS, image=(pixels + 1) / 2, mask_image=mask, negative_prompt=[NEGATIVE] * 2, **settings).images

    sampling = Sampling(5, sampler, 3.0, NEGATIVE, spacing="leading")
    start = find_start(ours.schedule, strength, sampling)
    if strength < 1:  # theirs counts steps: int(0.6 x 5) of them are taken
        start = type(start)(2, 5, sampling.levels(ours.schedule)[2])
    monkeypatch.setattr("minidiff.editing.inpaint.find_start", lambda *_: start)
    actual = last(inpaint(ours, PROMPTS, pixels, mask, strength=strength, seeds=[0, 1], sampling=sampling))
    largest_error(actual / expected.std(), expected / expected.std())


# --- what it promises -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_known_part_is_as_noisy_as_each_level_and_clean_at_the_end(sd, sampler):
    sampling = Sampling(5, sampler)
    x_0, levels = encode(sd, picture()), sampling.levels(sd.schedule)
    noise = first_noise([3], x_0)
    steps = list(inpaint(sd, "a cat", picture(), left_half(), seeds=[3], sampling=sampling))
    for step, level in zip(steps, levels[1:-1]):
        assert torch.equal(step.x_t[..., 4:], add_noise(x_0, level, noise)[..., 4:])
    assert torch.equal(steps[-1].x_t[..., 4:], x_0[..., 4:])
    assert not torch.allclose(steps[-1].x_t[..., :4], x_0[..., :4], atol=0.1)


def test_what_is_put_back_is_what_the_next_prediction_sees(sd):
    seen, predict = [], sd.predict
    sd.predict = lambda x_t, t, conditioning: seen.append(x_t) or predict(x_t, t, conditioning)
    steps = list(inpaint(sd, "a cat", picture(), left_half(), sampling=Sampling(4)))
    assert all(torch.equal(x_t, step.x_t) for x_t, step in zip(seen[1:], steps))


def test_replacing_x0_hat_is_the_same_trajectory_with_ddim(sd):
    """As the README says of programs that do this."""
    sampling = Sampling(6)
    x_0, cells = encode(sd, picture()), to_cells(left_half(), 4)

    def model(x_t, t, conditioning):
        output, t = sd.predict(x_t, t, conditioning), t.repeat(2)
        x, known = x_t.repeat(2, 1, 1, 1), x_0.expand(2, -1, -1, -1)
        return cells * output + (1 - cells) * sd.schedule.target(known, t, sd.schedule.eps_from_x0(x, t, known))

    replaced = last(sampling.denoise(sd, ["a cat"], [0], x_0, model=model))
    blended = last(inpaint(sd, "a cat", picture(), left_half(), sampling=sampling))
    torch.testing.assert_close((cells * replaced), (cells * blended), rtol=1e-4, atol=1e-4)  # six steps of float32


def test_latents_that_are_sent_go_on_as_they_are():
    def loop():
        x_t = torch.zeros(1, 1, 2, 2)
        for i in range(3):
            sent = yield Step(i, 0, x_t + 1, x_t)
            x_t = sent

    cells = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    kept = keep_known(loop(), lambda i: torch.full((1, 1, 2, 2), 10.0 * (i + 1)), cells)
    first = next(kept)
    assert first.x_t.tolist() == [[[[1, 10], [1, 10]]]]
    second = kept.send(torch.full((1, 1, 2, 2), 5.0))
    assert second.x_t.tolist() == [[[[6, 20], [6, 20]]]]
    assert [step.i for step in kept] == [2]


def test_at_strength_0_nothing_is_done(sd):
    (step,) = inpaint(sd, "a cat", picture(), left_half(), strength=0, sampling=Sampling(4))
    assert torch.equal(step.x_t, encode(sd, picture()))


def test_a_model_of_9_channels_is_told_the_mask_and_the_picture_with_its_hole_in_grey():
    sd = small_model(small_config(in_channels=9))
    seen, predict = [], sd.predict
    sd.predict = lambda x_t, t, conditioning: seen.append(x_t) or predict(x_t, t, conditioning)
    steps = list(inpaint(sd, PROMPTS, picture(), left_half(), seeds=[1, 2], sampling=Sampling(2)))
    holed = picture()
    holed[..., : SIDE // 2] = 0
    assert torch.equal(seen[0][:, :4], first_noise([1, 2], torch.zeros(2, 4, 8, 8))) and torch.equal(seen[1][:, :4], steps[0].x_t)
    for x_t in seen:
        assert torch.equal(x_t[:, 4:5], to_cells(left_half(), 4).expand(2, -1, -1, -1))
        assert torch.equal(x_t[:, 5:], encode(sd, holed).expand(2, -1, -1, -1))


def test_a_mask_that_cuts_cells_is_one_of_whole_cells_to_either_model():
    ragged, whole = left_half(), left_half()
    ragged[..., SIDE // 2 - 3 :] = 0
    for channels in (4, 9):
        sd = small_model(small_config(in_channels=channels))
        ends = [last(inpaint(sd, "a cat", picture(), mask, sampling=Sampling(2))) for mask in (ragged, whole)]
        assert torch.equal(*ends)


def test_one_seed_is_one_picture_whatever_the_batch(sd):
    together = last(inpaint(sd, PROMPTS, picture(), left_half(), seeds=[1, 2], sampling=Sampling(4)))
    alone = last(inpaint(sd, PROMPTS[1], picture(), left_half(), seeds=[2], sampling=Sampling(4)))
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)  # rounding in a batch of another size


def test_what_is_attached_changes_the_hole_alone_and_leaves_no_trace(sd):
    def run():
        return last(inpaint(sd, "a cat", picture(), left_half(), sampling=Sampling(3)))

    plain = run()
    names = ("to_k", "to_v")
    deltas = {f"unet.down.0.transformers.0.blocks.0.cross_attention.{name}": torch.randn(16, 16) for name in names}
    change = from_deltas(sd, deltas)
    change.attach(sd)
    attached = run()
    change.detach()
    assert not torch.allclose(attached, plain, atol=1e-3) and torch.equal(attached[..., 4:], plain[..., 4:])
    assert torch.equal(run(), plain)


def test_a_lora_in_front_of_the_loop_is_as_good_as_its_merged_weights(sd):
    lora = random_lora(sd)
    lora.attach(sd)
    attached = last(inpaint(sd, "a cat", picture(), left_half(), sampling=Sampling(3)))
    lora.detach()
    plain = last(inpaint(sd, "a cat", picture(), left_half(), sampling=Sampling(3)))
    assert not torch.allclose(attached, plain, atol=1e-3)
    merge_lora(sd, lora)
    merged = last(inpaint(sd, "a cat", picture(), left_half(), sampling=Sampling(3)))
    torch.testing.assert_close(merged, attached, rtol=1e-3, atol=1e-3)  # float32, through three steps and guidance of 4


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "mask, said",
    [
        (torch.zeros(1, 1, SIDE, SIDE), "the mask is all black, so nothing would be repainted; paint the part to repaint white"),
        (torch.ones(1, 1, SIDE, SIDE), "the mask is all white, so nothing of the picture would be kept; leave the mask out"),
        (torch.ones(1, 1, 16, SIDE), "the mask is 32 x 16 pixels, the picture 32 x 32; give a mask of the picture's size"),
    ],
)
def test_masks_that_cannot_be_meant_are_refused_before_any_step(sd, mask, said):
    with pytest.raises(ValueError, match=said):
        inpaint(sd, "a cat", picture(), mask)


def test_the_way_back_keeps_the_originals_pixels_to_the_bit(sd):
    canvas = make_canvas(picture(), left_half(), 4)
    made = sd.decode(last(inpaint(sd, "a cat", canvas.pixels, canvas.mask, sampling=Sampling(2))))
    done = canvas.finish(made)
    assert torch.equal(done[..., SIDE // 2 + 4 :], picture()[..., SIDE // 2 + 4 :])
    assert torch.allclose(done[..., : SIDE // 2], made[..., : SIDE // 2], atol=1e-6)


def test_noise_and_hole_are_built_for_every_row(sd):
    x_0 = encode(sd, picture())
    levels = Sampling(4).levels(sd.schedule)
    known = same_noise(x_0, torch.zeros_like(x_0), levels)
    assert torch.equal(known(3), x_0) and torch.equal(known(0), levels[1].sqrt_alpha_bar * x_0)
    nine = small_model(small_config(in_channels=9))
    model = with_hole(nine, picture(), left_half())
    conditioning = nine.text(["a cat"] * 3)
    assert model(torch.randn(3, 4, 8, 8), torch.tensor([5, 5, 5]), conditioning).shape == (3, 4, 8, 8)
