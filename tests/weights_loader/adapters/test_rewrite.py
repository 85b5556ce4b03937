"""Small files in the names of other programs: the numbers, their dtype and what was said of them stay."""

import json

import pytest
import torch

import weights_loader
from minidiff.adapters.tokens import create_tokens
from tests.small_files import random_delta, random_lora
from tests.small_models import small_model
from tests.weights_loader.adapters.test_lora import assert_same
from weights_loader.adapters.lora import pack, read_lora
from weights_loader.adapters.rewrite import rewrite, small_kind
from weights_loader.read import read
from weights_loader.write import write_safetensors


@pytest.fixture(scope="module")
def sd():
    return small_model()


def test_a_lora_goes_from_either_naming_to_the_other_and_back(sd, tmp_path):
    lora = random_lora(sd, "", (4,), (4.0,))
    kohya, theirs, again = (tmp_path / name for name in ("a.safetensors", "b.safetensors", "c.safetensors"))
    weights_loader.write_lora(kohya, lora, sd, settings={"concepts": [{"token": "sks"}]})
    rewrite(kohya, theirs, "diffusers", sd)
    assert all(name.startswith(("unet.", "text_encoder.")) for name in read(theirs).tensors)
    assert "lora_adapter_metadata" in read(theirs).metadata and not any(key.startswith("ss_network") for key in read(theirs).metadata)
    rewrite(theirs, again, sd=sd)
    assert_same(read_lora(again, sd), lora)
    assert again.read_bytes() == kohya.read_bytes()  # the same metadata too


def test_a_lora_of_a_public_family_or_the_bundled_model_needs_no_model(tmp_path):
    sd = weights_loader.load("tiny")
    weights_loader.write_lora(tmp_path / "a.safetensors", random_lora(sd, r"cross_attention\.to_k", (2,), (2.0,)), sd)
    rewrite(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers")
    assert_same(read_lora(tmp_path / "b.safetensors", sd), read_lora(tmp_path / "a.safetensors", sd))
    halves = {
        f"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_{half}.weight": torch.ones(shape)
        for half, shape in (("A", (2, 768)), ("B", (1280, 2)))
    }
    write_safetensors(tmp_path / "sd1.safetensors", halves)
    rewrite(tmp_path / "sd1.safetensors", tmp_path / "web.safetensors")
    names = set(read(tmp_path / "web.safetensors").tensors)
    layer = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    assert names == {f"{layer}.lora_down.weight", f"{layer}.lora_up.weight", f"{layer}.alpha"}


def test_half_precision_stays_half_precision(sd, tmp_path):
    tensors, metadata = pack(random_lora(sd, r"attention\.to_q", (4,), (4.0,)), sd, "kohya")
    stored = {name: tensor if name.endswith("alpha") else tensor.half() for name, tensor in tensors.items()}
    write_safetensors(tmp_path / "a.safetensors", stored, metadata)
    rewrite(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "diffusers", sd)
    assert {tensor.dtype for tensor in read(tmp_path / "b.safetensors").tensors.values()} == {torch.float16}


def test_words_go_from_either_form_to_the_other(sd, tmp_path):
    tokens = create_tokens(sd, {"<it>": 2}, {"<it>": "cat"})
    weights_loader.write_embedding(tmp_path / "a.safetensors", tokens, sd=sd)
    rewrite(tmp_path / "a.safetensors", tmp_path / "it.pt", "a1111")
    rewrite(tmp_path / "it.pt", tmp_path / "web.safetensors", "a1111")
    rewrite(tmp_path / "web.safetensors", tmp_path / "again.safetensors")
    assert set(read(tmp_path / "web.safetensors").tensors) == {"emb_params"}
    found = weights_loader.read_embedding(tmp_path / "again.safetensors", sd).rows
    assert list(found) == ["<it>"] and torch.equal(found["<it>"], tokens.rows["<it>"])


def test_a_custom_diffusion_goes_to_the_form_that_the_name_asks_for(sd, tmp_path):
    delta = random_delta(sd)
    weights_loader.write_custom_diffusion(tmp_path / "a.safetensors", delta, sd)
    for name in ("folder", "delta.bin", "delta.ckpt"):
        rewrite(tmp_path / "a.safetensors", tmp_path / name, sd=sd)
        found = weights_loader.read_custom_diffusion(tmp_path / name, sd)
        assert all(torch.equal(found.layers[layer], weight) for layer, weight in delta.layers.items())
        assert small_kind(tmp_path / name) == "custom_diffusion"
    with pytest.raises(ValueError, match=r"a.safetensors: a Custom Diffusion holds whole weights .* \(--model\)"):
        rewrite(tmp_path / "a.safetensors", tmp_path / "b.bin")


def test_settings_of_a_custom_diffusion_are_passed_on_where_there_is_room(sd, tmp_path):
    settings = {"model": "base.safetensors", "concepts": [{"token": "<new1>", "class_word": "cat"}]}
    weights_loader.write_custom_diffusion(tmp_path / "a.safetensors", random_delta(sd), sd, settings)
    for name in ("b.safetensors", "c.bin"):
        rewrite(tmp_path / "a.safetensors", tmp_path / name, sd=sd)
    found = read(tmp_path / "b.safetensors").metadata
    assert json.loads(found["minidiff.settings"]) == settings and found["modelspec.title"] == "<new1> cat"


def test_checksums_of_the_source_are_not_passed_on(sd, tmp_path):
    """Tensors stand in another order afterwards, so that they would say that the new file is damaged."""
    tensors, metadata = pack(random_lora(sd, r"attention\.to_q", (4,), (4.0,)), sd, "diffusers")
    for stated in ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"):
        write_safetensors(tmp_path / "a.safetensors", tensors, metadata | {stated: "0" * 64, "ss_output_name": "a"})
        rewrite(tmp_path / "a.safetensors", tmp_path / "b.safetensors", sd=sd)
        found = read(tmp_path / "b.safetensors").metadata
        assert stated not in found and found["ss_output_name"] == "a"


def test_what_has_no_place_is_refused_and_nothing_is_written(sd, tmp_path):
    weights_loader.write_lora(tmp_path / "a.safetensors", random_lora(sd), sd)
    weights_loader.save(sd, tmp_path / "model.safetensors")
    for source, target, names, said in (
        ("a.safetensors", "b.safetensors", "a1111", "names 'a1111': a file of this kind .lora. has kohya or diffusers"),
        ("a.safetensors", "b.safetensors", "diffusers", "take the names 'kohya', or an alpha that is the rank"),
        ("a.safetensors", "b.pt", None, "a LoRA is written as .safetensors; name it b.safetensors"),
        ("model.safetensors", "b.safetensors", None, "model.safetensors: no LoRA, learned words or Custom Diffusion"),
    ):
        with pytest.raises(ValueError, match=said):
            rewrite(tmp_path / source, tmp_path / target, names, sd)
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "model.safetensors"}
    with pytest.raises(ValueError, match="nor does it fit another model that is known here; give its own with --model"):
        rewrite(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "kohya")
    assert small_kind(tmp_path / "model.safetensors") is None
