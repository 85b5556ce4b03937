"""`minidiff generate --image`: pictures in, and one clear line for whatever does not go together, before any step."""

import numpy as np
import pytest
import torch
from PIL import Image

import weights_loader
from minidiff.editing.image_to_image import image_to_image
from minidiff.editing.start import Sampling
from minidiff.pictures import to_pixels
from minidiff.pipeline import to_images
from tests.command import runner
from tests.small_models import small_config, small_model

MODEL = ("--model", "model.safetensors", "--steps", "5")


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    """With a model, a picture of 32 x 32, and masks."""
    weights_loader.save(small_model(), tmp_path / "model.safetensors")
    values = np.random.default_rng(0).integers(256, size=(32, 32, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "in.png")
    Image.fromarray(np.concatenate([values] * 3, axis=1)[:31]).save(tmp_path / "wide.png")
    for name, value in (("black", 0), ("white", 255)):
        Image.new("L", (32, 32), value).save(tmp_path / f"{name}.png")
    mask = np.zeros((32, 32), np.uint8)
    mask[:, :16] = 255
    Image.fromarray(mask).save(tmp_path / "left.png")
    mask[:] = 0
    mask[5, 5] = 255
    Image.fromarray(mask).save(tmp_path / "dot.png")
    Image.fromarray(np.pad(mask, ((0, 0), (0, 64)))[:31]).save(tmp_path / "wide-dot.png")
    run = runner(monkeypatch, tmp_path, capsys)
    return lambda *args: run("generate", "a cat", *MODEL, *args, "--out", "out.png")


def values(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)


def test_image_to_image_writes_what_the_library_makes_and_says_where_it_begins(run, tmp_path):
    code, _, err = run("--image", "in.png", "--strength", "0.6", "--seed", "4")
    assert code == 0 and "minidiff: begins at t = 599: 3 of 5 steps\n" in err
    sd = weights_loader.load(tmp_path / "model.safetensors")
    pixels = to_pixels(np.array(Image.open(tmp_path / "in.png"))[None])
    *_, last = image_to_image(sd, "a cat", pixels, strength=0.6, seeds=[4], sampling=Sampling(5))
    assert np.array_equal(values(tmp_path / "out.png"), np.asarray(to_images(sd.decode(last.x_t))[0]))
    told = Image.open(tmp_path / "out.png").text["parameters"]
    assert "Image: in.png, Denoising strength: 0.6, Fit: crop" in told and "Mask" not in told


def test_a_picture_in_another_shape_is_brought_to_scale_or_to_the_size_asked_for(run, tmp_path):
    assert run("--image", "wide.png")[0] == 0 and Image.open(tmp_path / "out.png").size == (100, 32)
    for fit in ("crop", "resize", "pad"):
        assert run("--image", "wide.png", "--size", "24x40", "--fit", fit)[0] == 0
        assert Image.open(tmp_path / "out.png").size == (24, 40)


def test_inpainting_keeps_the_bytes_beyond_the_feather(run, tmp_path):
    code, _, err = run("--image", "in.png", "--mask", "left.png", "--batch", "2")
    assert code == 0 and "begins at t = 999: 5 of 5 steps" in err
    for name in ("out-0.png", "out-1.png"):
        made, before = values(tmp_path / name), values(tmp_path / "in.png")
        assert np.array_equal(made[:, 20:], before[:, 20:]) and not np.array_equal(made[:, :16], before[:, :16])
    assert run("--image", "in.png", "--mask", "left.png", "--feather", "0")[0] == 0
    assert np.array_equal(values(tmp_path / "out.png")[:, 16:], before[:, 16:])


def test_a_small_mask_is_grown_and_that_is_said(run, tmp_path):
    code, _, err = run("--image", "in.png", "--mask", "dot.png")
    assert code == 0 and "minidiff: the mask is 1 x 1 pixels, less than a latent cell; grown to 4 x 4" in err


def test_only_the_masked_part_is_worked_on_and_put_back_into_the_whole_picture(run, tmp_path):
    code, _, _ = run("--image", "wide.png", "--mask", "wide-dot.png", "--only-masked", "--feather", "1")
    made, before = values(tmp_path / "out.png"), values(tmp_path / "wide.png")
    assert code == 0 and made.shape == before.shape == (31, 96, 3)
    changed = np.argwhere((made != before).any(axis=2))
    assert len(changed) and changed.min() >= 4 and changed.max() <= 6


def test_outpainting_adds_a_border_and_keeps_the_inside(run, tmp_path):
    assert run("--image", "in.png", "--outpaint", "left=8,top=3")[0] == 0
    made, before = values(tmp_path / "out.png"), values(tmp_path / "in.png")
    assert made.shape == (35, 40, 3) and np.array_equal(made[3 + 4 :, 8 + 4 :], before[4:, 4:])


def test_an_inpainting_model_takes_the_mask(run, tmp_path):
    # 9 channels are known by their file's own config; nothing of the small model's shape is an inpainting model of the public ones.
    weights_loader.save(small_model(small_config(in_channels=9)), tmp_path / "model.safetensors")
    assert run("--image", "in.png", "--mask", "left.png")[0] == 0
    for args in ((), ("--image", "in.png")):
        code, _, err = run(*args)
        assert code == 2 and "an inpainting model, which needs a picture and a mask" in err and "--mask" in err


def test_weights_and_long_prompts_are_read_and_what_is_wrong_with_them_has_its_place(run, tmp_path):
    assert run()[0] == 0
    plain = values(tmp_path / "out.png")
    assert run("--negative-prompt", "(red:1.4) " + "cat " * 40)[0] == 0
    assert not np.array_equal(values(tmp_path / "out.png"), plain)
    code, _, err = run("--negative-prompt", "a (cat:1.3")
    assert code == 2 and "the bracket at character 3 is never closed" in err


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--image", "no.png"], "no.png: no such picture"),
        (["--image", "model.safetensors"], "model.safetensors: not a picture that can be read"),
        (["--image", "in.png", "--mask", "no.png"], "no.png: no such picture"),
        (["--image", "in.png", "--mask", "wide-dot.png"], "wide-dot.png: a mask of 96 x 31 pixels for a picture of 32 x 32"),
        (["--image", "in.png", "--mask", "black.png"], "the mask is all black"),
        (["--image", "in.png", "--mask", "white.png"], "the mask is all white"),
        (["--image", "in.png", "--strength", "1.5"], "strength 1.5 is outside 0..1"),
        (["--image", "in.png", "--strength", "nan"], "strength nan is outside 0..1"),
        (["--image", "in.png", "--size", "30"], "the VAE needs multiples of 4"),
        (["--image", "in.png", "--size", "0"], "size 0 x 0 has no pixels"),
        (["--image", "in.png", "--mask", "left.png", "--size", "8x0"], "size 8 x 0 has no pixels"),
        (["--image", "in.png", "--mask", "left.png", "--only-masked", "--size", "0"], "size 0 x 0 has no pixels"),
        (["--image", "in.png", "--outpaint", "left=99999999999999999999"], "at most 64 megapixels are made"),
        (["--image", "in.png", "--outpaint", "8"], "outpaint '8': '8' is no side with its pixels"),
        (["--image", "in.png", "--outpaint", "left=0"], "outpaint 'left=0' adds no pixel"),
        (["--image", "in.png", "--mask", "left.png", "--feather", "-1"], "feather -1: give 0 pixels or more"),
        (["--strength", "0.5"], "--strength without --image; give the picture to start from"),
        (["--mask", "left.png"], "--mask without --image"),
        (["--outpaint", "left=4"], "--outpaint without --image"),
        (["--only-masked"], "--only-masked without --image"),
        (["--fit", "pad"], "--fit without --image"),
        (["--image", "in.png", "--only-masked"], "--only-masked without --mask; give the mask of what is repainted"),
        (["--image", "in.png", "--feather", "3"], "--feather without --mask"),
        (["--image", "in.png", "--outpaint", "left=4", "--only-masked"], "--only-masked and --outpaint do not go together"),
        (["--image", "in.png", "--sampler", "ddmp"], "sampler 'ddmp' unknown; choose"),
    ],
)
def test_bad_input_gets_one_clear_line_before_any_step(run, tmp_path, args, said):
    code, out, err = run(*args)
    assert (code, out) == (2, "")
    lines = [line for line in err.splitlines() if line.startswith("minidiff: ")]
    assert len(lines) == 1 and said in lines[0], err
    assert "Traceback" not in err and "step/s" not in err
    assert not (tmp_path / "out.png").exists()


def test_the_measurement_renews_its_tables_in_a_file(monkeypatch, tmp_path, capsys):
    run = runner(monkeypatch, tmp_path, capsys)
    (tmp_path / "notes.md").write_text("<!-- edits -->\n<!-- end of edits -->\n")
    options = ("--part", "edits", "--count", "1", "--seeds", "0", "--steps", "1", "--threads", "1", "--readme", "notes.md")
    weights_loader.save(small_model(small_config(image_size=128)), tmp_path / "model.safetensors")
    code, out, _ = run("evaluate", "edits", "model.safetensors", *options)
    assert code == 0 and "| inpainting |" in out and out.splitlines()[0] in (tmp_path / "notes.md").read_text()
    assert torch.get_num_threads() == 1
    (tmp_path / "notes.md").write_text("no marks")
    code, out, err = run("evaluate", "edits", "model.safetensors", *options)
    assert (code, out) == (2, "") and "no place for the table 'edits'" in err
