"""What a person says to a method: the numbers of each model, and what contradicts itself."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from minidiff.bundled.tasks import bundled_config
from minidiff.config import SD1, SD2
from minidiff.trainers.methods.options import (
    BUNDLED,
    STABLE_DIFFUSION,
    Concept,
    DreamBoothOptions,
    LowRankOptions,
    Prior,
    Samples,
    family_of,
    preset,
)

SETTINGS = preset("dreambooth", "sd1").settings


def test_importing_the_presets_does_not_import_torch():
    code = "import sys, minidiff.trainers.methods.options; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_method_has_numbers_for_every_family():
    assert [family_of(config) for config in (SD1, SD2, bundled_config())] == ["sd1", "sd2", "bundled"]
    assert list(BUNDLED) == list(STABLE_DIFFUSION)
    for method in BUNDLED:
        assert type(preset(method, "sd1")) is type(preset(method, "bundled"))


def test_the_published_rates_are_kept():
    assert preset("dreambooth", "sd1").settings.learning_rate == 5e-6
    assert preset("dreambooth-lora", "sd2").settings.learning_rate == 5e-4
    assert preset("textual-inversion", "sd1").settings.learning_rate == 5e-3
    custom = preset("custom-diffusion", "sd1")
    assert (custom.settings.learning_rate, custom.settings.batch, custom.settings.steps, custom.prior.least) == (8e-5, 8, 250, 0.85)


def test_unknown_methods_and_families_are_named():
    with pytest.raises(ValueError, match="method 'lorra' unknown; choose lora, dreambooth"):
        preset("lorra", "sd1")
    with pytest.raises(ValueError, match="family 'sdxl' unknown; choose sd1, sd2, bundled"):
        preset("lora", "sdxl")


def test_a_learning_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="learning_rate 0"):
        dataclasses.replace(preset("lora", "sd1").settings, learning_rate=0)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (Samples, {"caption_dropout": 1.5}, "caption_dropout 1.5 is outside 0..1"),
        (Samples, {"offset_noise": -1}, "offset_noise -1"),
        (Samples, {"min_snr": 0}, "min_snr 0: gamma must be above 0"),
        (Prior, {"weight": 0}, "prior weight 0: it must be above 0"),
        (Prior, {"count": 0}, "prior count 0"),
        (DreamBoothOptions, {"settings": SETTINGS, "low_rank": LowRankOptions(), "text_encoder": True}, "say it in low_rank"),
        (Concept, {"images": Path("x"), "captions": True, "prompt": "a cat"}, "give one of the two"),
        (Concept, {"images": Path("x"), "token": "<cat> "}, "has spaces around it"),
    ],
)
def test_values_that_cannot_be_are_refused(cls, values, message):
    with pytest.raises(ValueError, match=message):
        cls(**values)


def test_an_unknown_kind_of_prior_is_refused_with_the_choices():
    prior = Prior()
    object.__setattr__(prior, "kind", "real")  # where annotations are not checked, as they are in these tests
    with pytest.raises(ValueError, match="prior 'real' unknown; choose none, folder"):
        prior.__post_init__()
