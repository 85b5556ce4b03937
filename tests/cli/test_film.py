"""`minidiff film`: a frame per step, x_t beside x0_hat."""

import shlex

import numpy as np
import pytest
import torch
from PIL import Image

import weights_loader
from minidiff.adapters.tokens import NewTokens
from minidiff.cli.film import HOLD
from minidiff.pipeline import to_images
from tests.command import runner
from tests.small_models import small_model


@pytest.fixture
def run(monkeypatch, tmp_path, capsys):
    weights_loader.save(small_model(), tmp_path / "model.safetensors")
    return runner(monkeypatch, tmp_path, capsys)


MADE = ("a cat", "--model", "model.safetensors", "--steps", "3", "--seed", "5", "--zoom", "2")


def test_each_frame_is_a_step_of_the_loop(run, tmp_path):
    code, out, err = run("film", *MADE, "--out", "cat.webp", "--seconds", "0.9")
    assert (code, out) == (0, "cat.webp\n"), err
    sd = weights_loader.load(tmp_path / "model.safetensors")
    steps = list(sd.denoise("a cat", steps=3, seeds=[5]))
    with Image.open(tmp_path / "cat.webp") as film:
        assert film.n_frames == 3 and film.size == (128, 64)
        for i, step in enumerate(steps):
            film.seek(i)
            frame = np.asarray(film.convert("RGB")).astype(int)
            for half, latent in ((frame[:, :64], step.x_t), (frame[:, 64:], step.x0_hat)):
                picture = np.asarray(to_images(sd.decode(latent))[0]).repeat(2, 0).repeat(2, 1)
                assert np.abs(half - picture).max() <= 1  # of 255: two latents are decoded at once
        assert film.info["loop"] == 0
    assert not torch.equal(steps[0].x_t, steps[0].x0_hat)


def test_a_gif_takes_as_long_as_asked_and_holds_its_end(run, tmp_path):
    assert run("film", *MADE, "--out", "cat.gif", "--seconds", "0.9")[0] == 0
    with Image.open(tmp_path / "cat.gif") as film:
        times = []
        for i in range(film.n_frames):
            film.seek(i)
            times.append(film.info["duration"])
    assert times == [300, 300, 300 + 1000 * HOLD]


@pytest.mark.parametrize("dtype", [(), ("--dtype", "bfloat16")])
def test_the_command_that_it_ends_with_draws_its_last_picture(run, tmp_path, dtype):
    _, _, err = run("film", *MADE, *dtype, "--out", "cat.webp")
    (use,) = [line.partition("next: ")[2] for line in err.splitlines() if "next: " in line]
    assert run(*shlex.split(use)[1:], "--out", "cat.png")[0] == 0
    assert ("--dtype bfloat16" in use) == bool(dtype)
    with Image.open(tmp_path / "cat.webp") as film:
        film.seek(2)
        last = np.asarray(film.convert("RGB"))[::2, :64:2].astype(int)
    # Of 255: two latents are decoded at once, in bfloat16 with values rounded to 2^-8.
    assert np.abs(last - np.asarray(Image.open(tmp_path / "cat.png"))).max() <= (8 if dtype else 1)


def test_small_pictures_are_enlarged_and_the_film_is_named_after_its_prompt(run, tmp_path):
    code, out, _ = run("film", *MADE[:-2])
    assert (code, out) == (0, "a-cat-5.gif\n") and Image.open(tmp_path / "a-cat-5.gif").size == (512, 256)
    code, out, err = run("film", *MADE[:-2], "--size", "64")
    assert (code, out) == (0, "a-cat-5-2.gif\n") and "at 64 x 64 things tend to repeat; --zoom 2 enlarges" in err


def test_weights_are_read_and_what_has_no_effect_is_said(run, tmp_path):
    weights_loader.write_embedding(tmp_path / "word.safetensors", NewTokens({"<it>": torch.ones(1, 16)}))
    told = ("--negative-prompt", "BREAK", "--guidance-scale", "1", "--embedding", "word.safetensors", "--zoom", "1", "--steps", "2")
    code, _, err = run("film", "a (cat:1.7)", "--model", "model.safetensors", *told, "--out", "cat.webp")
    assert code == 0, err
    assert "--negative-prompt has no effect at --guidance-scale 1" in err and "BREAK is a word here" in err
    assert "no prompt uses the learned word <it>" in err
    (use,) = [line.partition("next: ")[2] for line in err.splitlines() if "next: " in line]
    assert run(*shlex.split(use)[1:], "--out", "cat.png")[0] == 0
    with Image.open(tmp_path / "cat.webp") as film:
        film.seek(1)
        last = np.asarray(film.convert("RGB"))[:, :32].astype(int)
    assert np.abs(last - np.asarray(Image.open(tmp_path / "cat.png"))).max() <= 1  # of 255: two latents are decoded at once


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--out", "cat.png"), "cat.png: a film is a .gif or a .webp; name it cat.gif"),
        (("--out", "nowhere/cat.gif"), "nowhere: no such folder"),
        (("--seconds", "0"), "--seconds 0 is outside 0..600"),
        (("--zoom", "0"), "--zoom 0 is outside 1..64"),
        (("--steps", "0"), "steps 0 is outside"),
        (("--sampler", "ddmp"), "sampler 'ddmp' unknown"),
    ],
)
def test_bad_input_ends_in_one_line_and_no_film(run, tmp_path, args, said):
    code, out, err = run("film", "a cat", "--model", "model.safetensors", *args)
    assert (code, out) == (2, "") and said in err and "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
