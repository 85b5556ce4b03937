from dataclasses import replace

import pytest
import torch

import weights_loader
from minidiff.config import SD1
from tests.checkpoints import extras, family_configs, family_model, ldm_tensors, plug_in
from tests.small_models import small_model
from weights_loader.families.shared import IGNORED, UNET_PREFIX
from weights_loader.families.stable_diffusion_1 import STABLE_DIFFUSION_1
from weights_loader.families.stable_diffusion_2 import STABLE_DIFFUSION_2
from weights_loader.load import LoadOptions, load_with_report
from weights_loader.name_table import ema_name
from weights_loader.read import read
from weights_loader.write import write_safetensors

CONFIG = family_configs()["SD 1"]


@pytest.fixture
def tensors():
    return ldm_tensors(small_model(CONFIG))


def error_of(tensors, path, config=CONFIG) -> str:
    write_safetensors(path / "model.safetensors", tensors)
    with pytest.raises(ValueError) as caught:
        weights_loader.load(path / "model.safetensors", config=config)
    return str(caught.value)


def test_every_tensor_of_a_file_ends_in_exactly_one_list(tmp_path):
    sd = family_model("SD 2")
    tensors = ldm_tensors(sd) | extras(sd.config)
    tensors |= {ema_name(name): tensor for name, tensor in tensors.items() if name.startswith(UNET_PREFIX)}
    write_safetensors(tmp_path / "model.safetensors", tensors)
    report = load_with_report(tmp_path / "model.safetensors", LoadOptions(config=sd.config)).report
    named = [*report.used, *report.converted, *report.extra, *report.ignored]
    assert sorted(named) == sorted(tensors)
    assert report.problem() is None
    assert sorted(report.extra) == sorted(sd.extra_tensors)
    assert set(report.converted.values()) == {"stacked query, key and value, taken apart", "1x1 convolution, taken as a matrix"}


def test_each_ignored_tensor_has_its_reason(tensors, tmp_path):
    examples = {
        "posterior_log_variance_clipped": IGNORED[0][1],
        "sqrt_recip_alphas_cumprod": IGNORED[0][1],
        "cond_stage_model.transformer.text_model.embeddings.position_ids": IGNORED[1][1],
        "model_ema.num_updates": IGNORED[2][1],
        "model_ema.diffusion_modelout2bias": IGNORED[3][1],
        "first_stage_model.loss.discriminator.main.0.weight": IGNORED[4][1],
    }
    write_safetensors(tmp_path / "model.safetensors", tensors | {name: torch.zeros(1) for name in examples})
    assert load_with_report(tmp_path / "model.safetensors", LoadOptions(config=CONFIG)).report.ignored == examples


def test_a_missing_weight_is_named(tensors, tmp_path):
    del tensors["first_stage_model.decoder.up.1.block.0.norm1.weight"]
    error = error_of(tensors, tmp_path)
    assert "1 keys missing, 0 unexpected, 0 of the wrong shape" in error
    assert "missing first_stage_model.decoder.up.1.block.0.norm1.weight" in error
    assert "likely cause: weights were left out when the file was saved" in error


def test_an_unexpected_weight_is_named(tensors, tmp_path):
    error = error_of(tensors | {f"{UNET_PREFIX}label_emb.0.0.weight": torch.zeros(3)}, tmp_path)
    assert "0 keys missing, 1 unexpected" in error and "likely cause: something else was saved beside the model" in error


def test_a_misspelt_weight_is_shown_with_its_nearest_name(tensors, tmp_path):
    tensors[f"{UNET_PREFIX}time_embed.0.wieght"] = tensors.pop(f"{UNET_PREFIX}time_embed.0.weight")
    error = error_of(tensors, tmp_path)
    assert f"missing {UNET_PREFIX}time_embed.0.weight (nearest: {UNET_PREFIX}time_embed.0.wieght)" in error
    assert f"unexpected {UNET_PREFIX}time_embed.0.wieght (nearest: {UNET_PREFIX}time_embed.0.weight)" in error


def test_a_weight_of_the_wrong_shape_is_shown_with_both_shapes(tensors, tmp_path):
    tensors[f"{UNET_PREFIX}out.2.bias"] = torch.zeros(5)
    error = error_of(tensors, tmp_path)
    assert f"0 keys missing, 0 unexpected, 1 of the wrong shape\n  {UNET_PREFIX}out.2.bias is (5,), should be (4,)" in error


def test_a_real_1x1_convolution_is_not_taken_from_a_matrix(tensors, tmp_path):
    tensors["first_stage_model.quant_conv.weight"] = tensors["first_stage_model.quant_conv.weight"][:, :, 0, 0]
    assert "quant_conv.weight is (8, 8), should be (8, 8, 1, 1)" in error_of(tensors, tmp_path)


def test_only_the_first_names_of_many_are_shown(tensors, tmp_path):
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("first_stage_model.decoder")}
    error = error_of(tensors, tmp_path)
    assert error.count("\n  missing ") == 4 and "... and " in error


def test_sd_2_asked_for_as_sd_1_is_the_likely_cause(tmp_path, monkeypatch):
    sd = family_model("SD 2")
    narrow = replace(CONFIG, unet=replace(CONFIG.unet, context_width=8))
    plug_in(monkeypatch, replace(STABLE_DIFFUSION_1, config=narrow), replace(STABLE_DIFFUSION_2, config=sd.config))
    error = error_of(ldm_tensors(sd), tmp_path, narrow)
    assert "not the weights of Stable Diffusion 1.x: 36 keys missing, 28 unexpected, 14 of the wrong shape" in error
    assert "likely cause: the file is a Stable Diffusion 2.x, and another config was asked for; leave config= out" in error


def test_another_size_is_the_likely_cause(tensors, tmp_path):
    error = error_of(tensors, tmp_path, SD1)
    assert "of the wrong shape" in error
    assert "likely cause: a model of another size (" in error and "U-Net widths (16, 16, 32), not (320, 640, 1280, 1280)" in error


def test_nothing_is_loaded_when_a_folder_lacks_one_weight(tmp_path):
    sd = family_model("SD 1")
    weights_loader.save(sd, tmp_path / "model", layout="diffusers")
    path = tmp_path / "model/unet/diffusion_pytorch_model.safetensors"
    unet = dict(read(path).tensors)
    unet["conv_ni.bias"] = unet.pop("conv_in.bias")
    write_safetensors(path, unet)
    with pytest.raises(ValueError, match=r"1 keys missing, 1 unexpected[\s\S]*missing conv_in.bias \(nearest: conv_ni.bias\)"):
        weights_loader.load(tmp_path / "model")


def test_a_truncated_download_is_named(tensors, tmp_path):
    for write, name in ((write_safetensors, "model.safetensors"), (lambda path, t: torch.save(t, path), "model.ckpt")):
        path = tmp_path / name
        write(path, tensors)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        with pytest.raises(ValueError, match="truncated download"):
            weights_loader.load(path, config=CONFIG)
