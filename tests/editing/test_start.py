"""Where an edit starts: the level for a strength, the same noise for every sampler, the posterior's mean, the seed's own noise."""

import pytest
import torch

from minidiff.config import ScheduleConfig
from minidiff.editing.start import Sampling, add_noise, encode, encode_rows, find_start, first_noise
from minidiff.pipeline import noise_source
from minidiff.samplers import SAMPLERS, Level
from minidiff.schedule import SPACINGS, NoiseSchedule
from tests.editing.small import picture
from tests.small_models import small_config, small_model

SCHEDULE = NoiseSchedule(ScheduleConfig())


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("strength", [0.01, 0.3, 0.6, 0.95])
def test_a_strength_is_the_same_noise_for_every_sampler(sampler, spacing, strength):
    """As near as the levels allow: half the way to the next one."""
    sampling = Sampling(50, sampler, spacing=spacing)
    start, levels = find_start(SCHEDULE, strength, sampling), sampling.levels(SCHEDULE)
    distances = [abs(level.t - 999 * strength) for level in levels[:-1]]
    assert distances[start.index] == min(distances) and start.level == levels[start.index]
    if SAMPLERS[sampler].own_spacing is None:
        assert abs(start.level.t - 999 * strength) <= 21  # of levels 20 apart, the last of them 21 above 0 or so


def test_more_strength_is_never_less_noise():
    for sampler in SAMPLERS:
        starts = [find_start(SCHEDULE, i / 40, Sampling(25, sampler)).index for i in range(41)]
        assert starts == sorted(starts, reverse=True)
        assert (starts[0], starts[-1]) == (25, 0)
        assert find_start(SCHEDULE, 1e-6, Sampling(25, sampler)).index == 24  # however little is asked for, a step is taken


def test_the_start_is_told():
    assert str(find_start(SCHEDULE, 0.6, Sampling(30, spacing="trailing"))) == "begins at t = 599: 18 of 30 steps"


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), 75])
def test_a_strength_outside_0_to_1_is_refused(strength):
    with pytest.raises(ValueError, match=f"strength {strength} is outside 0..1; 0 leaves the picture as it is, 1 replaces it"):
        find_start(SCHEDULE, strength, Sampling())


@pytest.mark.parametrize(
    "sampling, said",
    [
        (Sampling(sampler="ddmp"), "sampler 'ddmp' unknown; choose"),
        (Sampling(0), "steps 0 is outside"),
        (Sampling(spacing="even"), "spacing 'even' unknown"),
    ],
)
def test_levels_that_there_are_not_are_refused(sampling, said):
    with pytest.raises(ValueError, match=said):
        find_start(SCHEDULE, 0.5, sampling)


def test_noise_is_added_as_q_sample_does_at_the_models_own_timesteps():
    x_0, eps = picture(), picture(1)
    expected = SCHEDULE.q_sample(x_0, torch.tensor([600]), eps)
    torch.testing.assert_close(add_noise(x_0, Level(600, SCHEDULE.alpha_bar[600].item()), eps), expected)


def test_a_picture_is_encoded_to_its_posteriors_mean_scaled():
    sd = small_model()
    with torch.no_grad():
        expected = sd.vae.encode(picture()).mean * sd.config.vae.scaling_factor
    assert torch.equal(encode(sd, picture()), expected)
    assert torch.equal(encode_rows(sd, picture(), 3), expected.expand(3, -1, -1, -1))


def test_pictures_that_do_not_pair_up_and_odd_sizes_are_refused():
    sd = small_model()
    with pytest.raises(ValueError, match="2 pictures for 3 prompts and seeds; give one picture for all, or one for each"):
        encode_rows(sd, picture().expand(2, -1, -1, -1), 3)
    with pytest.raises(ValueError, match="picture of 30 x 32 pixels: the VAE needs multiples of 4"):
        encode(sd, picture(width=30))


def test_an_encoder_that_overflows_is_told():
    sd = small_model(small_config())
    sd.vae.half()
    sd.vae.encoder.conv_in.weight.data.mul_(1e6)
    with pytest.raises(ValueError, match="the encoder overflowed in torch.float16; load the model in float32 or bfloat16"):
        encode(sd, picture())


def test_the_noise_is_the_first_that_text_to_image_draws():
    x_0 = torch.zeros(2, 4, 8, 8)
    assert torch.equal(first_noise([3, 4], x_0), noise_source([3, 4], (4, 8, 8), torch.device("cpu"))())
