"""Whatever somebody has put into a file, the message that quotes it is a line to be read."""

import json

import pytest
import torch

import weights_loader
from tests.checkpoints import family_configs, family_model, ldm_tensors
from weights_loader.adapters.peft import METADATA
from weights_loader.brief import MOST, brief
from weights_loader.folder import folder_config, write_folder_config
from weights_loader.metadata import KEY, config_to_json
from weights_loader.prediction import apply_statements
from weights_loader.stated import statements
from weights_loader.write import write_safetensors

LONG = "x" * 100_000


def test_a_short_value_is_its_repr_and_a_long_one_is_cut():
    for value in (None, 3, -0.5, "a 'quoted' word", "é", [1, 2], {"a": (1, 2)}, "x" * (MOST - 2)):
        assert brief(value) == repr(value)
    for value in (LONG, [LONG] * 100, {LONG: LONG}, 10**1000):
        assert "..." in brief(value) and len(brief(value)) < 10 * MOST
    assert brief(LONG).startswith("'xxx") and len(brief(LONG)) == MOST


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer/merges.txt", lambda text: text.replace("\n", f"\n{LONG} y\n", 1)),
        ("tokenizer/vocab.json", lambda text: json.dumps(dict.fromkeys(json.loads(text), LONG[:5000]))),
        ("tokenizer/added_tokens.json", lambda text: json.dumps({LONG: 9999})),
        ("text_encoder/config.json", lambda text: json.dumps(json.loads(text) | {"hidden_act": LONG})),
        ("scheduler/scheduler_config.json", lambda text: json.dumps(json.loads(text) | {"prediction_type": LONG})),
        ("scheduler/scheduler_config.json", lambda text: json.dumps(json.loads(text) | {"timestep_spacing": LONG})),
        ("scheduler/scheduler_config.json", lambda text: json.dumps(json.loads(text) | {"_class_name": LONG})),
        ("model_index.json", lambda text: json.dumps(json.loads(text) | {"_class_name": LONG})),
    ],
)
def test_of_a_folder(file, change, tmp_path):
    config = family_configs()["SD 1"]
    sd = family_model("SD 1")
    write_folder_config(tmp_path, config, sd.text.tokenizers)
    path = tmp_path / file
    path.write_text(change(path.read_text() if path.exists() else "{}"))
    with pytest.raises(ValueError) as error:
        weights_loader.load(tmp_path) if file == "model_index.json" else folder_config(tmp_path)
    assert "xxx" in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("metadata", "extra"),
    [
        ({KEY: json.dumps([LONG])}, {}),
        ({KEY: json.dumps({LONG: 1})}, {}),
        ({KEY: "unet"}, {}),
        ({}, {LONG: torch.zeros(1)}),
    ],
    ids=["a config of another type", "an unknown field", "a wrong value", "a tensor"],
)
def test_of_a_model(metadata, extra, tmp_path):
    sd = family_model("SD 1")
    values = json.loads(config_to_json(sd.config))
    values["unet"]["groups"] = LONG
    stated = {key: json.dumps(values) if text == "unet" else text for key, text in metadata.items()}
    write_safetensors(tmp_path / "x.safetensors", ldm_tensors(sd) | extra, stated)
    with pytest.raises(ValueError) as error:
        weights_loader.load(tmp_path / "x.safetensors", config=None if KEY in stated or not stated else sd.config)
    assert "xxx" in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    ("metadata", "yaml"), [({"modelspec.prediction_type": LONG}, ""), ({}, f"parameterization: {LONG}\n")], ids=["metadata", "a .yaml"]
)
def test_of_a_prediction(metadata, yaml):
    with pytest.raises(ValueError) as error:
        apply_statements(family_configs()["SD 1"], statements([], metadata, yaml))
    assert "xxx" in str(error.value) and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "config", [{"unet.init_lora_weights": f"pissa{LONG}"}, {"unet.alpha_pattern": {f"({LONG}": 3}}, {"unet.lora_alpha": LONG}], ids=list
)
def test_of_a_lora(config, tmp_path):
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    halves = {f"{layer}.lora_A.weight": torch.zeros(2, 16), f"{layer}.lora_B.weight": torch.zeros(16, 2)}
    write_safetensors(tmp_path / "x.safetensors", halves, {METADATA: json.dumps(config)})
    with pytest.raises(ValueError) as error:
        weights_loader.read_lora(tmp_path / "x.safetensors", family_model("SD 1"))
    assert "xxx" in str(error.value) and len(str(error.value)) < 1000
