"""`minidiff merge`, `compress`, `extract` and the small files of `generate`: as by the library, told in numbers, refused clearly."""

import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import weights_loader
from minidiff.adapters.custom_diffusion import CustomDiffusion, compress
from minidiff.adapters.lora import PATTERNS, merge_lora
from minidiff.adapters.tokens import create_tokens
from minidiff.cli import merge
from tests.checkpoints import with_unknown_tensor
from tests.command import runner
from tests.small_files import random_delta, random_lora
from tests.small_models import small_model

MODEL = ("--model", "model.safetensors")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """Runs a command in a folder with a small model and small files for it: two LoRAs, two Custom Diffusions, a word."""
    monkeypatch.setattr(merge, "REGULARISATION", 100)
    sd = small_model()
    weights_loader.save(sd, tmp_path / "model.safetensors")
    weights_loader.write_lora(tmp_path / "a.safetensors", random_lora(sd), sd)
    weights_loader.write_lora(tmp_path / "b.safetensors", random_lora(sd, PATTERNS["attention"][0], ranks=(3,)), sd, "kohya")
    for word, seed in (("<it>", 1), ("<that>", 2)):
        tokens = create_tokens(sd, {word: 1}, generator=torch.Generator().manual_seed(seed))
        delta = CustomDiffusion(random_delta(sd, words=0).layers, tokens)
        learned = {"concepts": [{"token": word, "class_word": "cat"}], "prompt": "a picture of a {}"}
        weights_loader.write_custom_diffusion(tmp_path / f"{word[1:-1]}.safetensors", delta, sd, learned)
    weights_loader.write_embedding(tmp_path / "word.safetensors", create_tokens(sd, {"<new>": 2}, {"<new>": "cat"}))
    return runner(monkeypatch, tmp_path, capsys)


def weights(path):
    sd = weights_loader.load(path)
    return {f"{part}.{name}": p for part in ("unet", "text_encoder", "vae") for name, p in getattr(sd, part).state_dict().items()}


def test_loras_are_merged_into_a_checkpoint(run, tmp_path):
    code, out, err = run("merge", "lora", "a.safetensors", "b.safetensors:0.5", *MODEL, "--out", "merged.safetensors")
    assert (code, out.strip()) == (0, "merged.safetensors"), err
    sd = small_model()
    for name, weight in (("a", 1.0), ("b", 0.5)):
        lora = weights_loader.read_lora(tmp_path / f"{name}.safetensors", sd)
        lora.weight = weight
        merge_lora(sd, lora)
    merged = weights(tmp_path / "merged.safetensors")
    assert all(torch.equal(merged[f"unet.{name}"], p) for name, p in sd.unet.state_dict().items())
    assert run("merge", "lora", "a.safetensors", *MODEL, "--out", "folder")[0] == 0 and (tmp_path / "folder" / "model_index.json").is_file()


def test_unknown_tensors_of_the_model_are_left_out_on_request_by_every_command(run, tmp_path):
    file = with_unknown_tensor(tmp_path / "model.safetensors").name
    code, _, err = run("merge", "lora", "a.safetensors", "--model", file, "--out", "x.safetensors")
    assert code == 2 and "zorp.weight" in err
    for args in (
        ("merge", "lora", "a.safetensors", "--model", file, "--out", "x.safetensors"),
        ("merge", "concepts", "it.safetensors", "that.safetensors", "--model", file, "--ridge", "1e-2", "--out", "y.safetensors"),
        ("compress", "it.safetensors", "--model", file, "--out", "z.safetensors"),
        ("extract", file, "x.safetensors", "--rank", "2", "--out", "e.safetensors"),
        ("compare", file, file),
        ("convert", file, "clean.safetensors"),
        ("convert", "it.safetensors", "folder", "--model", file),
        ("inspect", file),
        ("generate", "a cat", "--model", file, "--steps", "1", "--out", "a.png"),
        ("film", "a cat", "--model", file, "--steps", "1", "--out", "a.gif"),
        ("edit", "a cat", "a dog", "--model", file, "--steps", "1", "--out", "e.png"),
        ("evaluate", "weights", file, file),
    ):
        code, _, err = run(*args, "--ignore", "^zorp")
        assert code == 0, (args, err)


def test_what_was_merged_can_be_extracted(run, tmp_path):
    run("merge", "lora", "b.safetensors", *MODEL, "--out", "merged.safetensors")
    args = (
        "extract",
        "model.safetensors",
        "merged.safetensors",
        "--rank",
        "3",
        "--clamp",
        "1",
        "--layers",
        "attention",
        "--names",
        "kohya",
    )
    code, out, err = run(*args, "--out", "again.safetensors")
    assert code == 0 and "layers that differ, ranks 3 to 3" in err
    sd = small_model()
    one, two = (weights_loader.read_lora(tmp_path / f"{name}.safetensors", sd) for name in ("b", "again"))
    assert one.layers.keys() == two.layers.keys()
    for name, layer in one.layers.items():
        torch.testing.assert_close(two.layers[name].delta(), layer.delta(), rtol=1e-4, atol=1e-5)  # float32 differences of sums
    code, _, err = run("extract", "model.safetensors", "model.safetensors", "--out", "none.safetensors")
    assert code == 2 and "the two models are equal in the layers chosen" in err and not (tmp_path / "none.safetensors").exists()


def test_concepts_are_merged_with_a_report(run, tmp_path):
    args = ("merge", "concepts", "it.safetensors", "that.safetensors", *MODEL, "--out", "both.safetensors", "--ridge", "1e-3")
    code, out, err = run(*args)
    assert (code, out.strip()) == (0, "both.safetensors"), err
    for word in ("constraints", "drift", "condition", "time"):
        assert f"minidiff: {word}  " in err
    merged = weights_loader.read_custom_diffusion(tmp_path / "both.safetensors", small_model())
    assert merged.tokens.names == ("<it>", "<that>")
    with safe_open(tmp_path / "both.safetensors", "pt") as file:
        settings = json.loads(file.metadata()["minidiff.settings"])
    assert settings["captions"] == [["a picture of a <it> cat"], ["a picture of a <that> cat"]]  # those that they were learned with
    code, _, _ = run(*args[:-2], "--ridge", "1e-3", "--target", "<it> alone", "--target", "one <it>")
    with safe_open(tmp_path / "both.safetensors", "pt") as file:
        assert json.loads(file.metadata()["minidiff.settings"])["captions"] == [["<it> alone", "one <it>"], ["a picture of a <that> cat"]]
    assert (
        run("generate", "a <it> and a <that>", *MODEL, "--custom-diffusion", "both.safetensors", "--steps", "1", "--out", "both.png")[0]
        == 0
    )


def test_captions_that_stay_are_read_from_a_file(run, tmp_path):
    (tmp_path / "captions.txt").write_text("a cat\n\na red dog on a blue background\n")
    args = ("merge", "concepts", "it.safetensors", "that.safetensors", *MODEL, "--out", "both.safetensors", "--captions", "captions.txt")
    code, _, err = run(*args)
    assert code == 2 and "give more captions, or a ridge" in err  # nine tokens do not fix a map of 16 channels
    assert run(*args, "--ridge", "0.1")[0] == 0


def test_compressing_tells_error_and_size(run, tmp_path):
    code, _, err = run("compress", "it.safetensors", *MODEL, "--out", "small.safetensors", "--rank", "2")
    sd = small_model()
    delta = weights_loader.read_custom_diffusion(tmp_path / "it.safetensors", sd)
    expected = compress(delta.deltas(sd), rank=2)
    assert code == 0 and f"error {expected.error:.1%}" in err and "ranks 2 to 2" in err
    small = weights_loader.read_custom_diffusion(tmp_path / "small.safetensors", sd).deltas(sd)
    for name, change in expected.deltas().items():
        torch.testing.assert_close(small[name], change, rtol=1e-4, atol=1e-5)  # W0 was added and taken off again
    assert (tmp_path / "small.safetensors").stat().st_size < (tmp_path / "it.safetensors").stat().st_size


def test_pictures_take_small_files_and_name_them(run, tmp_path):
    args = ("generate", "a <new> and a <it>", *MODEL, "--steps", "2")
    files = (
        "--lora",
        "a.safetensors:0.5",
        "--lora",
        "b.safetensors",
        "--embedding",
        "word.safetensors",
        "--custom-diffusion",
        "it.safetensors",
    )
    code, _, err = run(*args, *files, "--out", "a.png")
    assert code == 0, err
    sd = weights_loader.load(
        tmp_path / "model.safetensors",
        lora=((tmp_path / "a.safetensors", 0.5), tmp_path / "b.safetensors"),
        embeddings=tmp_path / "word.safetensors",
        custom_diffusion=tmp_path / "it.safetensors",
    )
    picture = Image.open(tmp_path / "a.png")
    assert picture.tobytes() == sd.generate("a <new> and a <it>", steps=2, seed=0)[0].tobytes()
    text = picture.text["parameters"]
    assert 'LoRA: "a.safetensors:0.5", LoRA 2: b.safetensors, Embedding: word.safetensors, Custom Diffusion: it.safetensors' in text
    for name, kind in (("a", "LoRA, names of kohya"), ("b", "LoRA, names of kohya"), ("word", "embedding"), ("it", "Custom Diffusion")):
        code, out, _ = run("inspect", f"{name}.safetensors")
        assert code == 0 and kind in out


BAD = {
    ("merge", "lora", "--out", "x.safetensors"): "no LoRA to merge",
    ("merge", "lora", "a.safetensors", "--out", "x.ckpt"): "--out x.ckpt: expected a name with .safetensors",
    ("merge", "lora", "it.safetensors", "--out", "x.safetensors"): "given as a LoRA, but it is a Custom Diffusion",
    ("merge", "concepts", "it.safetensors", "--out", "x.safetensors"): "1 files to merge; give at least two",
    ("merge", "concepts", "it.safetensors", "it.safetensors", "--out", "x.safetensors"): "two concepts have a word '<it>'",
    (
        "merge",
        "concepts",
        "it.safetensors",
        "that.safetensors",
        "--target",
        "a cat",
        "--out",
        "x.safetensors",
    ): "holds none of the learned words <it>, <that>",
    ("merge", "concepts", "it.safetensors", "that.safetensors", "--captions", "no.txt", "--out", "x.safetensors"): "no.txt",
    ("compress", "a.safetensors", "--out", "x.safetensors"): "given as a Custom Diffusion, but it is a LoRA",
    ("compress", "it.safetensors", "--share", "2", "--out", "x.safetensors"): "share 2.0: expected more than 0",
    ("compress", "it.safetensors", "--out", "nowhere/x.safetensors"): "nowhere: no such folder",
    ("extract", "model.safetensors", "no-such.safetensors", "--out", "x.safetensors"): "no-such.safetensors",
    ("generate", "a cat", "--embedding", "a.safetensors", "--out", "x.png"): "given as an embedding, but it is a LoRA",
}


@pytest.mark.parametrize("args", BAD, ids=" ".join)
def test_bad_input_gets_one_clear_line_and_writes_nothing(run, tmp_path, args):
    before = sorted(tmp_path.iterdir())
    code, out, err = run(*args, *(MODEL if args[0] != "extract" else ()))
    assert (code, out) == (2, "") and err.startswith("minidiff: ") and BAD[args] in err and "Traceback" not in err, err
    assert sorted(tmp_path.iterdir()) == before


def test_a_lora_of_another_model_is_merged_with_a_note(run, tmp_path):
    weights_loader.save(small_model(seed=1), tmp_path / "other.safetensors")
    code, _, err = run("merge", "lora", "a.safetensors", "--model", "other.safetensors", "--out", "merged.safetensors")
    assert code == 0 and "a.safetensors was learned on another model than this one" in err
    assert "another model" not in run("merge", "lora", "a.safetensors", "--model", "model.safetensors", "--out", "same.safetensors")[2]
