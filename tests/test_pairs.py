"""People's preference: a sheet of pairs in random order, a form, and its tally."""

import csv
import json

import pytest
from PIL import Image

from minidiff.evaluation.pairs import LABEL, make_sheet, tally, wilson
from minidiff.viz import save_png


def folder(tmp_path, name, colour, count=6):
    made = tmp_path / name
    made.mkdir()
    for i in range(count):
        Image.new("RGB", (8, 8), colour).save(made / f"{i}.png")
    return made


def sheet(tmp_path, seed=0):
    red, blue = folder(tmp_path, "red", "red"), folder(tmp_path, "blue", "blue")
    out = tmp_path / "sheet"
    assert make_sheet(red, blue, out, seed, size=16) == 6
    return out


def filled(out, name, answers):
    form = out / name
    with open(form, "w", newline="") as file:
        csv.writer(file).writerows([("row", "better"), *((i + 1, answer) for i, answer in enumerate(answers))])
    return form


def test_who_always_prefers_red_is_counted_for_red_whichever_side_it_is_on(tmp_path):
    out = sheet(tmp_path)
    with Image.open(out / "sheet.png") as picture:
        left = [picture.getpixel((LABEL + 4, i * 24 + 4)) for i in range(6)]
    assert set(left) == {(255, 0, 0), (0, 0, 255)}  # both orders are there
    answers = ["left" if pixel == (255, 0, 0) else "right" for pixel in left]
    found = tally(out / "key.json", [filled(out, "a.csv", answers)])
    assert (found.first, found.second, found.equal, found.preferred) == (6, 0, 0, 1.0)
    opposite = [{"left": "right", "right": "left"}[answer] for answer in answers[:5]] + ["Equal "]
    found = tally(out / "key.json", [filled(out, "a.csv", answers), filled(out, "b.csv", opposite)])
    assert (found.first, found.second, found.equal) == (6, 5, 1)
    assert found.low < found.preferred == 6 / 11 < found.high


def test_the_order_depends_on_the_seed_alone(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    keys = [json.loads((sheet(tmp_path / name, seed=3) / "key.json").read_text())["left is second"] for name in ("a", "b")]
    assert keys[0] == keys[1]


def test_wilsons_interval_is_the_closed_form():
    # Wilson 1927: the shares p0 at which (p - p0)^2 = z^2 p0 (1 - p0) / n
    low, high = wilson(7, 10)
    for edge in (low, high):
        assert (0.7 - edge) ** 2 == pytest.approx(1.96**2 * edge * (1 - edge) / 10)
    assert wilson(0, 0) == (0.0, 1.0)


@pytest.mark.parametrize(
    "answers, message", [(["left"] * 5, "row 6: ''"), (["left"] * 5 + ["both"], "row 6: 'both'; write left, right or equal")]
)
def test_a_form_with_a_gap_or_another_word_is_named(tmp_path, answers, message):
    out = sheet(tmp_path)
    with pytest.raises(ValueError, match=message):
        tally(out / "key.json", [filled(out, "a.csv", answers)])


def test_nothing_in_common_and_a_second_sheet_are_refused(tmp_path):
    out = sheet(tmp_path)
    other = folder(tmp_path, "other", "red", count=1)
    (other / "0.png").rename(other / "z.png")
    with pytest.raises(ValueError, match="no picture of the same name"):
        make_sheet(tmp_path / "red", other, tmp_path / "none")
    with pytest.raises(ValueError, match="holds a sheet already"):
        make_sheet(tmp_path / "red", tmp_path / "blue", out)


def test_pictures_keep_their_shape_and_those_without_a_counterpart_are_named(tmp_path):
    wide, tall = folder(tmp_path, "wide", "red", count=2), folder(tmp_path, "tall", "blue", count=1)
    Image.new("RGB", (16, 8), "red").save(wide / "0.png")
    (wide / "1.png").rename(wide / "1.jpg")
    with pytest.warns(UserWarning, match="in one of the two folders only, and left out: 1.jpg"):
        assert make_sheet(wide, tall, tmp_path / "sheet", size=16) == 1
    with Image.open(tmp_path / "sheet" / "sheet.png") as picture:
        column = {picture.getpixel((x + 8, 2)) for x in (LABEL, LABEL + 24)}
    assert column == {(255, 255, 255), (0, 0, 255)}  # white above the wide one


def test_a_grid_of_several_pictures_is_no_row(tmp_path):
    a, b = (folder(tmp_path, name, name, count=1) for name in ("red", "blue"))
    for one in (a, b):
        save_png(Image.new("RGB", (16, 16)), one / "grid.png", "a cat\nSteps: 1, Size: 8x8")
    with pytest.warns(UserWarning, match="grids of several pictures are left out: grid.png"):
        assert make_sheet(a, b, tmp_path / "sheet", size=16) == 1
