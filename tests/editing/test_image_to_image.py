"""Image to image: against diffusers' pipeline on the same weights; its two ends; batches, samplers, adapters and tiles."""

import diffusers
import pytest
import torch

import minidiff.tiled_decode
from minidiff.editing.image_to_image import image_to_image
from minidiff.editing.start import Sampling, add_noise, encode, find_start, first_noise
from minidiff.samplers import SAMPLERS
from tests.editing.small import last, picture
from tests.parity.check import largest_error
from tests.parity.models import SD1, SD2, pipelines
from tests.parity.schedulers import build_theirs
from tests.small_models import small_config, small_model

PROMPTS, NEGATIVE = ["a red apple", "a cat"], "blurry"


@pytest.fixture
def sd():
    return small_model()


# --- parity -----------------------------------------------------------------------------------------------------------

# Not plms: diffusers' pipeline starts in the middle of its doubled second step. Not ddpm and euler_ancestral, which draw noise on their own.
SAME = ("ddim", "euler", "heun", "dpmpp_2m")


@pytest.mark.filterwarnings("ignore")  # of diffusers, on repeated pictures and the like
@pytest.mark.parametrize("shape", [SD1, SD2], ids=str)
@pytest.mark.parametrize("sampler", SAME)
def test_latents_equal_those_of_diffusers_from_the_same_level_and_noise(sampler, shape, monkeypatch):
    ours, theirs = pipelines(shape, torch.float32)
    pipeline = diffusers.StableDiffusionImg2ImgPipeline(**theirs.components, requires_safety_checker=False)
    pipeline.scheduler = build_theirs(sampler, ours.schedule, "leading")
    pipeline.set_progress_bar_config(disable=True)
    pixels = torch.cat([picture(i, 8 * 16, 8 * 16) for i in range(2)])
    x_0 = encode(ours, pixels)
    noise = first_noise([0, 1], x_0)
    monkeypatch.setattr(f"{diffusers.StableDiffusionImg2ImgPipeline.__module__}.randn_tensor", lambda *_, **__: noise)
    settings = dict(strength=0.6, num_inference_steps=5, guidance_scale=3.0)
    expected = pipeline(PROMPTS, image=x_0, negative_prompt=[NEGATIVE] * 2, output_type="latent", **settings).images

    sampling = Sampling(5, sampler, 3.0, NEGATIVE, spacing="leading")
    monkeypatch.setattr("minidiff.editing.image_to_image.find_start", lambda *_: their_start(ours, sampling))
    actual = last(image_to_image(ours, PROMPTS, pixels, strength=0.6, seeds=[0, 1], sampling=sampling))
    largest_error(actual / expected.std(), expected / expected.std())


def their_start(sd, sampling):
    """Theirs counts steps: int(0.6 x 5) of them are taken."""
    start = find_start(sd.schedule, 0.6, sampling)
    return type(start)(2, 5, sampling.levels(sd.schedule)[2])


# --- what it promises -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_at_strength_1_it_is_text_to_image_on_the_same_seed(sd, sampler):
    settings = dict(steps=4, sampler=sampler)
    expected = last(sd.denoise(PROMPTS, seeds=[5, 6], **settings))
    actual = last(image_to_image(sd, PROMPTS, picture(), strength=1, seeds=[5, 6], sampling=Sampling(**settings)))
    assert torch.equal(actual, expected)


def test_at_strength_0_it_is_the_encoded_picture_without_a_model_call(sd, monkeypatch):
    monkeypatch.setattr(sd, "predict", lambda *_: pytest.fail("the model was called"))
    (step,) = image_to_image(sd, PROMPTS, picture(), strength=0, sampling=Sampling(4))
    assert torch.equal(step.x_t, encode(sd, picture()).expand(2, -1, -1, -1))
    assert torch.equal(step.x0_hat, step.x_t) and step.i == 4


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_loop_starts_from_the_picture_with_the_seeds_noise(sd, sampler):
    """The first prediction is about exactly that latent; fresh noise of later steps is other noise."""
    seen = []
    predict = sd.predict
    sd.predict = lambda x_t, t, conditioning: seen.append(x_t) or predict(x_t, t, conditioning)
    sampling = Sampling(6, sampler)
    steps = list(image_to_image(sd, "a cat", picture(), strength=0.5, seeds=[7], sampling=sampling))
    start = find_start(sd.schedule, 0.5, sampling)
    assert [step.i for step in steps] == list(range(start.index, 6)) and 0 < start.index < 5
    x_0 = encode(sd, picture())
    assert torch.equal(seen[0], add_noise(x_0, start.level, first_noise([7], x_0)))


def test_less_strength_stays_nearer_to_the_picture(sd):
    x_0 = encode(sd, picture())
    ends = [last(image_to_image(sd, "a cat", picture(), strength=s, sampling=Sampling(10))) for s in (0.1, 0.4, 0.8)]
    distances = [(end - x_0).square().mean().item() for end in ends]
    assert distances == sorted(distances) and distances[0] < distances[-1] / 2


def test_one_seed_is_one_picture_whatever_the_batch(sd):
    both = torch.cat([picture(0), picture(1)])
    together = last(image_to_image(sd, PROMPTS, both, seeds=[1, 2], sampling=Sampling(4)))
    alone = last(image_to_image(sd, PROMPTS[1], both[1:], seeds=[2], sampling=Sampling(4)))
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-4)  # rounding in a batch of another size


def test_a_latent_can_be_sent_on_the_way(sd):
    loop = image_to_image(sd, "a cat", picture(), sampling=Sampling(10))
    step = next(loop)
    sent = loop.send(torch.zeros_like(step.x_t))
    usual = list(image_to_image(sd, "a cat", picture(), sampling=Sampling(10)))
    assert not torch.allclose(sent.x_t, usual[1].x_t)


def test_sizes_that_are_no_squares_keep_their_shape(sd):
    assert last(image_to_image(sd, "a cat", picture(0, 24, 40), sampling=Sampling(2))).shape == (1, 4, 6, 10)


def test_an_inpainting_model_without_a_mask_is_refused():
    with pytest.raises(ValueError, match="9 input channels, not 4: an inpainting model, which needs a picture and a mask"):
        image_to_image(small_model(small_config(in_channels=9)), "a cat", picture())


def test_a_big_picture_is_decoded_in_tiles_to_the_same_pixels(sd, monkeypatch):
    x_t = last(image_to_image(sd, "a cat", picture(0, 64, 96), sampling=Sampling(2)))
    whole = sd.decode(x_t, tiled=False)
    monkeypatch.setattr(minidiff.tiled_decode, "VALUES_WORTH_IT", {"cpu": 1})
    torch.testing.assert_close(sd.decode(x_t), whole, rtol=0, atol=1e-5)  # the order of the sums in a few GroupNorms
