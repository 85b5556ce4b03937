"""`minidiff edit` and `generate --heat-maps`: what the library makes, in files that say how, and one line for what does not go."""

import numpy as np
import pytest
from PIL import Image

import weights_loader
from minidiff.editing.inversion import invert
from minidiff.editing.null_text import null_text, with_empty_prompts
from minidiff.editing.prompt_to_prompt import AttentionEdit, prompt_to_prompt
from minidiff.editing.start import Sampling, encode
from minidiff.heat_maps import HeatMaps, lay_over
from minidiff.pictures import to_pixels
from minidiff.pipeline import to_images
from tests.adapters.learned_lora import random_lora
from tests.command import runner
from tests.small_models import small_model

LION, CROCODILE = "a lion on blue", "a crocodile on blue"
MODEL = ("--model", "model.safetensors", "--steps", "4", "--out", "out.png")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    weights_loader.save(small_model(), tmp_path / "model.safetensors")
    values = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "in.png")
    run = runner(monkeypatch, tmp_path, capsys)
    return lambda command, *args: run(command, *args, *MODEL)


def values(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_a_pair_is_what_the_library_makes_side_by_side_and_alone(run, tmp_path):
    flags = ("--replace", "0.8", "--self", "0.5", "--local-blend", "lion", "crocodile", "--reweight", "blue=2", "--until", "crocodile=0.3")
    code, out, _ = run("edit", LION, CROCODILE, *flags, "--seed", "3", "--batch", "2", "--sampler", "euler_ancestral")
    assert code == 0 and out == "out.png\n"
    sd = weights_loader.load(tmp_path / "model.safetensors")
    edit = AttentionEdit(0.8, 0.5, {"crocodile": 0.3}, "replace", {"blue": 2.0}, ("lion", "crocodile"))
    *_, last = prompt_to_prompt(sd, LION, CROCODILE, edit, seeds=[3, 4], sampling=Sampling(4, "euler_ancestral"))
    images = [np.asarray(image) for image in to_images(sd.decode(last.x_t))]
    names = ("out-original-3", "out-original-4", "out-edited-3", "out-edited-4")
    for name, image in zip(names, images, strict=True):
        assert np.array_equal(values(tmp_path / f"{name}.png"), image)
    pairs = np.concatenate([np.concatenate(images[0::2], axis=1), np.concatenate(images[1::2], axis=1)])
    assert np.array_equal(values(tmp_path / "out.png"), pairs)
    told = Image.open(tmp_path / "out.png").text["parameters"]
    assert told.startswith(f"{LION} | {CROCODILE}\nSteps: 4") and "Cross-attention: replace 0.8, Self-attention: 0.5" in told
    assert "Reweight: blue=2, Local blend: lion, Local blend 2: crocodile" in told
    assert Image.open(tmp_path / "out-edited-4.png").text["parameters"].startswith(f"{CROCODILE}\nSteps: 4")


def test_one_prompt_is_reweighted(run, tmp_path):
    assert run("edit", LION, "--reweight", "lion=-1", "--refine", "0.5")[0] == 0
    assert not np.array_equal(values(tmp_path / "out-original-0.png"), values(tmp_path / "out-edited-0.png"))


def test_a_real_picture_is_inverted_and_its_original_comes_back(run, tmp_path):
    code, _, _ = run("edit", LION, CROCODILE, "--image", "in.png", "--guidance-scale", "3")
    sd = weights_loader.load(tmp_path / "model.safetensors")
    x_0 = encode(sd, to_pixels(values(tmp_path / "in.png")[None]))
    up = list(invert(sd, [LION], x_0, steps=4))
    model = with_empty_prompts(sd.predict, list(null_text(sd, [LION], x_0, up, guidance_scale=3)))
    *_, last = prompt_to_prompt(sd, LION, CROCODILE, AttentionEdit(), sampling=Sampling(4, guidance_scale=3), x=up[-1].x_t, model=model)
    made = np.concatenate([np.asarray(image) for image in to_images(sd.decode(last.x_t))], axis=1)
    assert code == 0 and np.array_equal(values(tmp_path / "out.png"), made)


def test_at_scale_1_nothing_is_learned_and_a_size_is_kept(run, tmp_path):
    code, _, err = run("edit", LION, CROCODILE, "--image", "in.png", "--guidance-scale", "1", "--size", "24x40")
    assert code == 0 and "null text" not in err and Image.open(tmp_path / "out-edited-0.png").size == (24, 40)


def test_what_has_no_effect_is_said(run):
    code, _, err = run("edit", LION, "a crocodile on blue BREAK", "--negative-prompt", "red", "--guidance-scale", "1")
    assert code == 0 and "--negative-prompt has no effect at --guidance-scale 1" in err and "BREAK is a word here" in err


def test_a_lora_changes_both(run, tmp_path):
    sd = small_model()
    lora = random_lora(sd)
    weights_loader.write_lora(tmp_path / "lora.safetensors", lora, sd, "kohya", {})
    assert run("edit", LION, CROCODILE)[0] == 0
    plain = values(tmp_path / "out.png")
    assert run("edit", LION, CROCODILE, "--lora", "lora.safetensors")[0] == 0
    assert not np.array_equal(values(tmp_path / "out.png"), plain)
    assert "lora.safetensors" in Image.open(tmp_path / "out.png").text["parameters"]


@pytest.mark.parametrize(
    "args, message",
    [
        ((LION,), "one prompt only, 'a lion on blue': give the picture's prompt and the edit's, or one prompt and --reweight WORD=NUMBER"),
        ((), "0 prompts: give the picture's prompt and the edit's"),
        ((LION, CROCODILE, LION), "3 prompts: give"),
        ((LION, CROCODILE, "--replace", "1.2"), "--replace 1.2 is outside 0..1"),
        ((LION, CROCODILE, "--self", "-0.1"), "--self -0.1 is outside 0..1"),
        ((LION, CROCODILE, "--until", "crocodile=2"), "--until crocodile 2 is outside 0..1"),
        ((LION, CROCODILE, "--replace", "0.5", "--refine", "0.5"), "--replace and --refine do not go together"),
        (
            (LION, CROCODILE, "--reweight", "red=3"),
            "word 'red' is not in the prompt 'a crocodile on blue'; its words are a, crocodile, on, blue",
        ),
        ((LION, CROCODILE, "--local-blend", "lion", "lion"), "word 'lion' is not in the prompt 'a crocodile on blue'"),
        ((LION, CROCODILE, "--reweight", "blue"), "--reweight blue: write each word once with its number, as red=3"),
        ((LION, CROCODILE, "--reweight", "blue=2", "--reweight", "blue=3"), "--reweight blue=3: write each word once"),
        ((LION, "a small crocodile on blue", "--replace", "0.5"), "prompts of 4 and 5 words cannot be replaced word for word"),
        (("lion", "two dogs"), "have no word in common"),
        ((LION, "a (small:1.4) lion on blue"), "has weights in brackets; say how much a word counts by --reweight"),
        ((LION, CROCODILE, "--image", "none.png"), "--image none.png: no such file"),
        ((LION, CROCODILE, "--image", "in.png", "--sampler", "euler"), "--sampler euler with --image: only ddim can be run backward"),
        ((LION, CROCODILE, "--image", "in.png", "--seed", "3"), "--seed and --batch with --image"),
        ((LION, CROCODILE, "--image", "in.png", "--dtype", "bfloat16"), "--dtype bfloat16 with --image: inversion learns in float32"),
        ((LION, CROCODILE, "--image", "in.png", "--reweight", "red=3"), "word 'red' is not in the prompt"),
        ((LION, CROCODILE, "--batch", "0"), "--batch 0 makes no picture"),
        ((LION, CROCODILE, "--batch", "1000000000000"), "--batch 1000000000000: at most 4096 pictures of a prompt"),
        ((LION, CROCODILE, "--sampler", "ddmp"), "sampler 'ddmp' unknown"),
    ],
)
def test_what_does_not_go_is_one_line_and_no_file(run, tmp_path, args, message):
    code, _, err = run("edit", *args)
    lines = err.strip().splitlines()
    assert code == 2 and len(lines) == 1 and message in lines[0] and not (tmp_path / "out.png").exists()


# --- heat maps --------------------------------------------------------------------------------------------------------


def test_heat_maps_are_a_sheet_beside_the_same_picture(run, tmp_path):
    assert run("generate", "a lion", "a (red:1.3) crocodile", "--seed", "2")[0] == 0
    plain = values(tmp_path / "out.png")
    code, _, err = run("generate", "a lion", "a (red:1.3) crocodile", "--seed", "2", "--heat-maps")
    assert code == 0 and np.array_equal(values(tmp_path / "out.png"), plain)
    assert "out-heat.png: the picture, a, lion\n" in err and "out-heat.png: the picture, a, red, crocodile\n" in err
    sheet = values(tmp_path / "out-heat.png")
    assert sheet.shape == (64, 4 * 32, 3) and np.array_equal(sheet[:32, :32], plain[:32, :32]) and (sheet[:32, 96:] == 255).all()
    sd = weights_loader.load(tmp_path / "model.safetensors")
    heat = HeatMaps(1, [1, 2])
    *_, last = heat.watch(sd.denoise("a lion", seeds=[2], steps=4), sd.unet)
    laid = to_images(lay_over(sd.decode(last.x_t), heat.word([2])))[0]
    # Drawn in a batch of two there, so that rounding may move a value by one.
    assert np.abs(sheet[:32, 64:96].astype(int) - np.asarray(laid)).max() <= 2


def test_heat_maps_of_a_long_prompt_are_refused_before_any_step(run, tmp_path):
    code, _, err = run("generate", "a lion " * 30, "--heat-maps")
    assert code == 2 and "heat maps are of the 30 that are read at once" in err and not (tmp_path / "out.png").exists()
    code, _, err = run("generate", "", "--heat-maps")
    assert code == 2 and "has no words" in err
