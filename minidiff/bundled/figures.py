"""The evaluation's figures and verdicts, as a Markdown table and as JSON that keeps the verdict on every picture."""

import json
import math
from dataclasses import asdict, astuple, dataclass, fields

from minidiff.markdown import table_row


@dataclass(frozen=True)
class Verdict:
    """What the judge says of one picture; None if the prompt does not ask for it or the question makes no sense.

    subjects: the prompt's subject is the likeliest of all, or its two subjects are the likeliest two.
    background, style, tint: the prompt's choice is the likeliest.
    place: both subjects are right, and the first one's centre lies to the left (or above) by more than it lies up or down (or aside).
    """

    subjects: bool
    background: bool
    place: bool | None
    style: bool | None
    tint: bool | None
    alignment: float


@dataclass(frozen=True)
class Measure:
    """A mean over `count` pictures and its standard error, as if the pictures were independent draws."""

    value: float
    error: float
    count: int


@dataclass(frozen=True)
class Figure:
    """One question, asked of the model's pictures, of real scenes of the same prompts, and of these after the VAE."""

    model: Measure
    real: Measure
    reconstructed: Measure


# All figures of a model, by name; shares are 0..1. A figure is None if no picture was asked its question.
Figures = dict[str, Figure | None]
LABELS = {
    "one_subject": "one subject",
    "two_subjects": "two subjects, both right",
    "two_subjects_held_out_pairs": "of these, pairs that training never showed",
    "background": "background",
    "place": "place, where both are right",
    "style": "style word",
    "colour": "colour word that the subject never had in training",
    "colour_and_subject": "the same, and the subject right",
    "text_alignment": "text alignment",
    "kid": "KID",
}


@dataclass(frozen=True)
class EvaluationRecord:
    """An evaluation: how its pictures were made, the figures, and the verdict on each of the model's pictures by prompt and seed."""

    steps: int
    guidance_scale: float
    figures: Figures
    verdicts: dict[tuple[str, int], Verdict]


def format_figures(figures: Figures) -> str:
    """Format the figures as a Markdown table, shares in per cent."""
    rows = [table_row(("figure", "model", "real scenes", "after the VAE", "pictures")), "|---|---|---|---|---|"]
    for name, label in LABELS.items():
        if figure := figures[name]:
            show = "{:.4f} ± {:.4f}".format if name in ("text_alignment", "kid") else lambda v, e: f"{100 * v:.1f} ± {100 * e:.1f} %"
            cells = [show(m.value, m.error) for m in (figure.model, figure.real, figure.reconstructed)]
            rows.append(table_row((label, *cells, figure.model.count)))
    return "\n".join(rows)


def to_json(record: EvaluationRecord) -> str:
    """Write a record as JSON, one line per picture; the mean of nothing, which is not a number, is null."""
    columns = ["prompt", "seed", *(field.name for field in fields(Verdict))]
    figures = {name: figure and {k: null_for_nan(m) for k, m in asdict(figure).items()} for name, figure in record.figures.items()}
    rows = [json.dumps([prompt, seed, *astuple(verdict)], ensure_ascii=False) for (prompt, seed), verdict in record.verdicts.items()]
    head = {"steps": record.steps, "guidance_scale": record.guidance_scale, "figures": figures, "columns": columns}
    return json.dumps(head, indent=1)[:-2] + ',\n "pictures": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"


def null_for_nan(measure: dict[str, float]) -> dict[str, float | None]:
    """Replace nan, which JSON lacks, by None."""
    return {name: None if math.isnan(value) else value for name, value in measure.items()}


def from_json(text: str) -> EvaluationRecord:
    """Read what `to_json` wrote. Raises ValueError for anything else."""
    try:
        values = json.loads(text)
        found = values["figures"]
        if found.keys() != LABELS.keys():
            raise KeyError(*(found.keys() ^ LABELS.keys()))
        figures = {name: figure and Figure(**{kind: read_measure(**m) for kind, m in figure.items()}) for name, figure in found.items()}
        verdicts = {(prompt, seed): Verdict(*answers) for prompt, seed, *answers in values["pictures"]}
        return EvaluationRecord(values["steps"], values["guidance_scale"], figures, verdicts)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not the record of an evaluation ({error!r}); give a file that to_json wrote") from error


def read_measure(value: float | None, error: float | None, count: int) -> Measure:
    """Read a measure back, with nan for null."""
    return Measure(math.nan if value is None else value, math.nan if error is None else error, count)
