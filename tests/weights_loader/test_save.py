import json

import pytest
import torch

import weights_loader
from tests.checkpoints import assert_same_model, extras, family_configs, family_model, ldm_tensors
from weights_loader.metadata import KEY, config_to_json
from weights_loader.read import read
from weights_loader.write import write_safetensors


@pytest.mark.parametrize("layout, name", [("ldm", "model.safetensors"), ("diffusers", "model")])
@pytest.mark.parametrize("family", family_configs())
def test_load_save_load_is_bit_identical(family, layout, name, tmp_path):
    sd = family_model(family)
    weights_loader.save(sd, tmp_path / name, layout)
    loaded = weights_loader.load(tmp_path / name)
    assert_same_model(loaded, sd)
    (tmp_path / "again").mkdir()
    weights_loader.save(loaded, tmp_path / "again" / name, layout)
    files = [path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*") if path.is_file()] or [""]
    for file in files:
        assert (tmp_path / name / file).read_bytes() == (tmp_path / "again" / name / file).read_bytes(), f"{file} differs"


def test_through_both_layouts_nothing_is_lost(tmp_path):
    sd = family_model("SD 2")
    weights_loader.save(sd, tmp_path / "a.safetensors")
    weights_loader.convert(tmp_path / "a.safetensors", tmp_path / "b")
    weights_loader.convert(tmp_path / "b", tmp_path / "c.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "c.safetensors").read_bytes()


def test_a_public_file_comes_back_with_every_tensor_that_is_not_made_anew(tmp_path):
    sd = family_model("SD 2")
    tensors = ldm_tensors(sd)
    write_safetensors(tmp_path / "model.safetensors", tensors | extras(sd.config))
    weights_loader.save(weights_loader.load(tmp_path / "model.safetensors", config=sd.config), tmp_path / "saved.safetensors")
    saved = read(tmp_path / "saved.safetensors")
    assert saved.tensors.keys() == tensors.keys()
    assert all(torch.equal(saved.tensors[name], tensors[name]) for name in tensors)
    assert saved.metadata[KEY] == config_to_json(sd.config)


def test_convert_keeps_the_dtype_of_the_file(tmp_path):
    sd = family_model("SD 1")
    sd.unet.half(), sd.vae.half(), sd.text_encoder.half()
    weights_loader.save(sd, tmp_path / "model.safetensors")
    weights_loader.convert(tmp_path / "model.safetensors", tmp_path / "folder")
    weights_loader.convert(tmp_path / "model.safetensors", tmp_path / "copy.safetensors")
    assert_same_model(weights_loader.load(tmp_path / "folder", dtype="file"), sd)
    assert (tmp_path / "copy.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


def test_convert_of_a_file_of_several_dtypes_loses_no_bit(tmp_path):
    sd = family_model("SD 1")
    sd.unet.half()
    weights_loader.save(sd, tmp_path / "model.safetensors")
    weights_loader.convert(tmp_path / "model.safetensors", tmp_path / "copy.safetensors")
    before, after = read(tmp_path / "model.safetensors").tensors, read(tmp_path / "copy.safetensors").tensors
    assert all(torch.equal(before[name].float(), after[name]) for name in before)


def test_convert_takes_another_dtype(tmp_path):
    weights_loader.save(family_model("SD 1"), tmp_path / "model.safetensors")
    weights_loader.convert(tmp_path / "model.safetensors", tmp_path / "half.safetensors", dtype=torch.float16)
    assert {tensor.dtype for tensor in read(tmp_path / "half.safetensors").tensors.values()} == {torch.float16}


def test_saving_does_not_change_the_model(tmp_path):
    sd = family_model("SD 2")
    weights_loader.save(sd, tmp_path / "model.safetensors")
    weights_loader.save(sd, tmp_path / "model", "diffusers")
    assert_same_model(sd, family_model("SD 2"))


@pytest.mark.parametrize(
    "layout, path, file", [("ldm", "a.safetensors", ""), ("diffusers", "a", "unet/diffusion_pytorch_model.safetensors")]
)
def test_settings_stand_in_the_metadata_and_change_nothing_else(layout, path, file, tmp_path):
    sd = family_model("SD 2")
    weights_loader.save(sd, tmp_path / path, layout, settings={"method": "dreambooth", "steps": 3})
    assert json.loads(read(tmp_path / path / file).metadata["minidiff.settings"]) == {"method": "dreambooth", "steps": 3}
    assert_same_model(weights_loader.load(tmp_path / path), sd)


def test_the_parts_are_whole_each_and_together_the_model(tmp_path):
    sd = family_model("SD 1")
    weights_loader.save_parts(sd, tmp_path)
    for part in ("text_encoder", "unet", "vae"):
        checkpoint = read(tmp_path / f"{part}.safetensors")
        assert checkpoint.metadata[KEY] == config_to_json(sd.config)
        assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {torch.float16}
        assert sum(t.numel() for t in checkpoint.tensors.values()) == sum(p.numel() for p in sd.parts[part].parameters())
    back = weights_loader.load(tmp_path / "parts.safetensors.index.json")
    assert back.config == sd.config
    for part in ("text_encoder", "unet", "vae"):
        for name, p in sd.parts[part].state_dict().items():
            assert torch.equal(getattr(back, part).state_dict()[name], p.half().float()), name
    weights_loader.save(sd, tmp_path / "model.safetensors")
    other = weights_loader.load(tmp_path / "model.safetensors", vae=tmp_path / "vae.safetensors")
    assert torch.equal(other.vae.encoder.conv_in.weight, sd.vae.encoder.conv_in.weight.half().float())


def test_a_file_may_be_saved_over_itself(tmp_path):
    sd = family_model("SD 2")
    weights_loader.save(sd, tmp_path / "model.safetensors")
    weights_loader.save(weights_loader.load(tmp_path / "model.safetensors", dtype="file"), tmp_path / "model.safetensors")
    assert_same_model(weights_loader.load(tmp_path / "model.safetensors"), sd)


def test_a_folder_is_complete_for_a_diffusers_pipeline(tmp_path):
    weights_loader.save(family_model("SD 2 inpainting"), tmp_path / "model", "diffusers")
    index = json.loads((tmp_path / "model/model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionInpaintPipeline"
    for part, value in index.items():
        if isinstance(value, list) and value[0] is not None:
            assert (tmp_path / "model" / part).is_dir()
    assert {file.name for file in (tmp_path / "model/tokenizer").iterdir()} == {
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
    }
    assert read(tmp_path / "model/carried.safetensors").tensors.keys() == family_model("SD 2").extra_tensors.keys()


@pytest.mark.parametrize(
    "name, layout, message",
    [
        ("model.ckpt", "ldm", "one .safetensors file; give it a name that ends so"),
        ("model", "ldm", "one .safetensors file"),
        ("model.safetensors", "diffusers", "is a folder; give a name without .safetensors"),
        ("model", "comfy", "layout 'comfy' unknown; choose ldm, diffusers"),
    ],
)
def test_a_name_that_does_not_fit_the_layout_is_refused(name, layout, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        weights_loader.save(family_model("SD 1"), tmp_path / name, layout)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout, name", [("ldm", "model.safetensors"), ("diffusers", "model")])
def test_nothing_is_left_of_a_file_that_could_not_be_written(layout, name, tmp_path):
    sd = family_model("SD 1")
    sd.extra_tensors["cond_stage_model.logit_scale"] = torch.zeros(1, dtype=torch.complex64)  # a dtype that safetensors has not
    with pytest.raises(ValueError, match="complex64"):
        weights_loader.save(sd, tmp_path / name, layout)
    assert not list(tmp_path.iterdir())


def test_the_ending_of_a_file_may_be_in_capitals(tmp_path):
    weights_loader.convert("tiny", tmp_path / "UP.SAFETENSORS")
    assert (tmp_path / "UP.SAFETENSORS").is_file()
    assert weights_loader.load(tmp_path / "UP.SAFETENSORS").config == weights_loader.load("tiny").config
    with pytest.raises(ValueError, match="checkpoints are written as .safetensors"):
        weights_loader.convert("tiny", tmp_path / "UP.CKPT")
