import json

import pytest
import torch
from diffusers import StableDiffusionPipeline

import weights_loader
from minidiff.adapters.tokens import NewTokens
from tests.checkpoints import family_model, ldm_tensors
from tests.parity.check import largest_error
from weights_loader.adapters.embedding import parse_named, read_embedding, write_embedding
from weights_loader.read import read
from weights_loader.write import write_safetensors

FILES = [("diffusers", "cat.safetensors"), ("diffusers", "cat.bin"), ("a1111", "cat.safetensors"), ("a1111", "cat.pt")]


@pytest.fixture(scope="module")
def sd():
    return family_model("SD 1")


def vectors(n=2, width=16, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def assert_rows(tokens, rows):
    assert tuple(tokens.names) == tuple(rows)
    for name in rows:
        assert tokens.rows[name].dtype == torch.float32 and torch.equal(tokens.rows[name], rows[name])


@pytest.mark.parametrize("form, name", FILES)
@pytest.mark.parametrize("n", [1, 3])
def test_a_word_is_read_back_bit_for_bit(n, form, name, sd, tmp_path):
    write_embedding(tmp_path / name, NewTokens({"<cat>": vectors(n)}), form)
    assert_rows(read_embedding(tmp_path / name, sd), {"<cat>": vectors(n)})


def test_several_words_are_read_back_from_one_file(sd, tmp_path):
    rows = {"<a>": vectors(1), "<b>": vectors(3, seed=1)}
    write_embedding(tmp_path / "x.safetensors", NewTokens(rows), settings={"steps": 3})
    assert_rows(read_embedding(tmp_path / "x.safetensors", sd), rows)
    assert json.loads(read(tmp_path / "x.safetensors").metadata["minidiff.settings"]) == {"steps": 3}


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("form, name", [("diffusers", "cat.safetensors"), ("diffusers", "cat.bin"), ("a1111", "cat.pt")])
def test_diffusers_gives_the_same_with_our_file(form, name, n, sd, tmp_path):
    weights_loader.save(sd, tmp_path / "model", layout="diffusers")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    tokens = NewTokens({"<cat>": 3 * vectors(n)})
    write_embedding(tmp_path / name, tokens, form)
    pipe.load_textual_inversion(tmp_path / name)
    prompt = pipe.maybe_convert_prompt("a red <cat> on a beach", pipe.tokenizer)  # several vectors are several words there
    ids = pipe.tokenizer(prompt, padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt").input_ids
    without = sd.encode_prompts(["a red cat on a beach"])
    tokens.attach(sd)
    try:
        ours = sd.encode_prompts(["a red <cat> on a beach"])
    finally:
        tokens.detach()
    assert (ours - without).abs().max() > 0.5
    with torch.no_grad():
        largest_error(ours, pipe.text_encoder(ids)[0])


def test_files_as_other_programs_write_them_are_read(sd, tmp_path):
    torch.save({"<cat>": vectors(1)[0].half()}, tmp_path / "learned_embeds.bin")  # diffusers' first ones: a single vector, not a row
    assert_rows(read_embedding(tmp_path / "learned_embeds.bin", sd), {"<cat>": vectors(1).half().float()})
    a1111 = {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": {"*": torch.nn.Parameter(vectors())},
        "name": "corgi",
        "step": 500,
        "sd_checkpoint": "81761151",
        "sd_checkpoint_name": "v1-5",
    }
    torch.save(a1111, tmp_path / "other.pt")
    assert_rows(read_embedding(tmp_path / "other.pt", sd), {"corgi": vectors()})
    torch.save({key: a1111[key] for key in ("string_to_token", "string_to_param")}, tmp_path / "nameless.pt")
    write_safetensors(tmp_path / "from kohya.safetensors", {"emb_params": vectors()})
    for name in ("nameless.pt", "from kohya.safetensors"):
        assert_rows(read_embedding(tmp_path / name, sd), {name.split(".")[0]: vectors()})


def test_a_word_can_be_given_another_name(sd, tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"emb_params": vectors()})
    assert_rows(read_embedding(tmp_path / "x.safetensors", sd, "<dog>"), {"<dog>": vectors()})
    write_safetensors(tmp_path / "two.safetensors", {"<a>": vectors(), "<b>": vectors()})
    with pytest.raises(ValueError, match="2 words in it .<a>, <b>.; a name can be given to a single one"):
        read_embedding(tmp_path / "two.safetensors", sd, "<dog>")


def test_another_width_names_both_and_the_likely_model(sd, tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"<cat>": vectors(1, 1024)})
    with pytest.raises(
        ValueError,
        match=r"x.safetensors: .*'<cat>' is made for Stable Diffusion 2.x \(context of width 1024\), and this model is a .* \(of width 16\)",
    ):
        read_embedding(tmp_path / "x.safetensors", sd)


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"clip_l": vectors(1, 768), "clip_g": vectors(1, 1280)}, ".* is made for Stable Diffusion XL .context of width 2048."),
        ({"clip_g": vectors(1, 1280)}, "an embedding for Stable Diffusion XL has clip_l and clip_g; this one has clip_g"),
        ({"clip_l": vectors(1, 768), "clip_g": vectors(2, 1280)}, "1 vectors in clip_l and 2 in clip_g"),
        ({"emb_params": vectors(), "bias": vectors()}, "beside emb_params it holds bias; expected one word alone"),
        ({"<cat>": torch.zeros(2, 16, 1)}, r"'<cat>' is torch.float32 of shape \(2, 16, 1\); expected vectors"),
        ({"<cat>": torch.zeros(2, 16, dtype=torch.int64)}, r"'<cat>' is torch.int64 of shape \(2, 16\); expected vectors"),
        ({"emb_params": torch.zeros(0, 16)}, r"'emb_params' is torch.float32 of shape \(0, 16\); expected vectors"),
        ({f"encoder.mid.block_1.conv{i}.weight": torch.zeros(2, 16) for i in range(4)}, "given as an embedding, but it is a VAE alone"),
        ({"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": vectors()}, "given as an embedding, but it is a LoRA.*--lora"),
    ],
)
def test_what_is_no_embedding_is_named(tensors, message, sd, tmp_path):
    write_safetensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(ValueError, match=f"x.safetensors: {message}"):
        read_embedding(tmp_path / "x.safetensors", sd)


def test_a_whole_model_given_as_an_embedding_is_named(sd, tmp_path):
    write_safetensors(tmp_path / "model.safetensors", ldm_tensors(sd))
    with pytest.raises(ValueError, match="given as an embedding, but it is a whole model; give it as the model"):
        read_embedding(tmp_path / "model.safetensors", sd)


def test_writing_says_what_it_cannot(tmp_path):
    one, two = NewTokens({"<a>": vectors()}), NewTokens({"<a>": vectors(), "<b>": vectors()})
    with pytest.raises(ValueError, match="form 'kohya' unknown; choose diffusers, a1111"):
        write_embedding(tmp_path / "x.safetensors", one, "kohya")
    with pytest.raises(ValueError, match="for diffusers is written as .safetensors or .bin"):
        write_embedding(tmp_path / "x.pt", one)
    with pytest.raises(ValueError, match="2 words .<a>, <b>., and a file of a1111 holds one"):
        write_embedding(tmp_path / "x.pt", two, "a1111")
    with pytest.raises(ValueError, match="x.bin: settings are kept in .safetensors only"):
        write_embedding(tmp_path / "x.bin", one, settings={"steps": 3})
    assert not list(tmp_path.iterdir())


def test_the_pickle_of_the_authors_of_textual_inversion_is_read(sd, tmp_path):
    saved = {
        "string_to_token": {"*": torch.tensor(265)},
        "string_to_param": torch.nn.ParameterDict({"*": torch.nn.Parameter(vectors(2))}),
    }
    torch.save(saved, tmp_path / "my cat.pt")
    assert_rows(read_embedding(tmp_path / "my cat.pt", sd), {"my cat": vectors(2)})
    assert_rows(read_embedding(tmp_path / "my cat.pt", sd, "<cat>"), {"<cat>": vectors(2)})


@pytest.mark.parametrize(
    "text, expected",
    [
        ("cat.pt", ("cat.pt", None)),
        ("cat.pt:<cat>", ("cat.pt", "<cat>")),
        ("a/b.SAFETENSORS:my:cat", ("a/b.SAFETENSORS", "my:cat")),
        (r"C:\\words\\cat.bin", (r"C:\\words\\cat.bin", None)),
        (r"C:\\words\\cat.bin:<cat>", (r"C:\\words\\cat.bin", "<cat>")),
        ("folder:<cat>", ("folder:<cat>", None)),  # nothing of that name is there
    ],
)
def test_a_word_stands_behind_the_file(text, expected):
    assert parse_named(text) == expected


def test_files_whose_names_have_a_colon_are_those_files(tmp_path):
    (tmp_path / "cat.pt:x").touch()
    (tmp_path / "noending").touch()
    assert parse_named(str(tmp_path / "cat.pt:x")) == (str(tmp_path / "cat.pt:x"), None)
    assert parse_named(f"{tmp_path}/noending:<cat>") == (f"{tmp_path}/noending", "<cat>")


@pytest.mark.parametrize("word", ["*", "cat"])
def test_a_word_that_cannot_be_added_is_given_another_one(word, sd, tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {word: vectors(1)})
    with pytest.raises(ValueError, match=r"x.safetensors: placeholder .* .--embedding FILE:WORD. gives it another word"):
        weights_loader.attach(sd, embeddings=tmp_path / "x.safetensors")
    weights_loader.attach(sd, embeddings=[(tmp_path / "x.safetensors", "<other>")])
    try:
        assert sd.notes[-1] == f"{tmp_path / 'x.safetensors'} adds the word <other> (1 vector)"
    finally:
        sd.attached[-1].detach()
