"""People's preference: a sheet of pairs in random order, a form, and its tally."""

import csv
import json

import numpy as np
import pytest
from PIL import Image

from minidiff.evaluation.pairs import LABEL, dependence, make_sheet, tally, wilson
from minidiff.pictures import save_png


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
    def key(name, seed):
        (tmp_path / name).mkdir()
        return json.loads((sheet(tmp_path / name, seed) / "key.json").read_text())["left is second"]

    assert key("a", 3) == key("b", 3) != key("c", 4)


def test_wilsons_interval_is_the_closed_form():
    # Wilson 1927: the shares p0 at which (p - p0)^2 = z^2 p0 (1 - p0) / n
    low, high = wilson(7, 10)
    for edge in (low, high):
        assert (0.7 - edge) ** 2 == pytest.approx(1.96**2 * edge * (1 - edge) / 10)
    assert wilson(0, 0) == (0.0, 1.0)
    assert wilson(28, 40, times=4) == pytest.approx((low, high))  # 40 answers that are worth 10


def test_answers_that_resemble_each_other_count_less():
    rows = np.array([1.0, 1, -1, 1, -1, 0])
    assert dependence(rows[None]) == 1  # of one person each row counts
    # four who answer alike are one: the variance of the share is that of one person's five answers, not of twenty
    assert dependence(np.tile(rows, (4, 1))) == pytest.approx(4)
    assert dependence(np.array([[1.0] * 6, [-1.0] * 6])) == pytest.approx(6)  # everybody the same in every row
    assert dependence(np.zeros((2, 3))) == dependence(np.ones((2, 3))) == 1


def test_the_interval_covers_what_it_should_where_rows_differ():
    rng = np.random.default_rng(0)
    rows = lambda: 1 / (1 + np.exp(-1.5 * rng.normal(size=20)))
    covered = {True: 0, False: 0}
    for _ in range(500):
        values = np.where(rng.random((10, 20)) < rows(), 1.0, -1.0)
        for aware in covered:
            low, high = wilson(int((values > 0).sum()), 200, dependence(values) if aware else 1.0)
            covered[aware] += low <= 0.5 <= high
    # of 500 draws 95 % are 475 +- 5; with 20 rows the estimate of the variance costs some of it
    assert covered[True] > 440 > 380 > covered[False]


@pytest.mark.parametrize(
    "text, message",
    [
        ("row,better\n1,left\n2,left\n3,left\n4,left\n5,left\n", "row 6: ''; write left, right or equal"),
        ("row,better\n1,both\n", "row 1: 'both'; write left, right or equal"),
        ("row,better\n1,left\n1,right\n", "row 1 stands there twice"),
        ("row,better\n7,left\n", "a row '7', but the sheet has rows 1 to 6; is it another sheet's form"),
    ],
)
def test_a_form_with_a_gap_or_another_word_or_row_is_named(tmp_path, text, message):
    out = sheet(tmp_path)
    (out / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        tally(out / "key.json", [out / "a.csv"])


def test_forms_of_other_spreadsheets_are_read_and_files_that_are_no_key_refused(tmp_path):
    out = sheet(tmp_path)
    (out / "a.csv").write_text(
        "\ufeffrow;better (left, right, equal)\n" + "".join(f"{i};Left\n" for i in range(1, 7)) + ";\n", encoding="utf-8"
    )
    found = tally(out / "key.json", [out / "a.csv"])
    assert found.first + found.second == 6
    with pytest.raises(ValueError, match="given twice"):
        tally(out / "key.json", [out / "a.csv", tmp_path / "sheet" / "." / "a.csv"])
    for text in ("row,better", "[]", "3", '{"left is second": 6, "first": "a", "second": "b"}', '{"left is second": [true]}', ""):
        (out / "b.json").write_text(text)
        with pytest.raises(ValueError, match="b.json: not the key of a sheet"):
            tally(out / "b.json", [out / "a.csv"])
    (out / "a.csv").write_bytes("row,größer\n1,left".encode("latin1"))
    with pytest.raises(ValueError, match="a.csv: not UTF-8"):
        tally(out / "key.json", [out / "a.csv"])


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
