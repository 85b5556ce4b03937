import json
from dataclasses import replace

import pytest
import torch
from diffusers import StableDiffusionPipeline

import weights_loader
from minidiff.adapters.custom_diffusion import CustomDiffusion
from minidiff.adapters.tokens import NewTokens
from tests.checkpoints import family_model, ldm_tensors
from tests.parity.check import largest_error
from tests.small_files import ALL, KEYS_AND_VALUES, compressed, random_delta, weight_of
from tests.small_models import small_model
from weights_loader.adapters.custom_diffusion import read_custom_diffusion, write_custom_diffusion
from weights_loader.families import part_names
from weights_loader.name_table import name_table
from weights_loader.read import read
from weights_loader.write import write_safetensors

FILES = ("x.safetensors", "x.bin", "x.ckpt", "folder")


@pytest.fixture(scope="module", params=["SD 1", "SD 2"])
def sd(request):
    return family_model(request.param)


def assert_same(a, b):
    rows = [delta.tokens.rows if delta.tokens else {} for delta in (a, b)]
    for x, y in ((a.layers, b.layers), (a.biases, b.biases), rows):
        assert x.keys() == y.keys() and all(torch.equal(x[name], y[name]) for name in y)


# ----------------------------------------------------------------------------------------------- there and back again


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("pattern", [KEYS_AND_VALUES, ALL], ids=["keys and values", "all of cross-attention"])
def test_weights_and_words_are_read_back_bit_for_bit(pattern, name, sd, tmp_path):
    delta = random_delta(sd, pattern)
    assert bool(delta.biases) == (pattern == ALL)
    write_custom_diffusion(tmp_path / name, delta, sd)
    assert_same(read_custom_diffusion(tmp_path / name, sd), delta)


@pytest.mark.parametrize("name", ["x.safetensors", "folder"])
def test_words_of_several_vectors_and_settings_are_kept(name, sd, tmp_path):
    delta = random_delta(sd, words=3)
    write_custom_diffusion(tmp_path / name, delta, sd, {"steps": 250, "concepts": ["cat", "Hündchen"]})
    assert_same(read_custom_diffusion(tmp_path / name, sd), delta)
    file = tmp_path / name if name != "folder" else tmp_path / name / "pytorch_custom_diffusion_weights.safetensors"
    assert json.loads(read(file).metadata["minidiff.settings"])["concepts"] == ["cat", "Hündchen"]


@pytest.mark.parametrize("name", FILES)
def test_without_words_it_is_read_back_too(name, sd, tmp_path):
    write_custom_diffusion(tmp_path / name, random_delta(sd, words=0), sd)
    delta = read_custom_diffusion(tmp_path / name, sd)
    assert_same(delta, random_delta(sd, words=0))
    assert delta.tokens is None


@pytest.mark.parametrize("name", FILES[:3])
@pytest.mark.parametrize("pattern", [KEYS_AND_VALUES, ALL], ids=["keys and values", "all of cross-attention"])
def test_compressed_changes_are_added_to_the_base(pattern, name, sd, tmp_path):
    delta = random_delta(sd, pattern)
    small = compressed(delta, sd)
    write_custom_diffusion(tmp_path / name, delta, sd, compressed=small)
    back = read_custom_diffusion(tmp_path / name, sd)
    for layer, (u, v) in small.layers.items():
        assert torch.equal(back.layers[layer], weight_of(sd, layer) + u @ v)
    assert_same(CustomDiffusion(delta.layers, back.tokens, back.biases), delta)


# ------------------------------------------------------------------------------------- as the other programs have them


@pytest.mark.parametrize("pattern", [KEYS_AND_VALUES, ALL], ids=["keys and values", "all of cross-attention"])
def test_diffusers_gives_the_same_with_our_folder(pattern, sd, tmp_path):
    weights_loader.save(sd, tmp_path / "model", layout="diffusers")
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "model")
    delta = random_delta(sd, pattern)
    write_custom_diffusion(tmp_path / "folder", delta, sd)
    # Without _pipeline, diffusers 0.42 reads the file and sets nothing.
    pipe.unet.load_attn_procs(tmp_path / "folder", weight_name="pytorch_custom_diffusion_weights.safetensors", _pipeline=pipe)
    pipe.load_textual_inversion(tmp_path / "folder" / "<new1>.safetensors")
    ids = pipe.tokenizer("a <new1> cat", padding="max_length", max_length=pipe.tokenizer.model_max_length, return_tensors="pt").input_ids
    x, t = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([500])
    with torch.no_grad():
        before = sd.unet(x, t, sd.encode_prompts(["a <new1> cat"]))
        theirs = pipe.unet(x, t, pipe.text_encoder(ids)[0]).sample
        delta.attach(sd)
        try:
            ours = sd.unet(x, t, sd.encode_prompts(["a <new1> cat"]))
        finally:
            delta.detach()
    assert (ours - before).abs().max() > 0.3
    largest_error(ours, theirs)


def theirs(sd, layout, delta):
    places = name_table(sd.unet, part_names(sd.config, "unet", layout))
    return {places[f"{name.removeprefix('unet.')}.weight"].name: weight.detach() for name, weight in delta.layers.items()}


def test_the_original_reads_and_writes_the_same_dictionaries(sd, tmp_path):
    delta = random_delta(sd)
    rows = {word: row.detach() for word, row in delta.tokens.rows.items()}
    for name, tree in {
        "delta.bin": {"unet": theirs(sd, "diffusers", delta), "modifier_token": {word: row[0] for word, row in rows.items()}},
        "delta.ckpt": {"state_dict": {**theirs(sd, "ldm", delta), "embed": torch.cat(list(rows.values()))}},
    }.items():
        torch.save(tree, tmp_path / name)
        assert_same(read_custom_diffusion(tmp_path / name, sd), delta)
        write_custom_diffusion(tmp_path / f"ours.{name}", delta, sd)
        assert_equal_trees(torch.load(tmp_path / f"ours.{name}", weights_only=True), tree)
    assert "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight" in tree["state_dict"]


def assert_equal_trees(a, b):
    if isinstance(b, dict):
        assert a.keys() == b.keys()
        for key in b:
            assert_equal_trees(a[key], b[key])
    else:
        assert torch.equal(a, b)


def test_words_without_names_can_be_named(sd, tmp_path):
    write_custom_diffusion(tmp_path / "x.ckpt", random_delta(sd), sd)
    assert read_custom_diffusion(tmp_path / "x.ckpt", sd, ("<cat>", "<dog>")).tokens.names == ("<cat>", "<dog>")
    with pytest.raises(ValueError, match=r"2 vectors in it, and 1 names given for them \(<cat>\)"):
        read_custom_diffusion(tmp_path / "x.ckpt", sd, ("<cat>",))
    write_custom_diffusion(tmp_path / "folder", random_delta(sd), sd)
    with pytest.raises(ValueError, match=r"names are given \(<cat>\), and the file has no words without a name"):
        read_custom_diffusion(tmp_path / "folder", sd, ("<cat>",))


def test_a_folder_that_diffusers_saved_as_pickles_is_read(sd, tmp_path):
    delta, tensors = random_delta(sd), {}
    for name, weight in theirs(sd, "diffusers", delta).items():
        attention, layer, _ = name.rsplit(".", 2)
        tensors[f"{attention}.processor.{layer}_custom_diffusion.weight"] = weight
        tensors[f"{attention.replace('attn2', 'attn1')}.processor"] = {}
    torch.save(tensors, tmp_path / "pytorch_custom_diffusion_weights.bin")
    for word, rows in delta.tokens.rows.items():
        torch.save({word: rows.detach()[0]}, tmp_path / f"{word}.bin")
    assert_same(read_custom_diffusion(tmp_path, sd), delta)


# ------------------------------------------------------------------------------------------------------------ refusals


def test_one_for_another_model_names_layers_and_shapes(tmp_path):
    sd = small_model()
    wide = small_model(replace(sd.config, unet=replace(sd.config.unet, context_width=24)))
    write_custom_diffusion(tmp_path / "x.safetensors", random_delta(wide, words=0), wide)
    extra = {"unet.down_blocks.7.attentions.0.transformer_blocks.0.attn2.to_k.weight": torch.zeros(2, 2)}
    write_safetensors(tmp_path / "x.safetensors", read(tmp_path / "x.safetensors").tensors | extra)
    with pytest.raises(ValueError) as error:
        read_custom_diffusion(tmp_path / "x.safetensors", sd)
    text = str(error.value)
    assert "1 of its 15 layers are not there, 14 have other shapes" in text and "no layer down_blocks.7" in text and "(nearest: " in text
    assert "attn2.to_k.weight has shape (16, 24); this layer's is (16, 16)" in text


def test_a_word_of_another_width_is_an_error(sd, tmp_path):
    write_safetensors(tmp_path / "x.safetensors", {"modifier_token.<new1>": torch.zeros(1, 768)})
    with pytest.raises(ValueError, match="'<new1>' is made for Stable Diffusion 1.x"):
        read_custom_diffusion(tmp_path / "x.safetensors", sd)


PLACE = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"modifier_token.<a>": torch.zeros(1, 16), "unet.conv_out.bias": torch.zeros(4)}, "'unet.conv_out.bias' is no part of a Custom"),
        ({"modifier_token.<a>": torch.zeros(1, 16), "text_encoder.embeddings": torch.zeros(4)}, "a whole text encoder is in it too"),
        ({"modifier_token.<a>": torch.zeros(1, 1, 16)}, r"modifier_token.<a> has shape \(1, 1, 16\)"),
        ({f"{PLACE}.u": torch.zeros(2, 2)}, "needs one weight, or u and v; found u"),
        ({f"{PLACE}.u": torch.zeros(2, 2), f"{PLACE}.v": torch.zeros(2, 2), PLACE: torch.zeros(2, 2)}, "found u, v and a weight"),
        ({f"{PLACE}.u": torch.zeros(32, 2), f"{PLACE}.v": torch.zeros(3, 16)}, r"has shape \(\(32, 2\), \(3, 16\)\); .* is \(32, 16\)"),
        ({PLACE.replace("to_k.weight", "to_out.0.bias"): torch.zeros(32)}, "x.safetensors: a bias without a weight for unet.middle"),
        ({"<cat>": torch.zeros(1, 16)}, "given as a Custom Diffusion, but it is a Textual Inversion embedding"),
    ],
)
def test_a_file_that_is_not_understood_wholly_is_an_error(tensors, message, sd, tmp_path):
    write_safetensors(tmp_path / "x.safetensors", tensors)
    with pytest.raises(ValueError, match=message):
        read_custom_diffusion(tmp_path / "x.safetensors", sd)


def test_something_else_given_as_a_custom_diffusion_is_named(sd, tmp_path):
    write_safetensors(tmp_path / "model.safetensors", ldm_tensors(sd))
    weights_loader.save(sd, tmp_path / "folder", layout="diffusers")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("model.safetensors", "but it is a whole model; give it as the model"),
        ("folder", "a whole model, given as a Custom Diffusion"),
        ("empty", "no Custom Diffusion in this folder"),
    ):
        with pytest.raises(ValueError, match=message):
            read_custom_diffusion(tmp_path / name, sd)


def test_writing_says_what_it_cannot(sd, tmp_path):
    delta = random_delta(sd)
    for name, one, options, message in (
        ("x.pt", delta, {}, "not .pt"),
        ("folder", delta, {"compressed": compressed(delta, sd)}, "diffusers' folders hold whole weights"),
        ("x.bin", random_delta(sd, words=2), {}, "<new1> has 2 vectors"),
        ("folder", CustomDiffusion(delta.layers, NewTokens({"../cat": torch.zeros(1, 16)})), {}, "'../cat' cannot name a file"),
        ("x.ckpt", delta, {"settings": {"steps": 3}}, "settings are kept in .safetensors and folders only"),
    ):
        with pytest.raises(ValueError, match=message):
            write_custom_diffusion(tmp_path / name, one, sd, **options)
    assert not list(tmp_path.iterdir())


def test_a_word_whose_file_was_renamed_is_found_by_what_is_in_it_and_the_rest_is_named(tmp_path):
    sd = family_model("SD 1")
    delta = random_delta(sd)
    write_custom_diffusion(tmp_path / "folder", delta, sd)
    (tmp_path / "folder/<new1>.safetensors").rename(tmp_path / "folder/new1.safetensors")
    (tmp_path / "folder/optimizer.bin").write_bytes(b"not a pickle")
    with pytest.warns(UserWarning, match=r"optimizer.bin beside the Custom Diffusion is left out: truncated download"):
        read = read_custom_diffusion(tmp_path / "folder", sd)
    assert set(read.tokens.rows) == set(delta.tokens.rows) == {"<new1>", "<new2>"}
    assert all(torch.equal(read.tokens.rows[word], rows) for word, rows in delta.tokens.rows.items())
    (tmp_path / "folder/optimizer.bin").unlink()
    weights_loader.attach(sd, custom_diffusion=tmp_path / "folder")
    assert "adds the words <new2> (1 vector), <new1> (1 vector)" in sd.notes[-1]
