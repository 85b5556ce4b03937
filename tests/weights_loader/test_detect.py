import dataclasses

import pytest
import torch

import weights_loader
from minidiff.config import SD1, SD2
from minidiff.schedule import NoiseSchedule
from minidiff.unet import UNet
from tests.checkpoints import family_configs, ldm_tensors, public_keys
from tests.small_models import small_config, small_model
from weights_loader import detect
from weights_loader.detect import UNET_PREFIX, config_sizes, family, family_config, family_name, foreign, kind, noise_correlation, sizes
from weights_loader.dialects import file_shapes
from weights_loader.write import write_safetensors

# --------------------------------------------------------------------------------------------------- names and shapes


@pytest.mark.parametrize("version, config, name", [(1, SD1, "Stable Diffusion 1.x"), (2, SD2, "Stable Diffusion 2.x")])
def test_the_public_models_are_recognised_by_their_shapes(version, config, name):
    keys = public_keys(version)
    assert foreign(list(keys)) is None
    assert family_config(keys) == config
    assert family_name(config) == name


@pytest.mark.parametrize("version", [1, 2])
def test_inpainting_is_recognised_by_nine_input_channels(version):
    keys = public_keys(version) | {f"{UNET_PREFIX}input_blocks.0.0.weight": (320, 9, 3, 3)}
    assert family_config(keys).unet.in_channels == 9
    assert family_name(family_config(keys)) == f"Stable Diffusion {version}.x inpainting"


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
    assert family(config_sizes(config)) == "Stable Diffusion 1.x"


def test_open_clip_with_and_without_its_unused_block_is_sd_2():
    keys = public_keys(2)
    assert family_config({name: shape for name, shape in keys.items() if ".resblocks.23." not in name}) == SD2


@pytest.mark.parametrize("name", family_configs())
def test_the_numbers_of_any_config_are_read_off_its_shapes(name):
    model = small_model(family_configs()[name])
    shapes = file_shapes(model.text_encoder, "ldm") | file_shapes(model.unet, "ldm") | file_shapes(model.vae, "ldm")
    assert sizes(shapes) == config_sizes(model.config)


def test_a_model_with_one_weight_missing_is_still_recognised():
    for name in (f"{UNET_PREFIX}input_blocks.4.0.in_layers.2.weight", "first_stage_model.encoder.down.1.block.0.conv1.weight"):
        keys = public_keys(1)
        del keys[name]
        assert family_config(keys) == SD1


def test_nonsense_shapes_are_an_error_and_no_crash():
    with pytest.raises(ValueError, match="no known family"):
        family_config(dict.fromkeys(public_keys(1), ()))


def test_a_model_of_no_family_says_what_was_found_and_what_to_do():
    model = small_model(small_config())
    shapes = file_shapes(model.text_encoder, "ldm") | file_shapes(model.unet, "ldm") | file_shapes(model.vae, "ldm")
    with pytest.raises(ValueError, match=r"no known family.*pass config=ModelConfig.*context width 16"):
        family_config(shapes)


@pytest.mark.parametrize(
    "name, message",
    [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight", "a LoRA"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight", "a LoRA"),
        ("base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight", "a LoRA"),
        ("control_model.time_embed.0.weight", "a ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
        ("conditioner.embedders.1.model.ln_final.weight", "a Stable Diffusion XL"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "a diffusion transformer"),
        ("string_to_param.*", "a Textual Inversion"),
        ("<my-cat>", "a Textual Inversion"),
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn2.processor.to_k_custom_diffusion.weight", "a Custom Diffusion"),
        ("down_blocks.0.resnets.0.conv1.weight", "the U-Net of a diffusers model alone"),
        ("encoder.mid_block.resnets.0.conv1.weight", "a VAE alone.*vae=FILE"),
        ("first_stage_model.encoder.mid.block_1.conv1.weight", "a VAE alone.*vae=FILE"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "a text encoder alone"),
        ("unet.down_blocks.0.resnets.0.conv1.weight", "a whole model in diffusers names"),
    ],
)
def test_a_file_that_is_something_else_is_named(name, message, tmp_path):
    write_safetensors(tmp_path / "file.safetensors", {name: torch.zeros(1)} | {f"{name}.{i}": torch.zeros(1) for i in range(5)})
    with pytest.raises(ValueError, match=f"file.safetensors: {message}"):
        weights_loader.load(tmp_path / "file.safetensors")


@pytest.mark.parametrize("stray", ["lora_unet_mid_block_attentions_0_proj_in.alpha", "<cat>", "emb_params", "modifier_token.<new1>"])
def test_a_whole_model_with_a_stray_name_of_a_small_file_is_still_a_model(stray, tmp_path):
    assert kind([*public_keys(1), stray]) is None and foreign([*public_keys(1), stray]) is None
    write_safetensors(tmp_path / "model.safetensors", ldm_tensors(small_model()) | {stray: torch.zeros(1)})
    with pytest.raises(ValueError, match=rf"0 keys missing, 1 unexpected[\s\S]*unexpected {stray}[\s\S]*something else was saved beside"):
        weights_loader.load(tmp_path / "model.safetensors", config=small_config())


def test_cross_attention_alone_is_a_custom_diffusion_by_the_original_code():
    names = [name for name in public_keys(1) if "attn2.to_k" in name or "attn2.to_v" in name]
    assert len(names) == 32 and kind(names) == kind([*names, "embed"]) == "custom_diffusion"
    assert "a Custom Diffusion file" in foreign(names) and foreign([*names, "model.diffusion_model.out.0.weight"]) is None


def test_what_a_file_is_is_said_to_whoever_gave_it_as_something_else():
    assert detect.describe(list(public_keys(2))) == "a whole model; give it as the model (--model)"
    assert detect.describe(["encoder.mid_block.resnets.0.conv1.weight"] * 4).startswith("a VAE alone")
    assert detect.describe(list("abcdef")) == "of no known kind; its first tensor is 'a'"


def test_a_handful_of_tensors_is_no_model(tmp_path):
    torch.save({"cat": torch.zeros(768)}, tmp_path / "cat.bin")
    with pytest.raises(ValueError, match="a file of 1 tensors, the first 'cat': perhaps an embedding"):
        weights_loader.load(tmp_path / "cat.bin")


# ------------------------------------------------------------------------------------------------------------ eps or v


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
    assert noise_correlation(v_model.unet, v_model.text_encoder, v_model.tokenizer, 1000) < 0.3
    assert noise_correlation(twin, v_model.text_encoder, v_model.tokenizer, 1000) > 0.9


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_a_file_that_does_not_say_its_prediction_is_decided_by_its_weights(prediction, v_model, tmp_path, monkeypatch):
    sd = v_model if prediction == "v" else trained("eps")
    monkeypatch.setitem(detect.FAMILIES, "Stable Diffusion 2.x", family_configs()["SD 2"])
    write_safetensors(tmp_path / "model.safetensors", {name: tensor.half() for name, tensor in ldm_tensors(sd).items()})
    loaded = weights_loader.load(tmp_path / "model.safetensors")
    assert loaded.schedule.config.prediction == prediction
    assert loaded.notes[0].startswith(f"predicts {prediction}: decided by a numerical test")


def test_an_inpainting_model_is_asked_with_everything_masked():
    sd = small_model(family_configs()["SD 2 inpainting"])
    seen = []
    sd.unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert -1 <= noise_correlation(sd.unet, sd.text_encoder, sd.tokenizer, 1000) <= 1
    assert seen[0].shape == (1, 9, 16, 16) and (seen[0][:, 4] == 1).all() and (seen[0][:, 5:] == 0).all()


def test_a_family_is_known_without_the_names_of_its_vae():
    shapes = {name: shape for name, shape in public_keys(1).items() if not name.startswith("first_stage_model.")}
    assert family_config(shapes) == SD1
