"""The measurement of edits by attention: the same prompts every time, each part its table, numbers that follow from the pictures."""

import pytest
import torch

import weights_loader
from minidiff.bundled.attention_edits import (
    CHANGED_AT,
    GATES,
    PARTS,
    SETTINGS,
    attention_table,
    exchanges,
    gates_table,
    measure,
    measure_gates,
    outside,
    overlap_table,
)
from minidiff.bundled.edits import scene_edits
from minidiff.editing.start import Sampling
from minidiff.scenes.prompts import prompts
from tests.small_models import small_config, small_model


@pytest.fixture(scope="module")
def judge():
    return weights_loader.load_judge()


@pytest.fixture
def sd(judge):
    return small_model(small_config(image_size=judge.config.image_size))


@pytest.mark.parametrize("kind, words", [("subject", 1), ("colour", 1), ("place", 2), ("style", 1)])
def test_pairs_of_prompts_differ_in_words_of_one_kind_alone(kind, words):
    pairs = exchanges(kind, 12)
    assert pairs[:3] == exchanges(kind, 3) and len({pair.before.text for pair in pairs}) > 8
    for pair in pairs:
        a, b = pair.before, pair.after
        assert (a.subjects == b.subjects) == (kind in ("colour", "style")) and (a.background == b.background) == (kind != "colour")
        assert sorted(a.subjects) == sorted(b.subjects) or kind == "subject"
        assert (a.style == b.style) == (kind != "style") and a.relation == b.relation == ("left of" if kind == "place" else None)
        assert all(name in prompt.text for prompt in (a, b) for name in (*prompt.subjects, prompt.background))


def test_outside_is_where_the_judge_sees_nothing(judge):
    for edit in scene_edits(4, judge.config.image_size):
        where = outside(judge, edit.pixels)
        assert where.shape == edit.mask.shape and 0.1 < where.mean() < 0.9
        left, inside = (where * edit.mask).sum(), edit.mask.sum()
        assert left < 0.3 * inside  # the subject's box has a margin and corners where there is nothing


@pytest.mark.parametrize("part", PARTS)
def test_each_part_gives_its_table(part, sd, judge):
    with torch.no_grad():
        table = measure(part, sd, judge, count=2, seeds=[0], steps=2)
    rows = table.splitlines()[2:]
    expected = {"attention": 1 + len(SETTINGS), "null-text": 3, "words": 5, "gate": 2 * len(GATES) - 1, "overlap": 3}
    assert len(rows) == expected[part] and all(row.count("|") == table.splitlines()[0].count("|") for row in rows)
    if part == "words":
        assert table.splitlines()[0].count("from") == len(CHANGED_AT) - 1


def test_a_gate_saves_more_the_earlier_it_is_and_the_more_it_keeps(sd, judge):
    with torch.no_grad():
        rows = list(measure_gates(sd, judge, prompts()[:1], 0, Sampling(4)))
    kept = [row["operations"] for row in rows if row["kept"] == "kept"]
    prompted = [row["operations"] for row in rows if row["kept"] == "by the prompt"]
    assert kept == sorted(kept) and prompted == sorted(prompted) and all(a < b for a, b in zip(kept, prompted))
    assert (
        gates_table(rows).splitlines()[-1].startswith("| never | by the prompt | 1 |") and "| 100 % |" in gates_table(rows).splitlines()[-1]
    )


def test_change_is_a_share_of_that_without_control_and_overlaps_are_compared():
    one = {"value": 0.9, "error": 0.05, "count": 3}
    rows = [
        {"way": "none", "found": one, "changed": one | {"value": 20.0}},
        {"way": "cross", "found": one, "changed": one | {"value": 5.0}},
    ]
    assert attention_table(rows).splitlines()[-1] == "| cross | 3 | 90 ± 5 % | 5.0 ± 0.1 | 25 % |"
    both = {"way": "both subjects", "count": 3, "overlap": {"value": 0.5, "error": 0.03, "count": 3}}
    table = overlap_table([both, {"way": "not both", "count": 2, "overlap": {"value": 0.75, "error": 0.04, "count": 2}}])
    assert table.splitlines()[-1] == "| difference |  | 0.250 ± 0.050 |"


def test_what_cannot_be_measured_is_refused(sd, judge):
    with pytest.raises(ValueError, match="the model draws 32 pixels, the judge reads"):
        measure("attention", small_model(), judge, count=1, seeds=[0], steps=2)
    with pytest.raises(ValueError, match="1 scenes and 0 seeds: no picture to judge"):
        measure("gate", sd, judge, count=1, seeds=[], steps=2)
