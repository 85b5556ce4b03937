"""The study in miniature: two methods on two subjects, stopped and gone on with, the same numbers again."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image

import weights_loader
from minidiff.study import learn, measure, plan
from minidiff.study import run as running
from minidiff.study.plan import UNTOUCHED, StudyRun
from minidiff.study.report import read_results

RUNS = [StudyRun("methods", name, (subject,), 0) for subject in ("tiger", "teapot") for name in (UNTOUCHED, "textual-inversion", "lora")]


def load():
    return weights_loader.load("tiny")


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Few steps, few pictures."""
    for module in (plan, learn):
        monkeypatch.setattr(module, "STEPS", 2)
    for name, value in (("OF_THE_SUBJECT", 2), ("OF_THE_CLASS", 4), ("OF_OTHERS", 2), ("DRAWING_STEPS", 2)):
        monkeypatch.setattr(measure, name, value)


def made(folder, runs):
    return list(running.run_study(folder, runs, load, weights_loader.load_judge, threads=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


def test_runs_leave_their_files_and_are_not_made_twice(folder):
    first = made(folder, RUNS[:2])
    assert [(p.done, p.total, p.name) for p in first] == [(1, 2, RUNS[0].name), (2, 2, RUNS[1].name)]
    rest = made(folder, RUNS)
    assert [p.name for p in rest] == [run.name for run in RUNS[2:]] and rest[-1].left == 0
    assert made(folder, RUNS) == []
    results = read_results(folder)
    assert len(results.rows) == len(RUNS)
    learned = next(row for row in results.rows if row["run"]["variant"] == "lora")
    assert learned["trained"] > 0 and learned["bytes"] == 4 * learned["trained"] and learned["seconds"] > 0 and learned["memory"] > 10**7
    assert 0 <= learned["scores"]["kept"] <= 1 and -1 <= learned["scores"]["likeness"] <= 1
    untouched = results.values("methods", UNTOUCHED, "drift")
    # the same pictures twice: what is left is rounding of a cosine in float32
    assert all(abs(value) < 1e-5 for value in untouched.values())
    assert all(value > 1e-4 for value in results.values("methods", "lora", "drift").values())
    assert np.load(folder / "features" / f"{RUNS[0].name}.npy").shape == (4, 128)
    with Image.open(folder / "rows" / f"{RUNS[0].name}.png") as picture:
        assert picture.height == 128


def test_the_same_seeds_give_the_same_numbers(folder, tmp_path):
    made(tmp_path, [RUNS[2]])
    again, before = (json.loads((place / "results" / f"{RUNS[2].name}.json").read_text()) for place in (tmp_path, folder))
    assert again["scores"] == before["scores"] and again["trained"] == before["trained"]


def test_runs_of_another_model_or_plan_do_not_mix(folder, monkeypatch):
    made(folder, RUNS[:1])
    other = load()
    with torch.no_grad():
        next(other.unet.parameters()).add_(1)
    with pytest.raises(ValueError, match="holds runs of another kind .model .*; choose another place"):
        list(running.run_study(folder, RUNS, lambda: other, weights_loader.load_judge))
    monkeypatch.setattr(running, "STEPS", 3)
    with pytest.raises(ValueError, match="holds runs of another kind .plan .*; choose another place"):
        made(folder, RUNS)


@pytest.mark.slow
def test_another_process_may_train_the_same_meanwhile(tmp_path, monkeypatch):
    save, others = torch.save, []

    def save_after_another(values, file):
        save(values, file)
        if not others:
            others.append("another process")
            learn.train_custom_diffusion(load(), "tiger", 0, tmp_path)

    monkeypatch.setattr(torch, "save", save_after_another)
    learn.train_custom_diffusion(load(), "tiger", 0, tmp_path)
    assert [path.name for path in (tmp_path / "learned").iterdir()] == ["tiger-0.pt"]


@pytest.mark.slow
def test_two_processes_share_the_runs(tmp_path):
    runs = [
        StudyRun("methods", UNTOUCHED, (subject,), 0) for subject in ("tiger", "teapot")
    ]  # drawn as in the study: a process has its own constants
    found = list(running.run_study(tmp_path, runs, load, weights_loader.load_judge, jobs=2, threads=1))
    assert sorted(p.name for p in found) == sorted(run.name for run in runs) and [p.done for p in found] == [1, 2]
    assert len(read_results(tmp_path).rows) == 2


@pytest.mark.parametrize("variant", ["joint", *(pytest.param(name, marks=pytest.mark.slow) for name in ("sequential", "dreambooth"))])
def test_two_subjects_are_learnt_in_every_way(tmp_path, variant):
    made(tmp_path, [StudyRun("pairs", variant, ("tiger", "teapot"), 0)])
    (row,) = read_results(tmp_path).rows
    assert (
        0 <= row["scores"]["both"] <= 1
        and row["trained"] > 0
        and row["bytes"] > 0
        and (row["changes"] is None) == (variant != "dreambooth")
    )


@pytest.mark.slow
def test_variants_train_what_they_say(tmp_path):
    def trained(part, variant):
        return learn.train_run(load(), StudyRun(part, variant, ("tiger",), 0), tmp_path).trained

    lora, custom_diffusion, width = trained("methods", "lora"), trained("methods", "custom-diffusion"), 128
    assert trained("methods", "pivotal-tuning") == lora + 2 * width  # and a word of two vectors
    assert trained("lora", "rank 1") == lora // 8 and trained("lora", "text encoder too") > lora
    layers = custom_diffusion - width  # but for the word: keys and values
    assert (
        layers < trained("custom", "all of cross-attention") - width <= 2 * layers
    )  # queries and outputs too, whose inputs are no wider than words
    assert 0 < trained("methods", "prefix") < lora


@pytest.mark.gpu
def test_a_gpu_gives_about_the_same_scores(folder, tmp_path):
    sides = [partial(one, device="cuda") for one in (partial(weights_loader.load, "tiny", dtype=torch.float32), weights_loader.load_judge)]
    list(running.run_study(tmp_path, RUNS, *sides))
    made(folder, RUNS)
    for score in ("likeness", "text"):
        for variant in (UNTOUCHED, "textual-inversion", "lora"):
            found, expected = (read_results(place).values("methods", variant, score) for place in (tmp_path, folder))
            # pictures are drawn in bfloat16, whose 8 bits two steps of training and of drawing carry into a cosine
            assert found == pytest.approx(expected, abs=0.05)


@pytest.mark.slow
def test_a_compressed_and_a_merged_concept_use_what_was_learnt(tmp_path):
    made(tmp_path, [StudyRun("compression", "share 0.6", ("tiger",), 0), StudyRun("pairs", "merged", ("tiger", "teapot"), 0)])
    kept = sorted(path.name for path in (tmp_path / "learned").iterdir())
    assert kept == ["teapot-0-second.pt", "tiger-0.pt"]
    merged = next(row for row in read_results(tmp_path).rows if row["run"]["part"] == "pairs")
    assert 0 <= merged["scores"]["both"] <= 1


def test_a_style_is_learnt_from_pictures_without_colour(tmp_path):
    made(tmp_path, [StudyRun("style", "lora", (), 0)])
    (row,) = read_results(tmp_path).rows
    assert row["scores"]["chroma_given"] == 0 < row["scores"]["chroma"]
