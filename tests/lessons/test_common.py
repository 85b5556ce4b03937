"""What lessons call: options as a program and in a notebook, pictures small enough, the learner's function or the library's."""

import sys
from types import SimpleNamespace

import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

from lessons import common
from lessons.common import HERE, LARGEST, picture_grid, start

NAME = "01_adding_noise"


@pytest.fixture(autouse=True)
def no_options(monkeypatch):
    monkeypatch.delenv("LESSON_OPTIONS", raising=False)


def lesson(folder, options=""):
    return start(NAME, f"{options} --figures '{folder}'")


def noise(side=64):
    return Image.fromarray(torch.randint(256, (side, side, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8).numpy())


def test_the_options_of_a_program_are_its_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"lessons/{NAME}.py", "--quick", "--model", "sd.ckpt", "--device", "cpu"])
    run = start(NAME)
    assert (run.quick, run.model, run.device) == (True, "sd.ckpt", torch.device("cpu"))


def test_elsewhere_the_call_says_them_or_else_a_variable(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "kernel.json"])
    assert start(NAME).model == "tiny" and not start(NAME).quick
    monkeypatch.setenv("LESSON_OPTIONS", "--quick")
    assert start(NAME).quick
    assert not start(NAME, "--model sd.ckpt").quick


@pytest.mark.parametrize(
    "options, folder", [("", HERE / "figures"), ("--quick", HERE.parent / "runs" / "lessons"), ("--figures here", "here")]
)
def test_only_a_whole_run_on_the_bundled_model_writes_the_pictures_that_are_kept(options, folder):
    assert str(start(NAME, options).figures) == str(folder)


@pytest.mark.parametrize("options", ["--device gpu", "--unknown"])
def test_unknown_options_end_the_lesson(options, capsys):
    with pytest.raises(SystemExit):
        start(NAME, options)
    assert options.split()[-1] in capsys.readouterr().err


def test_the_model_of_a_lesson_is_float32(tmp_path):
    assert lesson(tmp_path).load().dtype == torch.float32


def test_a_picture_is_written_under_the_number_of_the_lesson_always_the_same(tmp_path, capsys):
    files = []
    for _ in range(2):
        lesson(tmp_path).show(picture_grid([[noise()] * 2, [None, torch.zeros(4, 4)]], ["a", "b"], ["c", "d"]), "name", "what is seen")
        files.append((tmp_path / "01-name.png").read_bytes())
    assert files[0] == files[1] and not plt.get_fignums()
    assert capsys.readouterr().out.splitlines()[0] == f"[picture: {tmp_path / '01-name.png'}]"
    assert Image.open(tmp_path / "01-name.png").width == 720  # at half of it, on a phone, the letters are 10 pixels high


def test_a_picture_of_noise_gets_fewer_colours_until_it_fits(tmp_path):
    fig = picture_grid([[noise(64)] * 6] * 2)
    lesson(tmp_path).show(fig, "noise", "noise")
    assert Image.open(tmp_path / "01-noise.png").mode == "P"
    assert (tmp_path / "01-noise.png").stat().st_size <= LARGEST


def test_a_picture_that_cannot_fit_is_refused(tmp_path):
    with pytest.raises(ValueError, match="picture 'noise' has .* draw fewer or smaller pictures"):
        lesson(tmp_path).show(picture_grid([[noise(700)]]), "noise", "noise")


def test_a_notebook_shows_the_picture_with_its_words(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(common, "in_notebook", lambda: True)
    monkeypatch.setattr("IPython.display.display", shown.append)
    lesson(tmp_path).show(plt.figure(), "name", "what is seen")
    assert shown[0].data == (tmp_path / "01-name.png").read_bytes() and shown[0].alt == "what is seen"


def test_a_blank_is_filled_by_the_library_and_a_right_answer_is_kept(tmp_path, monkeypatch, capsys):
    said = {"blank": "not written yet", "right": None}
    monkeypatch.setattr(common, "complaint", lambda name, function: said[function.__name__])
    blank, right, library = SimpleNamespace(__name__="blank"), SimpleNamespace(__name__="right"), object()
    assert lesson(tmp_path).check(blank, instead=library) is library
    assert lesson(tmp_path).check(right, instead=library) is right
    assert capsys.readouterr().out.splitlines() == ["blank: not written yet", "The lesson goes on with the library's own.", "right: right"]


def test_the_colours_are_told_apart_by_every_kind_of_eye():
    """Okabe and Ito's set; the luminances of neighbours in the cycle differ, so that it also holds up in grey."""
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    luminance = [sum(w * int(c[i : i + 2], 16) for w, i in ((0.2126, 1), (0.7152, 3), (0.0722, 5))) for c in colours]
    assert len(set(colours)) == 6
    assert all(abs(a - b) > 10 for a, b in zip(luminance, luminance[1:]))
