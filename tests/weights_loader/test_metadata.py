import dataclasses
import json

import pytest

from minidiff.config import SD1, SD2, ModelConfig
from tests.small_models import small_config
from weights_loader.metadata import SETTINGS_KEY, config_from_json, config_to_json, settings_to_metadata


@pytest.mark.parametrize("config", [SD1, SD2, small_config()], ids=["SD 1", "SD 2", "bundled"])
def test_a_config_is_read_back_as_it_was(config):
    assert config_from_json(config_to_json(config)) == config


def test_a_field_that_is_not_there_has_its_default():
    assert config_from_json('{"unet": {"in_channels": 9}}').unet.in_channels == 9
    assert config_from_json("{}") == ModelConfig()


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"unet": {"depth": 3}}', r"minidiff.config.unet: field 'depth' unknown to this version; it knows in_channels"),
        ('{"sampler": 3}', r"minidiff.config: field 'sampler' unknown"),
        ('{"unet": {"widths": "wide"}}', r"minidiff.config.unet.widths: 'wide'; expected"),
        ('{"unet": {"widths": [32, true]}}', r"minidiff.config.unet.widths: \(32, True\); expected"),
        ('{"unet": {"in_channels": 4.5}}', r"minidiff.config.unet.in_channels: 4.5; expected int"),
        ('{"schedule": {"prediction": "x0"}}', r"minidiff.config.schedule.prediction: 'x0'; expected"),
        ('{"tokenizer": {"merges": [1]}}', r"minidiff.config.tokenizer.merges"),
        ('{"unet": 3}', r"minidiff.config.unet: 3; expected an object"),
        ("{", r"minidiff.config: no JSON"),
    ],
)
def test_a_wrong_value_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        config_from_json(text)


def test_whole_numbers_are_welcome_where_floats_are_expected():
    assert config_from_json('{"guidance_scale": 4}').guidance_scale == 4.0
    assert isinstance(config_from_json(json.dumps({"guidance_scale": 4})).guidance_scale, float)


def test_settings_are_text_that_json_reads():
    settings = {"steps": 3, "learning_rate": 1e-4, "images": ["größe.png"], "prior": None}
    metadata = settings_to_metadata(settings)
    assert json.loads(metadata[SETTINGS_KEY]) == settings and "größe" in metadata[SETTINGS_KEY]
    assert settings_to_metadata({}) == {}


def test_settings_that_json_has_no_place_for_are_an_error():
    with pytest.raises(ValueError, match="settings: .*ModelConfig is not JSON serializable; give text, numbers, lists and dicts"):
        settings_to_metadata({"config": ModelConfig()})


def test_what_the_first_families_do_not_need_is_written_as_before_it_came():
    written = json.loads(config_to_json(SD1))["unet"]
    assert written["attention"] == [True, True, True, False] and "pooled_width" not in written
    deep = dataclasses.replace(SD1, unet=dataclasses.replace(SD1.unet, attention=(0, 2, 10, 10), pooled_width=1280))
    assert json.loads(config_to_json(deep))["unet"]["attention"] == [0, 2, 10, 10] and config_from_json(config_to_json(deep)) == deep
