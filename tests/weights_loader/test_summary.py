from dataclasses import replace

import pytest
import torch

import weights_loader
from minidiff.adapters.tokens import NewTokens
from tests.checkpoints import extras, family_configs, family_model, ldm_tensors, part_to_file, plug_in
from tests.small_files import compressed, random_delta, random_lora
from tests.small_models import small_model
from weights_loader import prediction
from weights_loader.adapters.custom_diffusion import write_custom_diffusion
from weights_loader.adapters.embedding import write_embedding
from weights_loader.adapters.lora import pack, write_lora
from weights_loader.families.shared import UNET_PREFIX
from weights_loader.families.stable_diffusion_2 import STABLE_DIFFUSION_2
from weights_loader.name_table import ema_name
from weights_loader.write import write_safetensors


def test_a_file_of_a_public_family_is_summed_up(tmp_path, monkeypatch):
    sd = family_model("SD 2")
    plug_in(monkeypatch, replace(STABLE_DIFFUSION_2, config=sd.config))
    monkeypatch.setattr(prediction, "noise_correlation", lambda *parts: 0.02)
    tensors = {name: tensor.half() for name, tensor in ldm_tensors(sd).items()}
    tensors |= {ema_name(name): tensor for name, tensor in tensors.items() if name.startswith(UNET_PREFIX)} | extras(sd.config)
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "model.ckpt")
    summary = weights_loader.inspect(tmp_path / "model.ckpt")
    assert summary.family == "Stable Diffusion 2.x" and summary.layout == "ldm, a single file"
    assert summary.prediction == "v" and summary.ema and summary.extra == 14
    assert summary.size == (tmp_path / "model.ckpt").stat().st_size
    assert summary.dtypes == {"float16": len(tensors) - len(extras(sd.config)), "float32": 5, "int64": 1}
    assert summary.parameters["unet"] == sum(parameter.numel() for parameter in sd.unet.parameters())
    assert summary.used + sum(summary.converted.values()) + summary.extra + sum(summary.ignored.values()) == len(tensors)
    text = str(summary)
    assert "family      Stable Diffusion 2.x" in text and "predicts    v, by a numerical test" in text
    assert "324 ignored: moving average" in text and "'epoch' stands" in text


@pytest.mark.parametrize("family", ["bundled", "SD 1 inpainting"])
def test_a_folder_is_summed_up(family, tmp_path):
    weights_loader.save(family_model(family), tmp_path / "model", layout="diffusers")
    summary = weights_loader.inspect(tmp_path / "model")
    assert summary.layout == "diffusers, a folder" and not summary.ema and summary.notes == ()
    assert summary.prediction == family_configs()[family].schedule.prediction
    assert summary.size == sum(file.stat().st_size for file in (tmp_path / "model").rglob("*") if file.is_file())


def test_what_cannot_be_loaded_cannot_be_summed_up_either(tmp_path):
    write_safetensors(tmp_path / "vae.safetensors", part_to_file(small_model(), "vae", "ldm"))
    with pytest.raises(ValueError, match="a VAE alone; load a whole model and give this as vae=FILE"):
        weights_loader.inspect(tmp_path / "vae.safetensors")


# -------------------------------------------------------------------------------------------------------- small files


def test_a_lora_is_summed_up(tmp_path):
    sd = small_model()
    lora = random_lora(sd, r"attention\.to_[kv]", (4,), (2.0,))
    write_lora(tmp_path / "x.safetensors", lora, sd, "kohya", {"steps": 300})
    summary = weights_loader.inspect(tmp_path / "x.safetensors")
    text_layers = sum(name.startswith("text_encoder.") for name in lora.layers)
    assert summary.parts == {"unet": len(lora.layers) - text_layers, "text encoder": text_layers} and text_layers == 4
    assert summary.kind == "LoRA, names of kohya" and summary.ranks == {4: len(lora.layers)} and summary.alphas == {2.0: len(lora.layers)}
    assert summary.size == (tmp_path / "x.safetensors").stat().st_size and summary.words == {}
    text = str(summary)
    assert "rank        4\n" in text and "alpha       2\n" in text and 'minidiff.settings: {"steps": 300}' in text


def test_a_folder_with_a_lora_of_many_ranks_is_summed_up(tmp_path):
    sd = small_model()
    write_safetensors(
        tmp_path / "pytorch_lora_weights.safetensors", *pack(random_lora(sd, "", (1, 2, 3, 4, 5), (1.0, 2.0)), sd, "diffusers")
    )
    text = str(weights_loader.inspect(tmp_path))
    assert "LoRA, names of diffusers" in text and "rank        1 to 5\n" in text and "1 (" in text and "lora_adapter_metadata: {" in text


def test_words_and_custom_diffusion_are_summed_up(tmp_path):
    sd = small_model()
    delta = random_delta(sd, words=3)
    write_embedding(tmp_path / "x.safetensors", NewTokens({"<new1>": torch.zeros(1, 16), "<new2>": torch.zeros(3, 16)}))
    torch.save({"sks": torch.zeros(16)}, tmp_path / "sks.bin")
    write_custom_diffusion(tmp_path / "delta.safetensors", delta, sd, compressed=compressed(delta, sd))
    write_custom_diffusion(tmp_path / "folder", delta, sd)
    summaries = {name: weights_loader.inspect(tmp_path / name) for name in ("x.safetensors", "sks.bin", "delta.safetensors", "folder")}
    assert summaries["delta.safetensors"].words == summaries["folder"].words == {"<new1>": 3, "<new2>": 3}
    assert "words       <new1> (1 vector), <new2> (3 vectors), 16 wide" in str(summaries["x.safetensors"])
    assert summaries["sks.bin"].words == {"sks": 1} and summaries["sks.bin"].kind == "Textual Inversion embedding"
    assert summaries["delta.safetensors"].kind == "Custom Diffusion, compressed" and summaries["delta.safetensors"].ranks == {2: 14}
    assert summaries["folder"].kind == "Custom Diffusion" and summaries["folder"].parts == {"unet cross-attention": 14}


def test_a_small_file_that_is_damaged_is_named(tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"lora_unet_mid_block_attentions_0_proj_in.dora_scale": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match="x.safetensors: a DoRA"):
        weights_loader.inspect(tmp_path / "x.safetensors")
