"""What the page of `minidiff play` does with the model: films, settings, every method with its weight, jobs that are stopped."""

import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image

import weights_loader
from minidiff.attention_maps import with_attention_maps, word_map
from minidiff.cli import studio as studio_file
from minidiff.cli.studio import Progress, Request, Studio
from minidiff.files import checksum
from minidiff.heat_maps import lay_over
from minidiff.pictures import list_pictures, save_png
from minidiff.pipeline import to_images
from minidiff.trainers.methods.table import METHODS
from tests.command import runner
from tests.small_concepts import picture_folder
from tests.small_models import small_model, training_config

PRESET = studio_file.preset
ASKED = Request("a red cat", "blue", seed=5, steps=3, guidance_scale=2.5, sampler="euler")


@pytest.fixture
def studio(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(studio_file, "SHEET_STEPS", 1)
    weights_loader.save(small_model(training_config()), tmp_path / "model.safetensors")
    return Studio(weights_loader.load("model.safetensors"), "model.safetensors", tmp_path / "made")


@pytest.fixture
def pictures(tmp_path):
    picture_folder(tmp_path / "cat", seed=1, size=64)
    return list_pictures(tmp_path / "cat")


def parts(sd):
    return checksum(*sd.parts.values())


def pixels(file):
    return np.asarray(Image.open(file)).astype(int)


def lesson(studio, pictures, name="lora", token="sks", class_word="cat", steps=2):
    return studio.teach(pictures, name, token, class_word, steps)


# --- drawing ----------------------------------------------------------------------------------------------------------


def test_each_frame_is_x0_hat_after_a_step_and_the_file_is_what_generate_makes(studio):
    (*_, film), sd = list(studio.draw(ASKED)), studio.sd
    options = dict(steps=3, guidance_scale=2.5, sampler="euler", negative_prompt="blue")
    steps = list(with_attention_maps(sd.denoise("a red cat", seeds=[5], **options), sd.unet))
    assert len(film.frames) == 3 and all(torch.equal(frame, sd.decode(step.x0_hat)) for frame, step in zip(film.frames, steps))
    assert [word for word, _ in film.words] == ["a", "red", "cat"]
    for i, step in enumerate(steps, start=1):
        heat = word_map(step.attention_maps, film.words[2][1], (step.x_t.shape[2], step.x_t.shape[3]))
        assert np.array_equal(np.asarray(film.attention(2, i)), np.asarray(to_images(lay_over(film.frames[i - 1], heat))[0]))
    assert not torch.equal(film.maps[0][1], film.maps[0][2]) and not torch.equal(film.maps[0][2], film.maps[2][2])
    assert np.array_equal(pixels(film.file), np.asarray(sd.generate("a red cat", seed=5, **options)[0]))
    assert film.picture(3) == film.file and np.array_equal(np.asarray(film.picture(1)), np.asarray(to_images(film.frames[0])[0]))


def test_a_picture_brings_its_request_back_and_generate_makes_it_again(studio, monkeypatch, tmp_path, capsys):
    *_, film = studio.draw(ASKED)
    assert studio.recall(film.file) == (ASKED, [])
    run = runner(monkeypatch, tmp_path, capsys)
    assert run("generate", "--settings", film.file, "--out", "again.png")[0] == 0
    assert np.array_equal(pixels("again.png"), pixels(film.file))


def test_weights_in_a_prompt_count_and_a_second_picture_replaces_no_file(studio):
    films = [list(studio.draw(Request(prompt, steps=1)))[-1] for prompt in ("a red cat", "a (red:1.5) cat", "a red cat")]
    assert [word for word, _ in films[1].words] == ["a", "red", "cat"]
    assert films[0].file != films[2].file and np.array_equal(pixels(films[0].file), pixels(films[2].file))
    assert not np.array_equal(pixels(films[0].file), pixels(films[1].file))


def test_a_prompt_that_is_read_in_chunks_and_an_empty_one_have_no_words_to_click(studio):
    *_, film = studio.draw(Request("red " * 40, steps=1))
    assert film.file and film.words == [] and "longer than what the model reads at once" in film.notes[0]
    *_, film = studio.draw(Request("", steps=1))
    assert film.file and film.words == []


def test_what_a_picture_has_and_this_page_lacks_is_said(studio, tmp_path):
    picture = tmp_path / "web.png"
    text = "a dog\nSteps: 4, Sampler: Euler, CFG scale: 7, Seed: 12, Size: 512x768, Clip skip: 2"
    save_png(Image.new("RGB", (8, 8)), picture, text)
    request, notes = studio.recall(picture)
    assert request == Request("a dog", "", 12, 4, 7.0, "euler")
    assert notes[0] == "not taken over: Size: 512x768, Clip skip: 2" and "noise was not drawn on a CPU" in notes[1]


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "bare.png: no settings in it"), ("a\nSteps: many", "Steps many"), ("a\nSteps: 3, Sampler: Quick", "sampler 'Quick'")],
)
def test_a_picture_without_usable_settings_is_refused(studio, tmp_path, text, said):
    save_png(Image.new("RGB", (8, 8)), tmp_path / "bare.png", text)
    with pytest.raises(ValueError, match=said):
        studio.recall(tmp_path / "bare.png")


@pytest.mark.parametrize(
    ("change", "said"),
    [({"seed": -1}, "seed -1"), ({"prompt": "(cat:9000)"}, "9000"), ({"learned": "lora-sks"}, "'lora-sks' was not learned here")],
)
def test_a_request_that_cannot_be_met_is_refused_with_nothing_written(studio, change, said):
    with pytest.raises(ValueError, match=said):
        list(studio.draw(Request(**{"prompt": "a cat", "steps": 2, **change})))
    assert not studio.out.exists()


# --- teaching ---------------------------------------------------------------------------------------------------------


def test_all_methods_that_learn_from_pictures_are_offered(studio):
    names = set(studio.methods())
    assert names == {name for name, method in METHODS.items() if method.needs_images} | {"dreambooth-lora"}


@pytest.mark.parametrize("name", [*(name for name, method in METHODS.items() if method.needs_images), "dreambooth-lora"])
def test_every_method_is_learned_weighed_and_taken_off(studio, pictures, name, monkeypatch, tmp_path, capsys):
    quick = {"token_steps": 2, "prior_count": 2, "prior_steps": 1}
    monkeypatch.setattr(studio_file, "preset", lambda *names: studio_file.override(PRESET(*names), quick))
    token = "<cat>" if "<cat>" in METHODS[name.removesuffix("-lora")].example else "" if name == "fine-tune" else "sks"
    before, untouched = parts(studio.sd), Request("a cat", steps=2)
    *_, plain = studio.draw(untouched)
    progress = list(lesson(studio, pictures, name, token, steps=3))
    learned = progress[-1].learned
    assert studio.learned == {learned.name: learned} and parts(studio.sd) == before and studio.sd.attached == []
    assert any("step 3 of 3, loss" in one.text for one in progress) and any(one.sheet for one in progress)
    made = {}
    for weight in (0.0, 0.5, 1.0):
        *_, film = studio.draw(request := Request(learned.prompt, steps=2, learned=learned.name, weight=weight))
        made[weight] = pixels(film.file)
        assert studio.recall(film.file)[0] == (request if weight else Request(learned.prompt, steps=2))
    assert not np.array_equal(made[1.0], made[0.0]) and not np.array_equal(made[1.0], made[0.5])
    run = runner(monkeypatch, tmp_path, capsys)
    code, _, err = run("generate", "--settings", film.file, "--out", "again.png")
    assert code == 0, err
    assert np.abs(pixels("again.png") - made[1.0]).max() <= 1  # of 255: weights at other addresses are summed in another order
    *_, film = studio.draw(untouched)
    assert parts(studio.sd) == before and np.array_equal(pixels(film.file), pixels(plain.file))


def test_a_lora_at_half_its_weight_is_made_again_by_generate(studio, pictures, monkeypatch, tmp_path, capsys):
    list(lesson(studio, pictures))
    *_, film = studio.draw(Request("a sks cat", steps=2, learned="lora-sks", weight=0.5))
    assert runner(monkeypatch, tmp_path, capsys)("generate", "--settings", film.file, "--out", "again.png")[0] == 0
    assert np.array_equal(pixels("again.png"), pixels(film.file))


@pytest.mark.parametrize("name", ["lora", "fine-tune"])
def test_a_lesson_that_is_cancelled_leaves_nothing_behind(studio, pictures, name):
    before, after = parts(studio.sd), 0
    for progress in studio.run_alone(lesson(studio, pictures, name, steps=500)):
        if "step 3 of 500" in progress.text:
            assert studio.out.exists()
            studio.stop()
        after += "step" in progress.text
    with studio.alone:
        assert after < 500 and list(studio.out.iterdir()) == [] and studio.learned == {}
    assert parts(studio.sd) == before and studio.sd.attached == []


def test_a_page_that_is_closed_stops_its_lesson(studio, pictures):
    job = studio.run_alone(lesson(studio, pictures, steps=100_000))
    assert isinstance(next(job), Progress)
    job.close()
    with studio.alone:  # once the job has ended
        assert studio.sd.attached == [] and list(studio.out.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pictures": []}, "no pictures to learn from"),
        ({"token": "", "class_word": ""}, "nothing for the hole"),
        ({"name": "textual-inversion", "token": ""}, "no token"),
        ({"steps": 0}, "steps 0"),
    ],
)
def test_a_lesson_that_cannot_be_learned_is_refused_with_nothing_written(studio, pictures, change, said):
    before = parts(studio.sd)
    with pytest.raises(ValueError, match=said):
        list(studio.teach(**{"pictures": pictures, "name": "lora", "token": "sks", "class_word": "cat", "steps": 2, **change}))
    assert parts(studio.sd) == before and not list(studio.out.glob("*"))


def test_a_file_that_is_no_picture_is_refused_with_nothing_written(studio, tmp_path):
    (tmp_path / "cat.png").write_text("no picture")
    with pytest.raises(ValueError, match="0.png"):
        list(lesson(studio, [tmp_path / "cat.png"]))
    assert not list(studio.out.glob("*"))


# --- jobs -------------------------------------------------------------------------------------------------------------


def test_jobs_have_the_model_one_after_the_other_and_what_they_raise_reaches_the_page(studio):
    at_once, most = 0, 0

    def job(last):
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.02)
        yield threading.get_ident()
        at_once -= 1
        if last:
            raise ValueError("said to the page")

    seen = []
    others = [threading.Thread(target=lambda: seen.extend(studio.run_alone(job(False)))) for _ in range(4)]
    for other in others:
        other.start()
    with pytest.raises(ValueError, match="said to the page"):
        list(studio.run_alone(job(True)))
    for other in others:
        other.join()
    assert most == 1 and len(seen) == 4 and threading.get_ident() not in seen
