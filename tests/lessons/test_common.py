"""What lessons call: options as a program and in a notebook, pictures small enough, the learner's function or the library's."""

import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from matplotlib import pyplot as plt
from PIL import Image

from lessons import common
from lessons.common import HERE, LARGEST, cloud_grid, curves, milliseconds, picture_grid, scene_latents, scene_pixels, start, x0_predictor
from lessons.exercises import Exercise
from minidiff.scenes.scenes import Item, compose
from tests.small_models import small_config, small_model

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
    answers = {name: Exercise(answer=lambda: "the answer", check=lambda function: None, wrong=()) for name in said}
    monkeypatch.setattr(common, "exercises", lambda name: answers)
    blank, right, library = SimpleNamespace(__name__="blank"), SimpleNamespace(__name__="right"), object()
    assert lesson(tmp_path).check(blank, instead=library) is library
    assert lesson(tmp_path).check(right, instead=library) is right
    assert capsys.readouterr().out.splitlines() == ["blank: not written yet", "The lesson goes on with the library's own.", "right: right"]
    assert lesson(tmp_path).check(blank) is answers["blank"].answer
    answers["blank"] = replace(answers["blank"], library=library)
    assert lesson(tmp_path).check(blank) is library


def test_a_right_answer_is_put_to_use_and_its_picture_is_not_among_those_that_are_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(common, "HERE", tmp_path / "lessons")
    monkeypatch.setattr(common, "complaint", lambda name, function: None)
    exercise = Exercise(lambda: 1, lambda f: None, (), number=lambda f: f"gives {f()}", picture=lambda f: plt.figure())
    monkeypatch.setattr(common, "exercises", lambda name: {"written": exercise})

    def written():
        return 2

    assert lesson(tmp_path / "kept").check(written) is written
    path = tmp_path / "runs" / "lessons" / "01-yours-written.png"
    assert capsys.readouterr().out.splitlines() == ["written: right", "gives 2", f"[picture: {path}]"]
    assert path.is_file() and not (tmp_path / "kept").exists()


def test_a_prediction_of_x_0_is_that_of_the_guided_model_for_v_and_for_eps():
    for prediction in ("v", "eps"):
        config = small_config()
        sd = small_model(replace(config, schedule=replace(config.schedule, prediction=prediction)))
        x_t = torch.randn(2, sd.config.vae.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
        prompts, t, level = ["a fox", "a lion"], torch.tensor([400, 400]), sd.schedule.alpha_bar[400]
        with torch.no_grad():
            cond, uncond = (sd.unet(x_t, t, sd.encode_prompts(texts)) for texts in (prompts, ["", ""]))
        out = uncond + sd.config.guidance_scale * (cond - uncond)
        a, s = float(level.sqrt()), float((1 - level).sqrt())
        expected = a * x_t - s * out if prediction == "v" else (x_t - s * out) / a
        assert torch.allclose(x0_predictor(sd, prompts)(x_t, 400), expected, rtol=1e-4, atol=1e-4)  # float32, through a division by a


def test_the_pictures_of_scenes_have_the_models_size_and_range():
    scene = compose([Item("pizza", px=52)], background="blue", style="fluent")
    config = small_config()
    sd = SimpleNamespace(config=replace(config, image_size=len(scene.image)))
    own = scene_pixels(sd, [scene, scene])
    assert own.shape == (2, 3, *scene.image.shape[:2])
    assert torch.allclose(own[0], torch.as_tensor(scene.image).permute(2, 0, 1) / 127.5 - 1, atol=1e-5)  # rounding of float32
    sd.config = replace(config, image_size=40)
    smaller = scene_pixels(sd, [scene])
    assert smaller.shape == (1, 3, 40, 40) and smaller.abs().max() <= 1


def test_the_latents_of_scenes_are_scaled_means_of_the_encoder():
    sd = small_model(small_config())
    scenes = [compose([Item(name, px=52)], background="blue", style="fluent") for name in ("pizza", "fox")]
    with torch.no_grad():
        encoded = sd.vae.encode(scene_pixels(sd, scenes))
    assert torch.equal(scene_latents(sd, scenes), encoded.mean * sd.config.vae.scaling_factor)


def test_the_fastest_of_four_calls_is_what_a_call_takes(monkeypatch):
    clock, called = iter([0, 5, 10, 12, 20, 29, 30, 34]), []
    monkeypatch.setattr(common.time, "perf_counter", lambda: next(clock))
    assert milliseconds(called.append, 3) == 2000 and called == [3] * 4


def test_curves_have_their_names_axes_and_ticks():
    fig = curves({"a": ([1, 2], [3, 4]), "law": ([1, 2], [1, 1])}, "x", "y", log="xy", dashed=["law"], xticks=[1, 2], ylim=(1, 5))
    (axis,) = fig.axes
    first, law = axis.lines
    assert (axis.get_xscale(), axis.get_yscale(), axis.get_ylim()) == ("log", "log", (1, 5))
    assert [text.get_text() for text in axis.get_xticklabels()] == ["1", "2"]
    assert (first.get_marker(), law.get_linestyle(), law.get_marker()) == ("o", "--", "None")
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["a", "law"]
    plt.close(fig)


def test_clouds_have_their_points_labels_and_colours():
    one, other = torch.rand(5, 2, generator=torch.Generator().manual_seed(0)), torch.zeros(3, 2)
    fig = cloud_grid([[one, other]], ["t = 0", "t = 9"], ["data"], [common.BLUE])
    first, second = fig.axes
    assert torch.allclose(torch.tensor(first.collections[0].get_offsets()).float(), one)
    assert (first.get_title(), second.get_title(), first.get_ylabel()) == ("t = 0", "t = 9", "data")
    plt.close(fig)


def test_the_colours_are_told_apart_by_every_kind_of_eye():
    """Okabe and Ito's set; the luminances of neighbours in the cycle differ, so that it also holds up in grey."""
    colours = plt.rcParams["axes.prop_cycle"].by_key()["color"]
    luminance = [sum(w * int(c[i : i + 2], 16) for w, i in ((0.2126, 1), (0.7152, 3), (0.0722, 5))) for c in colours]
    assert len(set(colours)) == 6
    assert all(abs(a - b) > 10 for a, b in zip(luminance, luminance[1:]))
