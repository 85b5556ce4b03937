"""The study in miniature: two methods on two subjects, stopped and gone on with, the same numbers again."""

import json

import numpy as np
import pytest
from PIL import Image

import weights_loader
from minidiff.study import learn, measure, plan
from minidiff.study import run as running
from minidiff.study.plan import UNTOUCHED, Run
from minidiff.study.report import read

RUNS = [Run("methods", name, (subject,), 0) for subject in ("tiger", "teapot") for name in (UNTOUCHED, "textual-inversion", "lora")]


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
    return list(running.study(folder, runs, load, weights_loader.load_judge, threads=1))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("study")


def test_runs_leave_their_files_and_are_not_made_twice(folder):
    first = made(folder, RUNS[:2])
    assert [(p.done, p.total, p.name) for p in first] == [(1, 2, RUNS[0].name), (2, 2, RUNS[1].name)]
    rest = made(folder, RUNS)
    assert [p.name for p in rest] == [run.name for run in RUNS[2:]] and rest[-1].left == 0
    assert made(folder, RUNS) == []
    results = read(folder)
    assert len(results.rows) == len(RUNS)
    learnt = next(row for row in results.rows if row["run"]["variant"] == "lora")
    assert learnt["trained"] > 0 and learnt["bytes"] == 4 * learnt["trained"] and learnt["seconds"] > 0 and learnt["memory"] > 10**7
    assert 0 <= learnt["scores"]["kept"] <= 1 and -1 <= learnt["scores"]["likeness"] <= 1
    untouched = results.of("methods", UNTOUCHED, "drift")
    # the same pictures twice: what is left is rounding of a cosine in float32
    assert all(abs(value) < 1e-5 for value in untouched.values())
    assert all(value > 1e-4 for value in results.of("methods", "lora", "drift").values())
    assert np.load(folder / "features" / f"{RUNS[0].name}.npy").shape == (4, 128)
    with Image.open(folder / "rows" / f"{RUNS[0].name}.png") as picture:
        assert picture.height == 64


def test_the_same_seeds_give_the_same_numbers(folder, tmp_path):
    made(tmp_path, [RUNS[2]])
    again, before = (json.loads((place / "results" / f"{RUNS[2].name}.json").read_text()) for place in (tmp_path, folder))
    assert again["scores"] == before["scores"] and again["trained"] == before["trained"]


def test_a_compressed_and_a_merged_concept_use_what_was_learnt(tmp_path):
    made(tmp_path, [Run("compression", "share 0.6", ("tiger",), 0), Run("pairs", "merged", ("tiger", "teapot"), 0)])
    kept = sorted(path.name for path in (tmp_path / "learnt").iterdir())
    assert kept == ["teapot-0-second.pt", "tiger-0.pt"]
    merged = next(row for row in read(tmp_path).rows if row["run"]["part"] == "pairs")
    assert 0 <= merged["scores"]["both"] <= 1


def test_a_style_is_learnt_from_pictures_without_colour(tmp_path):
    made(tmp_path, [Run("style", "lora", (), 0)])
    (row,) = read(tmp_path).rows
    assert row["scores"]["chroma_given"] == 0 < row["scores"]["chroma"]
