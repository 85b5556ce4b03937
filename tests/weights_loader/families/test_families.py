"""Public models are recognised by names and shapes, and a family is plugged in through the table alone."""

from dataclasses import replace

import pytest
import torch

import weights_loader
from minidiff.config import SD1, SD2, SDXL, UNetConfig
from tests.checkpoints import assert_same_model, family_configs, ldm_shapes, ldm_tensors, plug_in, public_keys
from tests.small_models import small_config, small_model
from weights_loader.detect import describe, foreign
from weights_loader.families import config_sizes, family_config, family_of_config, family_of_names, family_of_shapes
from weights_loader.families.shared import UNET_PREFIX
from weights_loader.families.stable_diffusion_1 import STABLE_DIFFUSION_1
from weights_loader.name_table import PartNames
from weights_loader.write import write_safetensors


@pytest.mark.parametrize(
    "version, config, name", [(1, SD1, "Stable Diffusion 1.x"), (2, SD2, "Stable Diffusion 2.x"), ("xl", SDXL, "Stable Diffusion XL")]
)
def test_the_public_models_are_recognised_by_their_shapes(version, config, name):
    keys = public_keys(version)
    assert foreign(list(keys)) is None
    assert family_of_names(keys).name == family_of_shapes(keys).name == name
    assert family_config(keys) == config
    assert family_of_config(config).name_of(config) == name


@pytest.mark.parametrize("version", [1, 2])
def test_inpainting_is_recognised_by_nine_input_channels(version):
    keys = public_keys(version) | {f"{UNET_PREFIX}input_blocks.0.0.weight": (320, 9, 3, 3)}
    config = family_config(keys)
    assert config.unet.in_channels == 9
    assert family_of_config(config).name_of(config) == f"Stable Diffusion {version}.x inpainting"


@pytest.mark.parametrize("channels, kind", [(5, "depth-to-image"), (8, "InstructPix2Pix"), (6, "another task")])
def test_other_input_channels_are_refused_by_name(channels, kind):
    keys = public_keys(2) | {f"{UNET_PREFIX}input_blocks.0.0.weight": (320, channels, 3, 3)}
    with pytest.raises(ValueError, match=f"U-Net takes {channels} channels, made for {kind}"):
        family_config(keys)


def test_more_words_and_matrices_for_convolutions_are_still_the_family():
    keys = {name: shape[:2] if name.endswith("1.proj_in.weight") else shape for name, shape in public_keys(1).items()}
    keys["cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"] = (49410, 768)
    config = family_config(keys)
    assert config.text_encoder.vocab_size == 49410 and config.unet.linear_projection
    assert family_of_config(config).name == "Stable Diffusion 1.x"


def test_open_clip_with_and_without_its_unused_block_is_sd_2():
    keys = public_keys(2)
    assert family_config({name: shape for name, shape in keys.items() if ".resblocks.23." not in name}) == SD2


@pytest.mark.parametrize("name", family_configs())
def test_the_numbers_of_any_config_are_read_off_its_shapes(name):
    model = small_model(family_configs()[name])
    assert family_of_config(model.config).sizes(ldm_shapes(model)) == config_sizes(model.config)


def test_a_model_with_one_weight_missing_is_still_recognised():
    for name in (f"{UNET_PREFIX}input_blocks.4.0.in_layers.2.weight", "first_stage_model.encoder.down.1.block.0.conv1.weight"):
        keys = public_keys(1)
        del keys[name]
        assert family_config(keys) == SD1


def test_nonsense_shapes_are_an_error_and_no_crash():
    with pytest.raises(ValueError, match="no known family"):
        family_config(dict.fromkeys(public_keys(1), ()))


def test_a_model_of_no_family_says_what_was_found_and_what_to_do():
    shapes = ldm_shapes(small_model(small_config()))
    with pytest.raises(ValueError, match=r"no known family.*pass config=ModelConfig.*context width 16"):
        family_config(shapes)


def test_a_family_is_known_without_the_names_of_its_vae():
    shapes = {name: shape for name, shape in public_keys(1).items() if not name.startswith("first_stage_model.")}
    assert family_config(shapes) == SD1


# ------------------------------------------------------------------------------------------------------ a family of one's own


def toy_names(text: str, unet: str, vae: str) -> dict[str, PartNames]:
    ldm = STABLE_DIFFUSION_1.names["ldm"]
    return {
        "text_encoder": replace(ldm["text_encoder"], prefix=text, root=None, aliases=((r"^toy_text\.", text),)),
        "unet": replace(ldm["unet"], prefix=unet),
        "vae": replace(ldm["vae"], prefix=vae),
    }


TOY_CONFIG = replace(small_config("v"), unet=UNetConfig(widths=(16, 32), attention=(True, True), heads=(2, 2), context_width=16, groups=8))
TOY = replace(
    STABLE_DIFFUSION_1,
    name="a toy",
    config=replace(TOY_CONFIG, guidance_scale=3.0),
    names={"ldm": toy_names("toy.text.", "toy.unet.", "toy.vae."), "diffusers": STABLE_DIFFUSION_1.names["diffusers"]},
    marker=r"^toy\.unet\.",
    variants={4: "", 9: " with a mask"},
    ignored=((r"^toy\.clock$", "it only tells the time"),),
    extra=(r"^toy\.badge$",),
    refused=((r"^toy\.wheels\.", "a toy car"),),
)


@pytest.fixture
def toy(monkeypatch):
    plug_in(monkeypatch, TOY)
    return small_model(TOY.config)


@pytest.mark.parametrize("layout", ["ldm", "diffusers"])
def test_a_toy_family_is_saved_and_loaded_in_both_layouts(toy, layout, tmp_path):
    toy.extra_tensors["toy.badge"] = torch.ones(2)
    path = tmp_path / ("model.safetensors" if layout == "ldm" else "model")
    weights_loader.save(toy, path, layout)
    assert_same_model(weights_loader.load(path), toy)
    assert weights_loader.inspect(path).family == "a toy"


def test_a_toy_file_without_metadata_is_known_by_its_prefixes_and_shapes(toy, tmp_path):
    tensors = ldm_tensors(toy)
    assert all(name.startswith("toy.") for name in tensors) and family_of_names(tensors) is TOY
    tensors = {name.replace("toy.text.", "toy_text."): tensor for name, tensor in tensors.items()}  # an alias
    write_safetensors(tmp_path / "toy.safetensors", tensors | {"toy.clock": torch.zeros(1), "toy.badge": torch.ones(1)})
    loaded = weights_loader.load(tmp_path / "toy.safetensors", prediction="v")
    assert loaded.config == TOY.config and loaded.extra_tensors.keys() == {"toy.badge"} and loaded.notes == ()
    summary = weights_loader.inspect(tmp_path / "toy.safetensors")
    assert summary.family == "a toy" and summary.ignored == {"it only tells the time": 1} and summary.extra == 1


def test_a_toy_family_names_its_variants_and_what_it_refuses(toy, tmp_path):
    masked = replace(TOY.config, unet=replace(TOY.config.unet, in_channels=9))
    assert family_of_config(masked).name_of(masked) == "a toy with a mask"
    names = [*ldm_tensors(toy), "toy.wheels.0"]
    assert foreign(names) == "a toy car" and describe(list(ldm_tensors(toy))) == "a whole model; give it as the model (--model)"
    five = ldm_shapes(toy) | {"toy.unet.input_blocks.0.0.weight": (16, 5, 3, 3)}
    with pytest.raises(ValueError, match="a toy whose U-Net takes 5 channels, made for depth-to-image"):
        family_config(five)


def test_the_public_families_are_still_found_beside_a_toy(toy):
    for version, config in ((1, SD1), (2, SD2)):
        assert family_config(public_keys(version)) == config
