"""What a person says to a method: the numbers of each model, and what contradicts itself."""

import dataclasses
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest

from minidiff.bundled.tasks import bundled_config
from minidiff.cli.merge import extract
from minidiff.config import SD1, SD2
from minidiff.trainers.methods.custom_diffusion import PRESETS as CUSTOM_DIFFUSION
from minidiff.trainers.methods.dreambooth import DreamBoothOptions
from minidiff.trainers.methods.method import MethodOptions
from minidiff.trainers.methods.options import Concept, DataOptions, LowRankOptions, Prior, family_of
from minidiff.trainers.methods.override import override
from minidiff.trainers.methods.table import METHODS, preset
from weights_loader import write_lora

SETTINGS = preset("dreambooth", "sd1").settings


def test_importing_the_presets_does_not_import_torch():
    code = "import sys, minidiff.trainers.methods.table; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_method_has_numbers_for_every_family():
    assert [family_of(config) for config in (SD1, SD2, bundled_config())] == ["sd1", "sd2", "bundled"]
    for method in [*METHODS, "dreambooth-lora"]:
        assert type(preset(method, "sd1")) is type(preset(method, "sd2")) is type(preset(method, "bundled"))
        assert isinstance(preset(method, "bundled"), MethodOptions)


def test_the_published_rates_are_kept():
    assert preset("dreambooth", "sd1").settings.learning_rate == 5e-6
    assert preset("dreambooth-lora", "sd2").settings.learning_rate == 5e-4
    assert preset("textual-inversion", "sd1").settings.learning_rate == 5e-3
    custom = CUSTOM_DIFFUSION["sd1"]
    assert (custom.settings.learning_rate, custom.settings.batch, custom.settings.steps, custom.prior.min_similarity) == (
        8e-5,
        8,
        250,
        0.85,
    )


def test_unknown_methods_and_families_are_named():
    with pytest.raises(ValueError, match="method 'lorra' unknown; choose lora, dreambooth"):
        preset("lorra", "sd1")
    with pytest.raises(ValueError, match="family 'sd3' unknown; choose sd1, sd2, sdxl, bundled"):
        preset("lora", "sd3")


def test_a_learning_rate_of_nothing_is_refused():
    with pytest.raises(ValueError, match="learning_rate 0"):
        dataclasses.replace(preset("lora", "sd1").settings, learning_rate=0)


@pytest.mark.parametrize(
    ("cls", "values", "message"),
    [
        (DataOptions, {"caption_dropout": 1.5}, "caption_dropout 1.5 is outside 0..1"),
        (DataOptions, {"offset_noise": -1}, "offset_noise -1"),
        (DataOptions, {"size": 0}, "size 0: expected pixels, at least 1"),
        (DataOptions, {"buckets": -64}, "buckets -64: expected pixels"),
        (DataOptions, {"min_snr": 0}, "min_snr 0: gamma must be above 0"),
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


def test_a_flat_name_is_set_wherever_options_have_it_and_innermost_first():
    pivotal = override(preset("pivotal-tuning", "sd1"), {"steps": 7, "token_steps": 5, "seed": 3, "schedule": "cosine", "prior": "folder"})
    tokens, lora = pivotal.phases()
    assert (tokens.settings.steps, lora.settings.steps, tokens.settings.seed, lora.settings.seed) == (5, 7, 3, 3)
    assert (tokens.settings.schedule, lora.settings.schedule) == ("constant", "cosine")
    assert lora.prior.kind == pivotal.lora.prior.kind == "folder" and lora.prior.steps == Prior().steps
    plain, low = (override(preset(name, "sd1"), {"text_encoder": True, "rank": 9}) for name in ("dreambooth", "dreambooth-lora"))
    assert plain.text_encoder and plain.low_rank is None
    assert not low.text_encoder and low.low_rank == LowRankOptions(rank=9, text_encoder=True)
    inversion = preset("textual-inversion", "sd1")
    assert override(inversion, {"prior": "none"}) == inversion
    with pytest.raises(ValueError, match="learning_rate 0"):
        override(inversion, {"learning_rate": 0})


def test_loras_have_the_names_that_the_web_interfaces_read_unless_others_are_asked_for():
    named = {name: method.formats for name, method in METHODS.items() if "diffusers" in method.formats and "kohya" in method.formats}
    assert {"lora", "dreambooth", "pivotal-tuning"} == named.keys() and {next(iter(formats)) for formats in named.values()} == {"kohya"}
    assert {signature(function).parameters["names"].default for function in (write_lora, extract)} == {"kohya"}
