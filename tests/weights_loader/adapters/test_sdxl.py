"""LoRAs and learned words for Stable Diffusion XL: both text encoders, in and out, against diffusers, and on the wrong model."""

import re
from dataclasses import replace

import pytest
import torch

import weights_loader
from minidiff.adapters.tokens import NewTokens, create_tokens
from minidiff.pipeline import noise_source
from tests.checkpoints import plug_in
from tests.parity.check import NotEqual, largest_error
from tests.parity.models import SDXL, pipelines
from tests.small_files import random_lora
from tests.small_models import small_model, xl_config
from weights_loader.adapters.embedding import read_embedding, write_embedding
from weights_loader.adapters.kohya import KOHYA
from weights_loader.adapters.lora import layer_locations, read_lora, write_lora
from weights_loader.families.stable_diffusion_xl import STABLE_DIFFUSION_XL
from weights_loader.read import read
from weights_loader.write import write_safetensors

PROMPT, SIZE = "a red <cat> on a beach", (128, 128)


@pytest.fixture(scope="module")
def sd():
    return small_model(xl_config())


@pytest.fixture(scope="module")
def pair():
    """Our pipeline and diffusers' with the same weights."""
    return pipelines(SDXL, torch.float32)


def pictures(ours, theirs, prompt=PROMPT, **more):
    """The latents of both after two steps, at unit size."""
    *_, step = ours.denoise(prompt, steps=2, guidance_scale=3.0, seeds=[0], size=SIZE)
    x = noise_source([0], (4, 16, 16), torch.device("cpu"))()
    settings = dict(num_inference_steps=2, guidance_scale=3.0, width=128, height=128, latents=x, output_type="latent")
    latent = theirs(prompt, **settings, **more).images
    return step.x_t / latent.std(), latent / latent.std()


# ------------------------------------------------------------------------------------------------------------- LoRA


# By names: diffusers' have no place for an alpha that most of its readers look for.
OF_ALPHA_AND_RANK = {"diffusers": {"ranks": (2,), "alphas": (2.0,)}, "kohya": {}}


@pytest.mark.parametrize("names", ["diffusers", "kohya"])
def test_a_lora_of_all_layers_is_written_and_read_back(names, sd, tmp_path):
    lora = random_lora(sd, **OF_ALPHA_AND_RANK[names])
    write_lora(tmp_path / "x.safetensors", lora, sd, names)
    again = read_lora(tmp_path / "x.safetensors", sd)
    assert again.layers.keys() == lora.layers.keys()
    assert {name.split(".")[0] for name in lora.layers} == {"unet", "text_encoder", "text_encoder_2"}
    for name, one in again.layers.items():
        assert torch.equal(one.delta(), lora.layers[name].delta()) and one.alpha == lora.layers[name].alpha


def test_kohyas_names_with_diffusers_numbers_are_read_too(sd, tmp_path):
    lora = random_lora(sd, "^unet")
    locations = layer_locations(sd, KOHYA)
    tensors, metadata = KOHYA.pack({locations[name]: change for name, change in lora.layers.items()}, sd)
    assert "lora_unet_down_blocks_2_attentions_0_transformer_blocks_1_attn2_to_k.lora_down.weight" in tensors
    write_safetensors(tmp_path / "x.safetensors", tensors, metadata)
    again = read_lora(tmp_path / "x.safetensors", sd)
    assert all(torch.equal(one.delta(), lora.layers[name].delta()) for name, one in again.layers.items()) and len(again.layers) > 50


def test_layers_have_the_names_that_other_programs_look_for(sd, tmp_path):
    keys = {}
    for names in ("diffusers", "kohya"):
        write_lora(tmp_path / f"{names}.safetensors", random_lora(sd, **OF_ALPHA_AND_RANK[names]), sd, names)
        keys[names] = set(read(tmp_path / f"{names}.safetensors").tensors)
    assert {
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight",
        "lora_te2_text_model_encoder_layers_2_mlp_fc1.lora_up.weight",
        "lora_te2_text_projection.alpha",
        "lora_unet_input_blocks_5_1_transformer_blocks_1_attn2_to_k.lora_down.weight",
        "lora_unet_label_emb_0_0.lora_up.weight",
    } <= keys["kohya"]
    assert not any(name.startswith("lora_te_") for name in keys["kohya"])
    assert {
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "text_encoder_2.text_model.encoder.layers.2.mlp.fc1.lora_B.weight",
    } <= keys["diffusers"]


@pytest.mark.parametrize("names", ["diffusers", "kohya"])
def test_diffusers_draws_the_same_with_our_lora(names, pair, tmp_path):
    ours, theirs = pair
    before, _ = pictures(ours, theirs)
    lora = random_lora(ours, r"attention\.to_|linear_|proj_in|proj_out", (4,), (4.0,) if names == "diffusers" else (1.0,))
    if names == "diffusers":  # the same change by other factors: a stronger one would make the rounding of both models larger
        for one in lora.layers.values():
            one.up.weight.data.mul_(1 / 4)
    write_lora(tmp_path / "x.safetensors", lora, ours, names)
    lora.attach(ours)
    theirs.load_lora_weights(tmp_path, weight_name="x.safetensors")
    try:
        mine, reference = pictures(ours, theirs)
        assert (mine - before).abs().max() > 0.3, "a LoRA that changes little would be near anything"
        largest_error(mine, reference)
    finally:
        lora.detach()
        theirs.unload_lora_weights()


def test_a_lora_for_one_model_on_the_other_is_one_line_that_names_both(sd, tmp_path, monkeypatch):
    plug_in(monkeypatch, replace(STABLE_DIFFUSION_XL, config=sd.config))
    small = small_model()
    write_lora(tmp_path / "sd.safetensors", random_lora(small, "^unet"), small, "kohya")
    write_lora(tmp_path / "xl.safetensors", random_lora(sd), sd, "kohya")
    with pytest.raises(ValueError) as error:
        read_lora(tmp_path / "sd.safetensors", sd)
    last = str(error.value).splitlines()[-1]
    assert re.search(
        r"likely cause: made for another model \(context of width 16\), and this model is Stable Diffusion XL \(of width 40\)", last
    )
    with pytest.raises(ValueError) as error:
        read_lora(tmp_path / "xl.safetensors", small)
    assert "and this model is a Stable Diffusion of its own size" in str(error.value).splitlines()[-1]
    write_lora(tmp_path / "te2.safetensors", random_lora(sd, "^text_encoder_2"), sd, "kohya")
    with pytest.raises(ValueError) as error:
        read_lora(tmp_path / "te2.safetensors", small)
    assert str(error.value).splitlines()[-1] == (
        "  likely cause: made for Stable Diffusion XL, and this model is a Stable Diffusion of its own size (of width 16)"
    )


def test_a_summary_counts_the_layers_of_each_encoder(sd, tmp_path):
    write_lora(tmp_path / "x.safetensors", random_lora(sd, r"attention\.to_q"), sd, "kohya")
    summary = weights_loader.inspect(tmp_path / "x.safetensors")
    assert summary.parts["text encoder"] == summary.parts["text encoder 2"] == 3 and summary.parts["unet"] > 0


# ------------------------------------------------------------------------------------------------------------ words


def rows(n=2, width=16 + 24, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def test_a_word_for_both_encoders_is_written_and_read_back(sd, tmp_path):
    write_embedding(tmp_path / "x.safetensors", NewTokens({"<cat>": rows()}), widths=(16, 24), settings={"steps": 3})
    assert {name: tuple(t.shape) for name, t in read(tmp_path / "x.safetensors").tensors.items()} == {"clip_l": (2, 16), "clip_g": (2, 24)}
    read_back = read_embedding(tmp_path / "x.safetensors", sd)
    assert torch.equal(read_back.rows["<cat>"], rows())
    named = read_embedding(tmp_path / "x.safetensors", sd, "<dog>")
    assert list(named.rows) == ["<dog>"]


def test_without_a_name_the_word_is_the_files(sd, tmp_path):
    write_safetensors(tmp_path / "corgi.safetensors", {"clip_g": rows(width=24), "clip_l": rows(width=16)})
    assert torch.equal(read_embedding(tmp_path / "corgi.safetensors", sd).rows["corgi"], torch.cat([rows(width=16), rows(width=24)], dim=1))


def test_two_words_need_two_files_and_a_safe_one(tmp_path):
    with pytest.raises(ValueError, match="a file of SDXL holds one"):
        write_embedding(tmp_path / "x.safetensors", NewTokens({"<a>": rows(), "<b>": rows()}), widths=(16, 24))
    with pytest.raises(ValueError, match="for two text encoders is written as .safetensors"):
        write_embedding(tmp_path / "x.bin", NewTokens({"<a>": rows()}), widths=(16, 24))


def test_a_word_for_one_model_on_the_other_names_both(sd, tmp_path):
    write_safetensors(tmp_path / "one.safetensors", {"<cat>": rows(width=16)})
    with pytest.raises(ValueError, match="'<cat>' is made for another model .context of width 16., and this model is .* .of width 40."):
        read_embedding(tmp_path / "one.safetensors", sd)
    write_safetensors(tmp_path / "two.safetensors", {"clip_l": rows(width=768), "clip_g": rows(width=1280)})
    with pytest.raises(
        ValueError, match="'two' is made for Stable Diffusion XL .context of width 2048., and this model is .* .of width 16."
    ):
        read_embedding(tmp_path / "two.safetensors", small_model())


def test_a_start_word_gives_each_encoder_its_own_row(sd):
    word = create_tokens(sd, {"<cat>": 2}, {"<cat>": "a"}).rows["<cat>"]
    tables = [encoder.token_embedding.weight for encoder in sd.text.encoders.values()]
    (of,) = sd.tokenizer.encode("a")
    assert torch.equal(word, torch.cat([table[of] for table in tables]).expand(2, -1))
    drawn = create_tokens(sd, {"<cat>": 2}, generator=torch.Generator().manual_seed(0)).rows["<cat>"]
    noise = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.cat([getattr(table, name)(dim=0) for table in tables]) for name in ("mean", "std"))
    assert torch.equal(drawn, mean + std * noise)


def test_words_change_both_contexts_and_leave_no_trace(sd):
    before, plain = sd.text([PROMPT], SIZE), {name: p.clone() for part in sd.parts.values() for name, p in part.named_parameters()}
    tokens = NewTokens({"<cat>": rows()})
    tokens.attach(sd)
    try:
        after = sd.text([PROMPT], SIZE)
        for columns in (slice(0, 16), slice(16, 40)):
            assert (after.context[..., columns] - before.context[..., columns]).abs().max() > 0.1
        assert (after.pooled - before.pooled).abs().max() > 0.01
        ids = [tokenizer.encode("<cat>") for tokenizer in sd.text.tokenizers.values()]
        assert ids[0] == ids[1] and min(ids[0]) >= sd.config.text_encoder.vocab_size
    finally:
        tokens.detach()
    assert torch.equal(sd.text([PROMPT], SIZE).context, before.context) and plain


def test_two_learned_words_draw_as_in_diffusers(pair):
    """The end token is the first one: a learned word has a higher id, so that the highest would be the wrong place."""
    ours, theirs = pair
    words = {"<cat>": rows(2, 24 + 40), "<beach>": rows(1, 24 + 40, seed=1)}
    tokens = NewTokens(words)
    tables = {}
    prompt = "a red <cat> on a <beach>, oil painting"
    for name, vectors in words.items():
        for which, (tokenizer, encoder, columns) in enumerate(
            ((theirs.tokenizer, theirs.text_encoder, slice(0, 24)), (theirs.tokenizer_2, theirs.text_encoder_2, slice(24, 64)))
        ):
            tables.setdefault(which, encoder.get_input_embeddings().weight)
            theirs.load_textual_inversion({name: vectors[:, columns].clone()}, token=name, text_encoder=encoder, tokenizer=tokenizer)
    tokens.attach(ours)
    try:
        given = theirs.maybe_convert_prompt(prompt, theirs.tokenizer)
        assert given != prompt, "diffusers writes a word of two vectors as two words"
        encoded = ours.text([prompt], SIZE)
        context, _, pooled, _ = theirs.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        largest_error(encoded.context, context)
        largest_error(encoded.pooled, pooled)
        tokens_2, second = ours.text.tokens("text_encoder_2", [prompt]), ours.text.encoders["text_encoder_2"]
        with pytest.raises(NotEqual):  # as the original would
            largest_error(second.pool(second(tokens_2), tokens_2.argmax(dim=1)), pooled)
        largest_error(*pictures(ours, theirs, prompt))
    finally:
        tokens.detach()
