import pytest
import torch

import weights_loader
from tests.checkpoints import extras, family_configs, family_model, ldm_tensors
from tests.small_models import small_model
from weights_loader import detect
from weights_loader.dialects import UNET_PREFIX, ema_name, to_file
from weights_loader.write import write_safetensors


def test_a_file_of_a_public_family_is_summed_up(tmp_path, monkeypatch):
    sd = family_model("SD 2")
    monkeypatch.setitem(detect.FAMILIES, "Stable Diffusion 2.x", sd.config)
    monkeypatch.setattr(detect, "OPEN_CLIP_LAYERS", 3)
    monkeypatch.setattr(detect, "noise_correlation", lambda *parts: 0.02)
    tensors = {name: tensor.half() for name, tensor in ldm_tensors(sd).items()}
    tensors |= {ema_name(name): tensor for name, tensor in tensors.items() if name.startswith(UNET_PREFIX)} | extras(sd.config)
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "model.ckpt")
    summary = weights_loader.inspect(tmp_path / "model.ckpt")
    assert summary.family == "Stable Diffusion 2.x" and summary.layout == "ldm, a single file"
    assert summary.prediction == "v" and summary.ema and summary.carried == 14
    assert summary.size == (tmp_path / "model.ckpt").stat().st_size
    assert summary.dtypes == {"float16": len(tensors) - len(extras(sd.config)), "float32": 5, "int64": 1}
    assert summary.parameters["unet"] == sum(parameter.numel() for parameter in sd.unet.parameters())
    assert summary.used + sum(summary.converted.values()) + summary.carried + sum(summary.ignored.values()) == len(tensors)
    text = str(summary)
    assert "family      Stable Diffusion 2.x" in text and "predicts    v" in text and "decided by a numerical test" in text
    assert "324 ignored: moving average" in text and "'epoch' stands" in text


@pytest.mark.parametrize("family", ["bundled", "SD 1 inpainting"])
def test_a_folder_is_summed_up(family, tmp_path):
    weights_loader.save(family_model(family), tmp_path / "model", layout="diffusers")
    summary = weights_loader.inspect(tmp_path / "model")
    assert summary.layout == "diffusers, a folder" and not summary.ema and summary.notes == ()
    assert summary.prediction == family_configs()[family].schedule.prediction
    assert summary.size == sum(file.stat().st_size for file in (tmp_path / "model").rglob("*") if file.is_file())


def test_what_cannot_be_loaded_cannot_be_summed_up_either(tmp_path):
    write_safetensors(tmp_path / "vae.safetensors", to_file(small_model().vae, "ldm"))
    with pytest.raises(ValueError, match="a VAE alone; load a whole model and give this as vae=FILE"):
        weights_loader.inspect(tmp_path / "vae.safetensors")
