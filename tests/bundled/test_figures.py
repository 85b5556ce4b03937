"""Figures as a table and as JSON: nothing is lost on the way there and back, and what is no record is refused."""

import json
import math
from pathlib import Path

import pytest

import weights_loader
from minidiff.bundled.figures import LABELS, EvaluationRecord, Figure, Measure, Verdict, format_figures, from_json, to_json

SHARE = Figure(Measure(0.9757, 0.00846, 330), Measure(1.0, 0.0, 330), Measure(0.5, 0.25, 4))
NOTHING = Figure(Measure(math.nan, math.nan, 0), Measure(1.0, 0.0, 3), Measure(1.0, 0.0, 3))
FIGURES = dict.fromkeys(LABELS, SHARE) | {"style": None, "place": NOTHING}
RECORD = EvaluationRecord(
    steps=20,
    guidance_scale=4.0,
    figures=FIGURES,
    verdicts={
        ("a cat on a red background", 0): Verdict(True, True, None, None, None, 1 / 3),
        ('a cat "left of" a dog', 2): Verdict(False, True, None, False, True, -0.1),
    },
)


def test_a_record_comes_back_with_every_digit():
    back = from_json(to_json(RECORD))
    assert (back.steps, back.guidance_scale, back.verdicts) == (20, 4.0, RECORD.verdicts)
    assert math.isnan(back.figures["place"].model.value) and back.figures["place"].real == NOTHING.real
    assert back.figures | {"place": None} == FIGURES | {"place": None}


def test_the_json_is_everybodys_json_with_a_line_a_picture():
    def refuse(word):
        raise AssertionError(f"{word} is no JSON")

    text = to_json(RECORD)
    values = json.loads(text, parse_constant=refuse)
    assert values["figures"]["place"]["model"] == {"value": None, "error": None, "count": 0} and values["figures"]["style"] is None
    assert dict(zip(values["columns"], values["pictures"][0]))["prompt"] == "a cat on a red background"
    assert sum('background"' in line for line in text.splitlines() if "a cat" in line) == 1


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"steps": 20, "figures": {"one": null}, "pictures": []}', to_json(RECORD).replace("count", "counts")]
)
def test_what_is_no_record_is_refused(text):
    with pytest.raises(ValueError, match="not the record of an evaluation"):
        from_json(text)


def test_the_table_has_a_row_a_figure_that_was_asked():
    assert set(
        json.loads((Path(weights_loader.__file__).parent / "bundled" / "figures.json").read_text(encoding="utf-8"))["figures"]
    ) == set(LABELS)
    rows = format_figures(FIGURES).splitlines()
    assert len(rows) == 2 + 9
    assert "| one subject | 97.6 ± 0.8 % | 100.0 ± 0.0 % | 50.0 ± 25.0 % | 330 |" in rows
    assert "| KID | 0.9757 ± 0.0085 | 1.0000 ± 0.0000 | 0.5000 ± 0.2500 | 330 |" in rows
