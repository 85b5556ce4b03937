"""Stable Diffusion XL: every name of its files, how a file is recognised, and what is refused by name."""

import re
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import weights_loader
from minidiff.config import SD2, SDXL
from tests.checkpoints import assert_same_model, family_model, ldm_tensors, plug_in, public_keys
from weights_loader.detect import describe, foreign
from weights_loader.dialects import TEXT_DIFFUSERS_ALIASES
from weights_loader.empty_parts import empty_parts
from weights_loader.families import family_config, family_of_names, part_names
from weights_loader.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from weights_loader.name_table import canonical_name, file_shapes, from_file, name_table, to_file
from weights_loader.read import read
from weights_loader.report import Report
from weights_loader.stated import refuse_edm
from weights_loader.write import write_safetensors

UNET = "model.diffusion_model."


@pytest.fixture(scope="module")
def keys():
    return public_keys("xl")


@pytest.fixture(scope="module")
def modules():
    return empty_parts(SDXL).named()


def test_every_name_of_the_base_is_known_and_no_other_is_needed(keys, modules):
    report, tensors = Report(STABLE_DIFFUSION_XL, SDXL), {name: torch.empty(shape, device="meta") for name, shape in keys.items()}
    for name, part in modules.items():
        own = {key: tensor for key, tensor in tensors.items() if STABLE_DIFFUSION_XL.part_of(key) == name}
        report.add_part(part, part_names(SDXL, name, "ldm"), own)
    report.add_rest([name for name in tensors if STABLE_DIFFUSION_XL.part_of(name) is None])
    assert report.problem() is None
    assert report.extra == ["conditioner.embedders.1.model.logit_scale"]
    assert list(report.ignored) == ["conditioner.embedders.0.transformer.text_model.embeddings.position_ids"]
    assert len(report.used) + len(report.converted) == 2515 - 2
    assert report.converted["conditioner.embedders.1.model.text_projection"] == "matrix that is applied from the right, transposed"


def test_it_has_the_parameters_of_the_base(modules):
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in modules.items()}
    assert counts == {"text_encoder": 123_060_480, "text_encoder_2": 694_659_840, "unet": 2_567_463_684, "vae": 83_653_863}


def test_full_size_names_and_shapes_map_to_ldm_and_back(keys, modules):
    for name, part in modules.items():
        names, ours = part_names(SDXL, name, "ldm"), part.state_dict()
        written = to_file(part, names)
        assert {key: tuple(tensor.shape) for key, tensor in written.items()} == {key: keys[key] for key in written}
        locations = name_table(part, names)
        assert {key: from_file(written[there.name], there, ours[key]).shape for key, there in locations.items()} == {
            key: tensor.shape for key, tensor in ours.items()
        }
        assert len({(there.name, there.qkv_index) for there in locations.values()}) == len(ours), "two parameters in one place"


def test_full_size_names_and_shapes_are_those_of_diffusers_and_transformers(modules):
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
        first = CLIPTextModel(
            CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768)
        )
        second = CLIPTextModelWithProjection(
            CLIPTextConfig(hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280)
        )
    for name, theirs in (("unet", unet), ("text_encoder", first), ("text_encoder_2", second)):
        aliases = TEXT_DIFFUSERS_ALIASES if name != "unet" else ()
        expected = {canonical_name(key, aliases): tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
        expected.pop("text_model.embeddings.position_ids", None)  # a buffer of older transformers
        assert file_shapes(modules[name], part_names(SDXL, name, "diffusers")) == expected


# ------------------------------------------------------------------------------------------- small models of the family


@pytest.fixture
def small(monkeypatch):
    """A small model whose numbers are taken for the family's, so that its files need no metadata."""
    sd = family_model("SDXL")
    plug_in(monkeypatch, replace(STABLE_DIFFUSION_XL, config=sd.config))
    return sd


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_single_file_without_metadata_is_loaded(small, dtype, tmp_path):
    for part in small.parts.values():
        part.to(dtype)
    write_safetensors(tmp_path / "xl.safetensors", ldm_tensors(small))
    loaded = weights_loader.load(tmp_path / "xl.safetensors", dtype="file", prediction="eps")  # or random weights would be asked
    assert_same_model(loaded, small)
    assert weights_loader.inspect(tmp_path / "xl.safetensors").family == "Stable Diffusion XL"
    assert set(loaded.parts) == {"text_encoder", "text_encoder_2", "unet", "vae"}


def test_a_file_without_its_vae_is_loaded_with_one_from_elsewhere(small, tmp_path):
    tensors = ldm_tensors(small)
    vae = {name: tensor for name, tensor in tensors.items() if name.startswith("first_stage_model.")}
    write_safetensors(tmp_path / "xl.safetensors", {name: tensor for name, tensor in tensors.items() if name not in vae})
    write_safetensors(tmp_path / "vae.safetensors", {name.removeprefix("first_stage_model."): tensor for name, tensor in vae.items()})
    with pytest.raises(ValueError, match="no vae in this file; give one as vae=FILE"):
        weights_loader.load(tmp_path / "xl.safetensors")
    assert_same_model(weights_loader.load(tmp_path / "xl.safetensors", vae=tmp_path / "vae.safetensors", prediction="eps"), small)


@pytest.mark.parametrize("part, absent", [("conditioner.embedders.1.", "text encoder 2"), ("conditioner.embedders.0.", "text encoder")])
def test_a_file_without_one_of_its_encoders_says_which(small, part, absent, tmp_path):
    tensors = {name: tensor for name, tensor in ldm_tensors(small).items() if not name.startswith(part)}
    write_safetensors(tmp_path / "xl.safetensors", tensors)
    with pytest.raises(ValueError, match=f"no {absent} in this file"):
        weights_loader.load(tmp_path / "xl.safetensors")


def test_a_folder_without_its_second_encoder_says_which_file_is_missing(small, tmp_path):
    weights_loader.save(small, tmp_path / "xl", layout="diffusers")
    for file in (tmp_path / "xl" / "text_encoder_2").iterdir():
        file.unlink()
    (tmp_path / "xl" / "text_encoder_2").rmdir()
    with pytest.raises(FileNotFoundError, match="text_encoder_2"):
        weights_loader.load(tmp_path / "xl")


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_one_of_its_own_size_is_saved_and_loaded_again(layout, tmp_path):
    sd = family_model("SDXL")
    path = tmp_path / ("xl.safetensors" if layout == "ldm" else "xl")
    weights_loader.save(sd, path, layout=layout)
    assert_same_model(weights_loader.load(path), sd)


# ----------------------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    "name, message",
    [
        ("model.diffusion_model.time_embed.cond_proj.weight", r"guidance is distilled into \(LCM\)"),
        ("model.diffusion_model.middle_block.1.proj_in.scale_weight", "quantised to 8 bits"),
        ("control_model.time_embed.0.weight", "a ControlNet"),
    ],
)
def test_other_models_on_its_parts_are_refused_by_name(keys, name, message):
    assert foreign(list(keys)) is None and describe(list(keys)).startswith("a whole model")
    assert re.search(message, foreign([*keys, name]) or "")


@pytest.mark.parametrize("name, message", [("edm_vpred.sigma_max", "such as CosXL"), ("edm_mean", "such as Playground 2.5")])
def test_models_of_continuous_noise_levels_are_refused_by_name(name, message):
    with pytest.raises(ValueError, match=message):
        refuse_edm([name])


@pytest.mark.parametrize("flags, prediction, zero", [(("v_pred",), "v", False), (("v_pred", "ztsnr"), "v", True)])
def test_empty_tensors_say_what_it_predicts_and_survive(small, flags, prediction, zero, tmp_path):
    write_safetensors(tmp_path / "xl.safetensors", ldm_tensors(small) | {flag: torch.empty(0) for flag in flags})
    loaded = weights_loader.load(tmp_path / "xl.safetensors")
    schedule = loaded.config.schedule
    assert (schedule.prediction, schedule.zero_terminal_snr) == (prediction, zero)
    assert schedule.spacing == ("trailing" if zero else "leading")
    weights_loader.save(loaded, tmp_path / "again.safetensors")
    assert set(flags) <= set(read(tmp_path / "again.safetensors").tensors)


def test_the_refiner_is_refused_by_name():
    assert foreign(list(public_keys("xl-refiner"))) == "the refiner of Stable Diffusion XL, which is not supported; load the base"


@pytest.mark.parametrize(
    "way_down, way_up, found",  # transformer blocks of each input and output block; both have a middle of one ResBlock
    [
        ({4: 2, 5: 2, 7: 4, 8: 4}, {0: 4, 1: 4, 2: 10, 3: 2, 4: 1, 5: 1}, r"\(0, 2, 4\)"),
        ({4: 1, 5: 1, 7: 2, 8: 2}, {0: 2, 1: 2, 2: 2, 3: 1, 4: 1, 5: 1}, r"\(0, 1, 2\)"),
    ],
    ids=["SSD-1B", "Segmind Vega"],
)
def test_a_distilled_one_is_refused_by_the_depth_of_its_transformers(keys, way_down, way_up, found):
    def there(name: str) -> bool:
        block = re.match(rf"{re.escape(UNET)}(input|output)_blocks\.(\d+)\.1\.transformer_blocks\.(\d+)\.", name)
        if block is None:
            return not name.startswith((f"{UNET}middle_block.1.", f"{UNET}middle_block.2."))
        return int(block[3]) < {"input": way_down, "output": way_up}[block[1]][int(block[2])]

    distilled = {name: shape for name, shape in keys.items() if there(name)}
    said = rf"a distilled Stable Diffusion XL, such as SSD-1B or Segmind Vega: .* {found} blocks a level, not \(0, 2, 10\); not supported"
    with pytest.raises(ValueError, match=said):
        family_config(distilled)


def test_other_input_channels_are_refused_by_name(keys):
    said = "a Stable Diffusion XL whose U-Net takes 8 channels, made for InstructPix2Pix; supported are 4 and, for inpainting, 9$"
    with pytest.raises(ValueError, match=said):
        family_config(keys | {f"{UNET}input_blocks.0.0.weight": (320, 8, 3, 3)})


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_an_inpainting_model_is_read_and_named(keys, layout, tmp_path):
    config = family_config(keys | {f"{UNET}input_blocks.0.0.weight": (320, 9, 3, 3)})
    assert config == replace(SDXL, unet=replace(SDXL.unet, in_channels=9))
    sd = family_model("SDXL inpainting")
    path = tmp_path / ("xl.safetensors" if layout == "ldm" else "xl")
    weights_loader.save(sd, path, layout=layout)
    assert_same_model(weights_loader.load(path), sd)
    if layout == "diffusers":
        assert '"StableDiffusionXLInpaintPipeline"' in (path / "model_index.json").read_text()


def test_sd_turbo_is_a_stable_diffusion_2_in_the_names_of_sdxls_code():
    turbo = {name.replace("cond_stage_model.", "conditioner.embedders.0."): shape for name, shape in public_keys(2).items()}
    family = family_of_names(turbo)
    assert foreign(list(turbo)) is None and family.name == "Stable Diffusion 2.x"
    aliases = family.names["ldm"]["text_encoder"].aliases
    assert family_config({canonical_name(name, aliases): shape for name, shape in turbo.items()}) == SD2
