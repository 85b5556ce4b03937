"""The measurement of edits: the same scenes every time, numbers that follow from the pixels, tables that find their place."""

import pytest
import torch

import weights_loader
from minidiff.bundled import edits as edits_module
from minidiff.bundled.edits import (
    INVERSION_STEPS,
    PARTS,
    WAYS,
    blend,
    edits_table,
    found,
    mean_change,
    measure,
    measure_inversion,
    renew_tables,
    rim_of,
    scene_edits,
)
from minidiff.editing.inpaint import inpaint
from minidiff.editing.masks import mask_box
from minidiff.editing.start import Sampling
from minidiff.scenes.art import SIZE, subject_names
from tests.small_models import small_config, small_model


@pytest.fixture(scope="module")
def judge():
    return weights_loader.load_judge()


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """Of inversion, whose tables take 640 calls of the U-Net otherwise."""
    monkeypatch.setattr(edits_module, "INVERSION_STEPS", (3, 6, 12))


@pytest.fixture
def sd(judge):
    return small_model(small_config(image_size=judge.config.image_size))


def test_scenes_are_the_same_every_time_and_leave_something_to_keep():
    edits, again = scene_edits(8, SIZE), scene_edits(3, SIZE)
    assert all(torch.equal(a.pixels, b.pixels) and a.prompt == b.prompt for a, b in zip(edits, again))
    for edit in edits:
        assert edit.subject in subject_names(held_out=False) and edit.subject in edit.prompt and edit.subject not in edit.caption
        assert 0.1 < edit.mask.mean() < 0.6
    assert len({edit.prompt for edit in edits}) > 6


def test_a_model_of_another_size_gets_the_scene_in_its_size():
    small, large = scene_edits(1, SIZE)[0], scene_edits(1, 3 * SIZE // 2)[0]
    assert large.pixels.shape == (1, 3, 192, 192) and large.mask.shape == (1, 1, 192, 192)
    assert all(abs(1.5 * a - b) <= 1 for a, b in zip(mask_box(small.mask), mask_box(large.mask)))


def test_the_judge_finds_the_scenes_own_subjects_and_no_others(judge):
    with torch.no_grad():
        hits = [
            found(judge, edit.pixels, name) for edit in scene_edits(12, SIZE) for name in (edit.caption.split(" on ")[0].split(" ", 1)[1],)
        ]
        misses = [found(judge, edit.pixels, edit.subject) for edit in scene_edits(12, SIZE)]
    assert sum(sum(hits, [])) >= 11 and sum(sum(misses, [])) <= 1


def test_changes_are_counted_where_the_mask_is_alone():
    original, mask = torch.zeros(1, 3, 8, 8), torch.zeros(1, 1, 8, 8)
    mask[..., :4] = 1
    changed = original.clone().expand(2, -1, -1, -1).clone()
    changed[0, ..., :2], changed[0, ..., 4:], changed[1] = 0.2, 9, -0.4
    assert mean_change(changed, original, mask) == pytest.approx([127.5 * 0.1, 127.5 * 0.4])
    assert rim_of(mask, 1)[0, 0, 0].tolist() == [0, 0, 0, 0, 1, 0, 0, 0]


def test_the_way_of_the_library_is_the_first_in_the_table(sd):
    (edit,) = scene_edits(1, SIZE)
    decoded, _ = blend(sd, edit, "same", [0, 1], Sampling(3))
    *_, last = inpaint(sd, edit.prompt, edit.pixels, edit.mask, seeds=[0, 1], sampling=Sampling(3))
    assert next(iter(WAYS)) == "same" and torch.equal(decoded, sd.decode(last.x_t))
    ends = [blend(sd, edit, way, [0, 1], Sampling(3))[0] for way in WAYS]
    assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(ends, ends[1:]))


@pytest.mark.parametrize("part", PARTS)
def test_each_part_gives_its_table(part, sd, judge):
    with torch.no_grad():
        table = measure(part, sd, judge, count=1, seeds=[0], steps=2)
    rows = table.splitlines()[2:]
    assert len(rows) == {"blends": len(WAYS), "edits": 8, "inversion": 4 * len(INVERSION_STEPS)}[part]


def test_a_picture_drawn_anew_is_the_measure_of_change():
    measured = {"value": 40.0, "error": 1.0, "count": 3}
    rows = [
        {"way": "inpainting", "found": {"value": 0.9, "error": 0.05, "count": 3}, "changed": measured | {"value": 2.0}},
        {"way": "image to image, strength 1.0", "found": {"value": 1.0, "error": 0.0, "count": 3}, "changed": measured},
    ]
    assert edits_table(rows).splitlines()[2:] == [
        "| inpainting | 90 ± 5 % | 2.0 ± 1.0 | 5 % |",
        "| image to image, strength 1.0 | 100 ± 0 % | 40.0 ± 1.0 | 100 % |",
    ]


def test_inversion_errors_fall_with_the_steps(sd):
    with torch.no_grad():
        rows = list(measure_inversion(sd, scene_edits(2, SIZE)))
    plain = [row["rms"] for row in rows if row["pictures"] == "scenes" and row["scale"] == 1]
    assert plain == sorted(plain, reverse=True)


def test_what_cannot_be_measured_is_refused(sd, judge):
    with pytest.raises(ValueError, match="the model draws 32 pixels, the judge reads"):
        measure("edits", small_model(), judge, count=1, seeds=[0], steps=2)
    with pytest.raises(ValueError, match="0 scenes and 1 seeds: no picture to judge"):
        measure("edits", sd, judge, count=0, seeds=[0], steps=2)


def test_tables_are_renewed_between_their_marks_and_nothing_else():
    text = "# A\n<!-- edits -->\nold\n<!-- end of edits -->\nB"
    assert renew_tables(text, {"edits": "new"}) == "# A\n<!-- edits -->\nnew\n<!-- end of edits -->\nB"
    with pytest.raises(ValueError, match="no place for the table 'blends': write <!-- blends -->"):
        renew_tables(text, {"blends": "new"})
