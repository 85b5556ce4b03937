"""Training from nothing: it learns, a seed gives the very same weights, taken up again or not, and nothing held out enters."""

import dataclasses
import functools
import math
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from minidiff.bundled import tasks
from minidiff.bundled.recipe import Recipe
from minidiff.bundled.tasks import (
    AutoencoderTask,
    DiffusionTask,
    Latents,
    Scenes,
    bundled_config,
    encode_scenes,
    initialise,
    make_scenes,
    reconstruction_loss,
    resize,
    sample_timesteps,
)
from minidiff.pictures import to_pixels
from minidiff.scenes.art import subject_names
from minidiff.scenes.scenes import is_held_out_pair
from minidiff.schedule import NoiseSchedule
from minidiff.tokenizer import Tokenizer
from minidiff.trainers.engine.loop import Training, randn_per_sample, rng_for
from minidiff.unet import UNet
from minidiff.vae import VAE
from tests.small_models import small_model, training_config

CPU = torch.device("cpu")
CONFIG = training_config()
RECIPE = Recipe(seed=3, vae_steps=4, vae_batch=2, scenes=8, steps=4, batch=4, learning_rate=2e-3, vae_learning_rate=4e-3)


def latents_of(count=8, mask=None, seed=0):
    """Scenes of one colour each."""
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(count, 4, 1, 1, generator=generator).expand(-1, -1, 16, 16) / CONFIG.vae.scaling_factor
    mask = torch.rand(count, 1, 16, 16, generator=generator) if mask is None else torch.full((count, 1, 16, 16), mask)
    return Latents(mean, Tokenizer(CONFIG.tokenizer)([f"a {name}" for name in subject_names(held_out=False)[:count]]), mask)


def images_of(count=8, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, 128, 128, 3), dtype=np.uint8)


def noise_scenes():
    latents = latents_of()
    return Scenes(images_of(), latents.tokens, latents.mask)


def make_training(stage, recipe=RECIPE):
    if stage == "autoencoder":
        return Training(AutoencoderTask(CONFIG, recipe, scenes(), CPU), recipe.autoencoder(), CPU)
    return Training(DiffusionTask(CONFIG, recipe, latents_of(), CPU), recipe.diffusion(), CPU)


@functools.cache
def scenes():
    return next(make_scenes(RECIPE, CONFIG))


def weights(training):
    return torch.cat([p.detach().flatten() for p in training.weights.values()])


STAGES = pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])


@STAGES
def test_a_few_dozen_steps_reduce_the_loss(stage):
    recipe = dataclasses.replace(RECIPE, vae_steps=30, vae_batch=4, vae_learning_rate=2e-2, steps=30, batch=8, learning_rate=2e-2)
    losses = [step.loss.item() for step in make_training(stage, recipe).run()]
    assert len(losses) == 30
    assert np.mean(losses[-8:]) < 0.8 * np.mean(losses[:8])


@STAGES
def test_every_step_sees_other_data(stage):
    recipe = dataclasses.replace(RECIPE, learning_rate=1e-30, vae_learning_rate=1e-30)
    losses = [step.loss.item() for step in make_training(stage, recipe).run()]
    assert len(set(losses)) == 4  # of the same weights


@STAGES
def test_a_seed_gives_the_very_same_weights_whatever_the_global_generators_hold(stage):
    ends = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        np.random.seed(seed)
        training = make_training(stage)
        list(training.run())
        ends.append(weights(training))
    assert torch.equal(*ends)
    other = make_training(stage, dataclasses.replace(RECIPE, seed=4))
    list(other.run())
    assert not torch.equal(ends[0], weights(other))


@STAGES
def test_a_batch_in_parts_has_the_same_loss(stage):
    training = make_training(stage)
    with torch.no_grad():
        whole = training.task.loss(1, range(4))
        halves = [training.task.loss(1, part) for part in (range(2), range(2, 4))]
    torch.testing.assert_close(sum(halves) / 2, whole, rtol=1e-5, atol=0)  # float32 rounding


@STAGES
def test_the_global_generators_are_left_as_they_were(stage):
    torch.manual_seed(7)
    before, before_numpy = torch.get_rng_state(), np.random.get_state()[1].copy()
    next(make_training(stage).run())
    assert torch.equal(torch.get_rng_state(), before)
    assert np.array_equal(np.random.get_state()[1], before_numpy)


@pytest.mark.parametrize(("step", "side"), [(0, 16), (1, 8), (2, 16), (3, 12), (4, 16), (5, 8)])
def test_in_every_second_step_smaller_latents_are_decoded_to_the_smaller_picture(monkeypatch, step, side):
    task = AutoencoderTask(CONFIG, dataclasses.replace(RECIPE, kl_weight=0.5), noise_scenes(), CPU)
    asked = []
    decode = task.vae.decode
    monkeypatch.setattr(task.vae, "decode", lambda z: asked.append(z) or decode(z))
    loss = task.loss(step, range(2, 4))
    # the same, by hand
    rngs = [rng_for(RECIPE.seed, step, sample) for sample in (2, 3)]
    chosen = [int(rng.integers(8)) for rng in rngs]
    pixels, weight = to_pixels(images_of()[chosen]), 0.4 + 1.6 * latents_of().mask[chosen]
    posterior = task.vae.encode(pixels)
    z = posterior.mean + posterior.logvar.exp().sqrt() * randn_per_sample(rngs, (4, 16, 16))
    z, target = (z, pixels) if side == 16 else (resize(z, side), resize(pixels, 8 * side))
    assert target.shape[-1] == 8 * side
    weight = F.interpolate(weight, size=(8 * side, 8 * side))
    torch.testing.assert_close(asked[0], z, rtol=1e-4, atol=1e-5)  # float32
    kl = posterior.kl().sum() / posterior.mean.numel()
    torch.testing.assert_close(loss, reconstruction_loss(decode(z), target, weight) + 0.5 * kl, rtol=1e-4, atol=1e-5)


def test_resizing_is_pillows_bicubic():
    image = Image.fromarray(images_of(1)[0][..., 0])
    expected = np.asarray(image.convert("F").resize((48, 48), Image.Resampling.BICUBIC))
    mine = resize(torch.from_numpy(np.asarray(image, np.float32).copy())[None, None], 48)[0, 0]
    np.testing.assert_allclose(mine.numpy(), expected, rtol=0, atol=1e-2)  # of 255; float32 and Pillow's own order of sums


def test_nothing_held_out_enters_and_every_caption_fits(monkeypatch):
    scenes, splits = [], []

    def spy(rng, *, split="train"):
        splits.append(split)
        scenes.append(from_scratch_sample_scene(rng, split=split))
        return scenes[-1]

    from_scratch_sample_scene = tasks.sample_scene
    monkeypatch.setattr(tasks, "sample_scene", spy)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a caption that is cut is a warning
        list(make_scenes(dataclasses.replace(RECIPE, scenes=300), CONFIG))
    assert len(scenes) == 300
    assert set(splits) == {"train"}
    held_out = set(subject_names(held_out=True))
    for scene in scenes:
        names = [item.subject for item in scene.objects]
        assert not held_out.intersection(names)
        assert len(names) == 1 or not is_held_out_pair(*names)
        assert not any(item.colour and is_held_out_pair(item.subject, item.colour) for item in scene.objects)


def spied_loss(latents, recipe, config=CONFIG):
    """One loss with a U-Net that answers 0, and what text encoder and U-Net were given."""
    task = DiffusionTask(config, recipe, latents, CPU)
    given = {}

    def text_encoder(tokens):
        given["tokens"] = tokens
        return torch.zeros(*tokens.shape, 16)

    def unet(x_t, t, context):
        given.update(x_t=x_t, t=t)
        return torch.zeros_like(x_t)

    task.text_encoder, task.unet = text_encoder, unet
    return task.loss(0, range(recipe.batch)), given


@pytest.mark.parametrize("rate", [0.0, 0.1, 1.0])
def test_captions_are_dropped_at_the_rate_of_the_recipe(rate):
    latents = latents_of()
    recipe = dataclasses.replace(RECIPE, batch=4000, caption_dropout=rate)
    tokens = spied_loss(Latents(latents.mean[:, :, :1, :1], latents.tokens, latents.mask[:, :, :1, :1]), recipe)[1]["tokens"]
    empty = (tokens == Tokenizer(CONFIG.tokenizer)([""])).all(dim=1)
    assert abs(empty.float().mean().item() - rate) <= 4 * math.sqrt(rate * (1 - rate) / 4000)  # four standard deviations
    left = {tuple(row) for row in tokens[~empty].tolist()}
    assert left <= {tuple(row) for row in latents.tokens.tolist()}  # the others are whole captions


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_loss_is_the_weighted_error_of_eps_or_v(prediction):
    """With one scene x_0 is known, so that eps can be worked out from the x_t that the U-Net is given."""
    schedule = dataclasses.replace(CONFIG.schedule, prediction=prediction, zero_terminal_snr=False)
    latents, config = latents_of(1), dataclasses.replace(CONFIG, schedule=schedule)
    loss, given = spied_loss(latents, RECIPE, config=config)
    alpha_bar = NoiseSchedule(schedule).alpha_bar[given["t"]].reshape(-1, 1, 1, 1)
    x_0 = latents.mean.double() * CONFIG.vae.scaling_factor
    eps = (given["x_t"].double() - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt()
    target = eps if prediction == "eps" else alpha_bar.sqrt() * eps - (1 - alpha_bar).sqrt() * x_0
    expected = ((0.4 + 1.6 * latents.mask) * target**2).mean().item()
    assert loss.item() == pytest.approx(expected, rel=1e-4)  # fp32, and eps divided by the noise's share again


def test_min_snr_weighs_each_sample_by_its_timestep():
    """The U-Net of spied_loss answers 0, so that the errors are v squared."""
    schedule = NoiseSchedule(CONFIG.schedule)
    recipe, latents = dataclasses.replace(RECIPE, batch=1), latents_of(1, mask=0.0)
    plain, given = spied_loss(latents, recipe)
    weighed, _ = spied_loss(latents, dataclasses.replace(recipe, min_snr=5.0))
    snr = schedule.snr(given["t"]).item()
    assert weighed.item() == pytest.approx(plain.item() * min(snr, 5.0) / (snr + 1), rel=1e-5)  # fp32


def test_a_cell_full_of_object_counts_five_times_an_empty_one():
    empty, full = (spied_loss(latents_of(mask=mask), RECIPE)[0].item() for mask in (0.0, 1.0))
    assert full / empty == pytest.approx((0.4 + 1.6) / 0.4, rel=1e-5)  # fp32


def test_timesteps_are_four_fifths_late_and_one_fifth_uniform():
    count = 20_000
    t = sample_timesteps([np.random.default_rng(0)] * count, 1000)
    assert t.dtype == torch.int64 and t.min() >= 0 and t.max() <= 999
    for share in (0.05, 0.2, 0.5, 0.62, 0.8, 0.95):
        normal = 0.5 * (1 + math.erf((math.log(share / (1 - share)) - 0.5) / math.sqrt(2)))  # P(sigmoid(N(0.5, 1)) < share)
        expected = 0.8 * normal + 0.2 * share
        assert abs((t < 1000 * share).float().mean().item() - expected) < 4 * 0.5 / math.sqrt(count)  # four standard deviations


def test_scenes_come_with_their_captions_and_shares_and_latents_are_their_means(monkeypatch):
    made = []
    sample_scene = tasks.sample_scene
    monkeypatch.setattr(tasks, "sample_scene", lambda rng: made.append(sample_scene(rng)) or made[-1])
    parts = list(make_scenes(RECIPE, CONFIG, chunk=3))
    assert [len(part.images) for part in parts] == [3, 3, 2]
    images = np.concatenate([part.images for part in parts])
    assert np.array_equal(images, np.stack([scene.image for scene in made]))
    tokens, mask = (torch.cat([getattr(part, name) for part in parts]) for name in ("tokens", "mask"))
    assert torch.equal(tokens, Tokenizer(CONFIG.tokenizer)([scene.caption for scene in made]))
    cell = made[0].mask[8 * 8 : 8 * 9, 8 * 7 : 8 * 8].mean()
    assert mask[0, 0, 8, 7].item() == pytest.approx(cell, rel=1e-5)  # float32

    vae = VAE(CONFIG.vae)
    latents = Latents(torch.cat(list(encode_scenes(images, vae, CPU, chunk=3))), tokens, mask)
    with torch.no_grad():
        expected = vae.encode(to_pixels(images)).mean
    torch.testing.assert_close(latents.mean, expected, rtol=1e-4, atol=1e-5)  # float32, another batch size
    assert not latents.mean.requires_grad
    assert latents.scaling_factor() == pytest.approx(1 / latents.mean.numpy().astype(np.float64).std(ddof=1), rel=1e-9)


def test_pixels_run_from_minus_one_to_one():
    images = np.zeros((1, 2, 3, 3), np.uint8)
    images[0, 1, 2] = 0, 51, 255
    pixels = to_pixels(images)
    assert pixels.shape == (1, 3, 2, 3)
    assert pixels[0, :, 0, 0].tolist() == [-1, -1, -1]
    assert pixels[0, :, 1, 2].tolist() == pytest.approx([-1, -0.6, 1], abs=1e-6)  # fp32


def test_reconstruction_loss_is_the_sum_of_its_three_errors():
    even = torch.ones(1, 1, 4, 4)
    assert reconstruction_loss(torch.full((1, 3, 4, 4), 0.5), torch.zeros(1, 3, 4, 4), even).item() == 0.5 + 2 * 0.25  # no edge is wrong
    ramp = torch.arange(4.0).expand(1, 3, 4, 4)  # rises by 1 a column
    expected = 1.5 + 2 * (0 + 1 + 4 + 9) / 4 + 1
    assert reconstruction_loss(ramp, torch.zeros_like(ramp), even).item() == expected
    assert reconstruction_loss(ramp.mT.contiguous(), torch.zeros_like(ramp), even).item() == expected
    half = (torch.arange(4.0) < 2).float().expand(1, 1, 4, 4)  # the weight of the last two columns is 0
    assert reconstruction_loss(ramp, torch.zeros_like(ramp), half).item() == pytest.approx((0 + 1) / 4 + 2 * (0 + 1) / 4 + 1 / 3)


def test_embeddings_start_large_and_residual_branches_near_zero():
    encoder = initialise(small_model(CONFIG).text_encoder)
    # standard error of the standard deviation: 0.5 / sqrt(2 n), n at least 512
    assert encoder.token_embedding.weight.std().item() == pytest.approx(0.5, rel=0.03)
    assert encoder.position_embedding.weight.std().item() == pytest.approx(0.1, rel=0.12)
    unet = initialise(UNet(CONFIG.unet))
    block = unet.middle.block_1
    x = torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    assert (block(x, torch.zeros(2, 64)) - x).abs().max() < 0.1  # a sum of 144 terms of 1e-3
    assert unet.time_embedding.linear_2.weight.std() > 0.03  # not a residual branch


def test_training_on_starts_from_the_weights_given():
    init = small_model(CONFIG)
    task = DiffusionTask(CONFIG, RECIPE, latents_of(), CPU, init)
    for mine, given in ((task.unet, init.unet), (task.text_encoder, init.text_encoder)):
        for name, p in given.state_dict().items():
            assert torch.equal(mine.state_dict()[name], p) and mine.state_dict()[name].data_ptr() != p.data_ptr()


def test_the_bundled_model_has_the_shape_of_stable_diffusion_in_small():
    config = bundled_config()
    assert config.vae.factor * 16 == config.image_size
    assert config.unet.context_width == config.text_encoder.width
    assert config.text_encoder.vocab_size == Tokenizer(config.tokenizer).vocab_size
    assert config.text_encoder.context_length == config.tokenizer.context_length
