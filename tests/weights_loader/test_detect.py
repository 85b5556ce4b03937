import pytest
import torch

import weights_loader
from tests.checkpoints import ldm_tensors, public_keys
from tests.small_models import small_config, small_model
from weights_loader import detect
from weights_loader.detect import foreign, kind
from weights_loader.write import write_safetensors


@pytest.mark.parametrize(
    "name, message",
    [
        ("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight", "a LoRA"),
        ("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor.to_q_lora.up.weight", "a LoRA"),
        ("base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight", "a LoRA"),
        ("control_model.time_embed.0.weight", "a ControlNet"),
        ("controlnet_cond_embedding.conv_in.weight", "a ControlNet"),
        ("conditioner.embedders.1.model.ln_final.weight", "a text encoder alone"),
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


def test_a_hypernetwork_is_named_as_whatever_it_is_given(tmp_path):
    halves = [{f"linear.{i}.{part}": torch.zeros(4, 4) for i in (0, 1) for part in ("weight", "bias")} for _ in (0, 1)]
    web = {320: halves, 768: halves, "step": 3000, "name": "style", "layer_structure": [1, 2, 1], "activation_func": "relu"}
    torch.save(web | {"is_layer_norm": False, "sd_checkpoint": "81761151", "sd_checkpoint_name": None}, tmp_path / "style.pt")
    with pytest.raises(ValueError, match="style.pt: a hypernetwork of the web interfaces, which is not supported"):
        weights_loader.load(tmp_path / "style.pt")
    for given, reader in (("a LoRA", weights_loader.read_lora), ("an embedding", weights_loader.read_embedding)):
        with pytest.raises(ValueError, match=f"style.pt: given as {given}, but it is a hypernetwork of the web interfaces"):
            reader(tmp_path / "style.pt", small_model())


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
