import dataclasses

import pytest
import torch

import weights_loader
from minidiff.config import SD2
from minidiff.schedule import NoiseSchedule
from minidiff.unet import UNet
from tests.checkpoints import family_configs, ldm_tensors, plug_in
from tests.small_models import small_model
from weights_loader.families.stable_diffusion_2 import STABLE_DIFFUSION_2
from weights_loader.prediction import noise_correlation
from weights_loader.write import write_safetensors


def trained(prediction):
    """A small SD 2-shaped model after twenty steps on pictures of one colour, which is enough to know noise from signal."""
    config = family_configs()["SD 2"]
    config = dataclasses.replace(config, schedule=dataclasses.replace(config.schedule, prediction=prediction))
    sd, schedule = small_model(config), NoiseSchedule(config.schedule)
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(sd.unet.parameters(), lr=5e-3)
    context = sd.encode_prompts([""]).expand(8, -1, -1)
    for _ in range(20):
        x_0 = torch.randn(8, 4, 1, 1, generator=generator).expand(-1, -1, 16, 16)
        eps = torch.randn(8, 4, 16, 16, generator=generator)
        t = torch.randint(800, 1000, (8,), generator=generator)
        loss = (sd.unet(schedule.q_sample(x_0, t, eps), t, context) - schedule.target(x_0, t, eps)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return sd


class EpsTwin(UNet):
    """The same weights, answering with eps where the original answers with v."""

    def __init__(self, v_model, schedule):
        super().__init__(v_model.config)
        self.load_state_dict(v_model.state_dict())
        self.schedule = schedule

    def forward(self, x_t, t, context):
        return self.schedule.eps_from_v(x_t, t, super().forward(x_t, t, context))


@pytest.fixture(scope="module")
def v_model():
    return trained("v")


def test_a_v_model_and_its_eps_twin_are_told_apart(v_model):
    twin = EpsTwin(v_model.unet, NoiseSchedule(SD2.schedule))
    assert noise_correlation(v_model.unet, v_model.text, 1000) < 0.3
    assert noise_correlation(twin, v_model.text, 1000) > 0.9


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_file_that_does_not_say_its_prediction_is_decided_by_its_weights(prediction, v_model, tmp_path, monkeypatch):
    sd = v_model if prediction == "v" else trained("eps")
    plug_in(monkeypatch, dataclasses.replace(STABLE_DIFFUSION_2, config=family_configs()["SD 2"]))
    write_safetensors(tmp_path / "model.safetensors", {name: tensor.half() for name, tensor in ldm_tensors(sd).items()})
    loaded = weights_loader.load(tmp_path / "model.safetensors")
    assert loaded.schedule.config.prediction == prediction
    assert loaded.notes[0].startswith(f"predicts {prediction}: decided by a numerical test")


def test_an_inpainting_model_is_asked_with_everything_masked():
    sd = small_model(family_configs()["SD 2 inpainting"])
    seen = []
    sd.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert -1 <= noise_correlation(sd.unet, sd.text, 1000) <= 1
    assert seen[0].shape == (1, 9, 16, 16) and (seen[0][:, 4] == 1).all() and (seen[0][:, 5:] == 0).all()
