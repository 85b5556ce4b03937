"""Files as ComfyUI, the web interfaces, kohya's scripts and diffusers write them, which say what a U-Net predicts, or do not."""

import dataclasses
import json

import pytest
import torch

import weights_loader
from tests.checkpoints import assert_same_model, family_configs, ldm_tensors, part_to_file, plug_in_small_families
from tests.small_models import small_model
from weights_loader import prediction
from weights_loader.families.shared import VAE_PREFIX
from weights_loader.stated import statements
from weights_loader.write import write_safetensors

EMPTY = torch.empty(0)
EDM = {"edm_vpred.sigma_max": torch.tensor(120.0), "edm_vpred.sigma_min": torch.tensor(0.002)}


@pytest.fixture
def sd(monkeypatch):
    """A small model in the place of SD 1.x, which needs no config to be recognised."""
    configs = plug_in_small_families(monkeypatch)
    monkeypatch.setattr(prediction, "noise_correlation", lambda *parts: 0.99)
    return small_model(configs["SD 1"])


def schedule_of(sd, path, **options):
    config = weights_loader.load(path, **options).config.schedule
    return config.prediction, config.zero_terminal_snr, config.spacing


@pytest.mark.parametrize(
    "metadata, expected",
    [
        ({"modelspec.prediction_type": "v"}, ("v", False, "leading")),
        ({"modelspec.prediction_type": "v_prediction"}, ("v", False, "leading")),
        ({"modelspec.prediction_type": "V-Prediction"}, ("v", False, "leading")),
        ({"modelspec.prediction_type": "epsilon"}, ("eps", False, "leading")),
        ({"modelspec.predict_key": "v"}, ("v", False, "leading")),
        ({"modelspec.architecture": "stable-diffusion-v2-768-v"}, ("v", False, "leading")),
        ({"ss_v_parameterization": "True", "ss_zero_terminal_snr": "True"}, ("v", True, "trailing")),
        ({"ss_v_parameterization": "False", "ss_zero_terminal_snr": "False"}, ("eps", False, "leading")),
        ({"ss_v_parameterization": "None", "modelspec.prediction_type": "None"}, ("eps", False, "leading")),  # says nothing
        ({"modelspec.prediction_type": "epsilon", "ss_zero_terminal_snr": "True"}, ("eps", True, "leading")),
    ],
    ids=str,
)
def test_metadata_say_the_prediction_in_every_spelling(metadata, expected, sd, tmp_path):
    write_safetensors(tmp_path / "model.safetensors", ldm_tensors(sd), metadata)
    assert schedule_of(sd, tmp_path / "model.safetensors") == expected
    (note,) = weights_loader.load(tmp_path / "model.safetensors").notes
    assert note.startswith(f"predicts {expected[0]}") and ("numerical test" in note or next(iter(metadata)) in note)


@pytest.mark.parametrize(
    "markers, expected",
    [
        ({"v_pred": EMPTY}, ("v", False, "leading")),
        ({"v_pred": EMPTY, "ztsnr": EMPTY}, ("v", True, "trailing")),
        ({"ztsnr": EMPTY}, ("eps", True, "leading")),  # the model is asked, and answers eps
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("container", ["safetensors", "ckpt"])
def test_marker_tensors_say_it_and_survive_a_round_trip(container, markers, expected, sd, tmp_path):
    tensors = ldm_tensors(sd) | markers
    path = tmp_path / f"model.{container}"
    write_safetensors(path, tensors) if container == "safetensors" else torch.save({"state_dict": tensors}, path)
    assert schedule_of(sd, path) == expected
    loaded = weights_loader.load(path)
    kept = set(markers) if expected[0] == "v" else set()  # a marker that contradicts what was decided would mislead the next reader
    assert set(loaded.extra_tensors) == kept
    weights_loader.convert(path, tmp_path / "folder")
    weights_loader.convert(tmp_path / "folder", tmp_path / "again.safetensors")
    assert_same_model(weights_loader.load(tmp_path / "again.safetensors"), loaded)
    scheduler = json.loads((tmp_path / "folder/scheduler/scheduler_config.json").read_text())
    assert scheduler["prediction_type"] == {"v": "v_prediction", "eps": "epsilon"}[expected[0]]
    assert scheduler["rescale_betas_zero_snr"] == expected[1] and scheduler["timestep_spacing"] == expected[2]


def test_a_model_of_continuous_noise_levels_is_refused_by_its_markers_unless_told(sd, tmp_path):
    write_safetensors(tmp_path / "model.safetensors", ldm_tensors(sd) | EDM)
    with pytest.raises(
        ValueError, match=r"model.safetensors: a model of continuous noise levels .by the tensor edm_vpred.sigma_max.*prediction=v"
    ):
        weights_loader.load(tmp_path / "model.safetensors")
    loaded = weights_loader.load(tmp_path / "model.safetensors", prediction="v")
    assert loaded.config.schedule.prediction == "v"
    weights_loader.save(loaded, tmp_path / "again.safetensors")
    again = weights_loader.load(tmp_path / "again.safetensors", prediction="v")
    assert all(torch.equal(again.extra_tensors[name], tensor) for name, tensor in EDM.items())


YAML = """
model:
  base_learning_rate: 1.0e-4
  params:
    parameterization: "v"
    linear_start: 0.0015  # another schedule
    linear_end: 0.0205
    timesteps: 900
    scale_factor: 0.2
    low_scale_config:
      params: {}
        linear_start: 0.0001
"""


def test_the_noise_schedule_and_the_factor_of_the_yaml_are_taken_over_and_kept(sd, tmp_path):
    write_safetensors(tmp_path / "model.safetensors", ldm_tensors(sd))
    (tmp_path / "model.yaml").write_text(YAML)
    config = weights_loader.load(tmp_path / "model.safetensors").config
    schedule = config.schedule
    assert (schedule.beta_start, schedule.beta_end, schedule.timesteps, schedule.prediction) == (0.0015, 0.0205, 900, "v")
    assert config.vae.scaling_factor == 0.2
    weights_loader.convert(tmp_path / "model.safetensors", tmp_path / "again.safetensors")
    assert weights_loader.load(tmp_path / "again.safetensors").config == config


@pytest.mark.parametrize(
    "line, message",
    [
        ("linear_start: fast", "linear_start: fast in the .yaml of its name: expected a number"),
        ("timesteps: 1000000000", "timesteps: 1000000000 in the .yaml of its name: expected 2 to 100000"),
        ("timesteps: nan", "timesteps: nan in the .yaml of its name: expected a number"),
        ("scale_factor: -1", "scale_factor: -1 in the .yaml of its name: expected a number above 0"),
        ("linear_end: 7", r"beta_end 7"),
    ],
)
def test_nonsense_in_a_yaml_is_one_line_that_names_the_file(line, message, sd, tmp_path):
    write_safetensors(tmp_path / "model.safetensors", ldm_tensors(sd))
    (tmp_path / "model.yaml").write_text(f"    {line}\n")
    with pytest.raises(ValueError, match=message) as error:
        weights_loader.load(tmp_path / "model.safetensors")
    assert "\n" not in str(error.value)


def test_the_yaml_that_the_web_interfaces_read_says_it_too(sd, tmp_path):
    write_safetensors(tmp_path / "model.safetensors", ldm_tensors(sd))
    (tmp_path / "model.yaml").write_text(
        'model:\n  target: ldm.LatentDiffusion\n  params:\n    parameterization: "v"\n    scale_factor: 0.18215\n'
    )
    assert schedule_of(sd, tmp_path / "model.safetensors")[0] == "v"
    notes = weights_loader.load(tmp_path / "model.safetensors").notes
    assert any("model.yaml beside the file: its parameterization, noise schedule and scale_factor are read" in note for note in notes)
    (tmp_path / "model.yaml").write_text("parameterization: x0")
    with pytest.raises(
        ValueError, match="parameterization: x0 in the .yaml of its name: not supported, expected epsilon or v; prediction="
    ):
        weights_loader.load(tmp_path / "model.safetensors")
    assert schedule_of(sd, tmp_path / "model.safetensors", prediction="v")[0] == "v"


def test_a_vae_beside_the_file_and_metadata_that_nothing_follows_are_told(sd, tmp_path):
    write_safetensors(
        tmp_path / "model.safetensors", ldm_tensors(sd), {"modelspec.encoder_layer": "2", "modelspec.timestep_range": "0,1000"}
    )
    torch.save({}, tmp_path / "model.vae.pt")
    notes = "\n".join(weights_loader.load(tmp_path / "model.safetensors").notes)
    assert "model.vae.pt beside the file is not used; vae=model.vae.pt" in notes
    assert "metadata modelspec.encoder_layer = 2: trained on an earlier layer" in notes and "timestep_range" not in notes


def test_a_prediction_that_is_neither_is_refused_by_name(sd, tmp_path):
    write_safetensors(tmp_path / "model.safetensors", ldm_tensors(sd), {"modelspec.prediction_type": "sample"})
    with pytest.raises(
        ValueError, match="model.safetensors: metadata modelspec.prediction_type = sample: not supported, expected epsilon or v"
    ):
        weights_loader.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("correlation, expected", [(0.97, "eps"), (0.04, "v")])
def test_a_file_that_contradicts_itself_is_asked(correlation, expected, sd, tmp_path, monkeypatch):
    monkeypatch.setattr(prediction, "noise_correlation", lambda *parts: correlation)
    write_safetensors(tmp_path / "model.safetensors", ldm_tensors(sd) | {"v_pred": EMPTY}, {"modelspec.prediction_type": "epsilon"})
    loaded = weights_loader.load(tmp_path / "model.safetensors")
    assert loaded.config.schedule.prediction == expected
    assert (
        "numerical test" in loaded.notes[0]
        and "contradicts itself: metadata modelspec.prediction_type = epsilon, tensor v_pred" in loaded.notes[0]
    )


@pytest.mark.parametrize("correlation, expected", [(0.97, "eps"), (0.04, "v")])
def test_an_sd_1_that_says_nothing_is_asked(correlation, expected, sd, tmp_path, monkeypatch):
    monkeypatch.setattr(prediction, "noise_correlation", lambda *parts: correlation)
    write_safetensors(tmp_path / "model.safetensors", ldm_tensors(sd))
    loaded = weights_loader.load(tmp_path / "model.safetensors")
    assert loaded.config.schedule.prediction == expected and loaded.notes[0].startswith(f"predicts {expected}: decided by a numerical test")
    assert expected in str(weights_loader.inspect(tmp_path / "model.safetensors"))


def test_whoever_gives_the_prediction_has_the_last_word(sd, tmp_path):
    write_safetensors(tmp_path / "model.safetensors", ldm_tensors(sd) | {"v_pred": EMPTY, "ztsnr": EMPTY})
    assert schedule_of(sd, tmp_path / "model.safetensors", prediction="eps") == ("eps", False, "leading")
    assert schedule_of(sd, tmp_path / "model.safetensors", prediction="v") == ("v", True, "trailing")
    assert weights_loader.load(tmp_path / "model.safetensors", prediction="eps").extra_tensors == {}


def test_the_config_that_minidiff_wrote_goes_before_all_others(sd, tmp_path):
    weights_loader.save(sd, tmp_path / "model.safetensors")
    assert schedule_of(sd, tmp_path / "model.safetensors") == ("eps", False, "leading")
    assert weights_loader.load(tmp_path / "model.safetensors").notes == ()


def test_what_is_beside_the_point_says_nothing():
    assert statements(["betas"], {"ss_v_parameterization": "", "modelspec.architecture": "stable-diffusion-v1/lora"}) == ()


# ------------------------------------------------------------------------------------------------ the config of a VAE


def vae_folder(sd, path, **settings):
    """A VAE as diffusers saves it alone, with these settings changed."""
    weights_loader.save(sd, path.with_name("whole"), layout="diffusers")
    path.mkdir()
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        (path / name).write_bytes((path.with_name("whole") / "vae" / name).read_bytes())
    config = json.loads((path / "config.json").read_text()) | settings
    (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("given", ["the folder", "the file in it"])
def test_the_config_beside_a_vae_is_read_and_written_again(given, tmp_path):
    sd = small_model(family_configs()["SD 1"])
    weights_loader.save(sd, tmp_path / "model.safetensors")
    vae = vae_folder(sd, tmp_path / "vae", scaling_factor=0.13025)
    vae = vae if given == "the folder" else vae / "diffusion_pytorch_model.safetensors"
    loaded = weights_loader.load(tmp_path / "model.safetensors", vae=vae)
    assert loaded.config.vae.scaling_factor == 0.13025
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.decode(latents), loaded.vae.decode(latents / 0.13025).clamp(-1, 1))
    weights_loader.convert(tmp_path / "model.safetensors", tmp_path / "converted", vae=vae)
    assert json.loads((tmp_path / "converted/vae/config.json").read_text())["scaling_factor"] == 0.13025


def test_the_factor_in_the_metadata_of_a_whole_model_is_taken_with_its_vae(tmp_path):
    config = family_configs()["SD 1"]
    other = small_model(dataclasses.replace(config, vae=dataclasses.replace(config.vae, scaling_factor=0.5)))
    weights_loader.save(small_model(config), tmp_path / "model.safetensors")
    weights_loader.save(other, tmp_path / "other.safetensors")
    assert weights_loader.load(tmp_path / "model.safetensors", vae=tmp_path / "other.safetensors").config.vae.scaling_factor == 0.5


def test_a_setting_of_a_vae_that_cannot_be_taken_over_is_refused_by_name(tmp_path):
    sd = small_model(family_configs()["SD 1"])
    weights_loader.save(sd, tmp_path / "model.safetensors")
    vae = vae_folder(sd, tmp_path / "vae", latents_mean=[0.1] * 4)
    with pytest.raises(ValueError, match=r"vae/config.json: latents_mean is \[0.1, 0.1, 0.1, 0.1\], which is not supported"):
        weights_loader.load(tmp_path / "model.safetensors", vae=vae)


def test_a_config_of_something_else_beside_a_vae_file_is_not_its_own(tmp_path):
    sd = small_model(family_configs()["SD 1"])
    weights_loader.save(sd, tmp_path / "model.safetensors")
    write_safetensors(
        tmp_path / "vae.safetensors", {name.removeprefix(VAE_PREFIX): t for name, t in part_to_file(sd, "vae", "ldm").items()}
    )
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    assert weights_loader.load(tmp_path / "model.safetensors", vae=tmp_path / "vae.safetensors").config == sd.config
