"""The runs' small files to tables, findings, and sheets of pictures.

Each number is a mean over subjects and seeds with its 95 % interval: the hierarchical bootstrap, which draws subjects with replacement and then,
for each, seeds with replacement; percentiles of the means. Differences are taken run by run, on the same subject, seed and noise.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from minidiff.bench.common import header, machine
from minidiff.bench.common import row as table_row
from minidiff.evaluation.alignment import Encoder
from minidiff.evaluation.kid import KID, kid
from minidiff.evaluation.weights import KINDS
from minidiff.study.learn import training_pictures
from minidiff.study.measure import class_features
from minidiff.study.plan import PAIR_VARIANTS, PICTURES, SEEDS, SHARES, SUBJECTS, UNTOUCHED, Run, custom, lora, methods, pictures, runs
from minidiff.viz import grid, save_png

DRAWS = 10_000
SCORES = ("likeness", "named", "text", "kept", "others", "drift")
STANDARD = ("methods", "custom-diffusion")

Values = Mapping[tuple[str, int], float]  # by subject (or subjects) and seed


@dataclass(frozen=True)
class Interval:
    """A mean, and where it lies with 95 % of the draws."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def interval(values: Values) -> Interval:
    """The mean over subjects of their means over seeds, with its hierarchical bootstrap. Raises ValueError for no values."""
    if not values:
        raise ValueError("no values to take a mean of")
    by_subject = [[value for (name, _), value in values.items() if name == subject] for subject in dict.fromkeys(name for name, _ in values)]
    rng = np.random.default_rng(0)
    draws = np.zeros(DRAWS)
    for _ in by_subject:  # a drawn subject each
        chosen = rng.integers(len(by_subject), size=DRAWS)
        for i, seeds in enumerate(by_subject):
            rows = np.flatnonzero(chosen == i)
            draws[rows] += np.asarray(seeds)[rng.integers(len(seeds), size=(len(rows), len(seeds)))].mean(axis=1)
    low, high = np.percentile(draws / len(by_subject), (2.5, 97.5))
    return Interval(float(np.mean([np.mean(seeds) for seeds in by_subject])), float(low), float(high))


@dataclass(frozen=True, eq=False)
class Results:
    """What the runs of a folder left, as read from their files."""

    folder: Path
    rows: tuple[dict, ...]

    def of(self, part: str, variant: str, number: str) -> dict[tuple[str, int], float]:
        """A score or a cost by subject and seed; nothing where there are no such runs."""
        found = {}
        for row in self.rows:
            run = row["run"]
            if (run["part"], run["variant"]) == (part, variant):
                value = row["scores"].get(number, row.get(number))
                if value is not None:
                    found["+".join(run["subjects"]), run["seed"]] = value
        return found

    def difference(self, one: tuple[str, str], other: tuple[str, str], number: str) -> Interval | None:
        """one - other on the subjects and seeds that both have; None without any."""
        a, b = self.of(*one, number), self.of(*other, number)
        both = {key: a[key] - b[key] for key in a if key in b}
        return interval(both) if both else None

    def kid(self, judge: Encoder, part: str, variant: str) -> KID | None:
        """Of all runs' class pictures against real scenes of the same prompts."""
        drawn, real, groups = [], [], []
        for row in self.rows:
            run = row["run"]
            if (run["part"], run["variant"]) != (part, variant):
                continue
            path = self.folder / "features" / f"{row['name']}.npy"
            (subject,) = run["subjects"]
            drawn.append(torch.from_numpy(np.load(path).astype(np.float32)))
            with torch.no_grad():
                real.append(class_features(judge, SUBJECTS[subject]))
            # Pictures of one class resemble each other across runs too, and so does what they are compared with.
            groups.append(torch.full((len(drawn[-1]),), list(SUBJECTS).index(subject)) * 1000 + torch.arange(len(drawn[-1])))
        if not drawn:
            return None
        both = torch.cat(groups)
        _, group = both.unique(return_inverse=True)
        return kid(torch.cat(drawn), torch.cat(real), groups=(group, group), blocks=10)


def read(folder: Path) -> Results:
    """All results of a folder. Raises ValueError if there are none."""
    paths = sorted((folder / "results").glob("*.json"))
    if not paths:
        raise ValueError(f"{folder}: no results; run minidiff evaluate study {folder} first")
    return Results(folder, tuple({**json.loads(path.read_text(encoding="utf-8")), "name": path.stem} for path in paths))


# --- tables -----------------------------------------------------------------------------------------------------------


def lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join((header(head), *map(table_row, rows)))


def shown(value: Interval | None) -> str:
    """In a table, where the intervals are wide."""
    if value is None:
        return ""
    mean, low, high = (f"{round(number, 2) + 0.0:.2f}" for number in (value.mean, value.low, value.high))  # + 0.0: no minus before 0.00
    return f"{mean} [{low}, {high}]"


def mean(values: Values) -> float:
    return sum(values.values()) / len(values)


def kids(results: Results, judge: Encoder) -> dict[str, KID]:
    """Of each method."""
    found = {name: results.kid(judge, "methods", name) for name in (UNTOUCHED, *methods())}
    return {name: distance for name, distance in found.items() if distance}


def methods_table(results: Results, distances: Mapping[str, KID]) -> str:
    """What each method gives, and forgets."""
    rows = []
    for name in (UNTOUCHED, *methods()):
        if not results.of("methods", name, "likeness"):
            continue
        gain = results.difference(("methods", name), ("methods", UNTOUCHED), "likeness")
        rows.append([
            name, *(shown(interval(results.of("methods", name, score))) for score in SCORES),
            f"{1000 * distances[name].value:.0f} ± {1000 * distances[name].error:.0f}", "" if name == UNTOUCHED else "yes" if gain and gain.low > 0 else "no",
        ])  # fmt: skip
    return lines(("method", *SCORES, "KID x 1000", "learnt"), rows)


def costs_table(results: Results) -> str:
    """What each method costs."""
    rows = []
    for name in methods():
        if seconds := results.of("methods", name, "seconds"):
            trained, kept, memory = (mean(results.of("methods", name, number)) for number in ("trained", "bytes", "memory"))
            rows.append([name, f"{trained:,.0f}", f"{kept / 1e6:.2f} MB", f"{mean(seconds):.0f} s", f"{memory / 1e6:.0f} MB"])
    return lines(("method", "numbers trained", "file, float32", "training", "memory"), rows)


def changes_table(results: Results, part: str, names: Sequence[str], standard: tuple[str, str], scores: Sequence[str]) -> str:
    """Each variant's difference to the standard, on the same runs."""
    rows = [
        [name, *(shown(results.difference((part, name), standard, score)) for score in scores)]
        for name in names
        if results.of(part, name, scores[0])
    ]
    return lines((f"minus {standard[1]}", *scores), rows)


def pairs_table(results: Results) -> str:
    rows = [
        [name, *(shown(interval(results.of("pairs", name, score))) for score in ("both", *SCORES))]
        for name in (UNTOUCHED, *PAIR_VARIANTS)
        if results.of("pairs", name, "both")
    ]
    return lines(("two subjects", "both", *SCORES), rows)


def style_table(results: Results) -> str:
    scores = ("chroma", "chroma_given", "named", "others", "drift")
    rows = []
    for name in (UNTOUCHED, "custom-diffusion", "lora"):
        if results.of("style", name, "chroma"):
            rows.append([name, *(f"{mean(results.of('style', name, score)):.3f}" for score in scores)])
    return lines(("style", *scores), rows)


def tables(results: Results, distances: Mapping[str, KID]) -> dict[str, str]:
    """All tables that the results give, by title; of parts without results none. distances: of `kids`."""
    compression = [f"share {share}" for share in SHARES]
    made = {
        "Methods": methods_table(results, distances),
        "What they cost": costs_table(results),
        "Two subjects": pairs_table(results),
        "Custom Diffusion, one thing changed": changes_table(results, "custom", list(custom()), STANDARD, SCORES),
        "Compression": changes_table(results, "compression", compression, STANDARD, ("likeness", "named", "text", "kept")),
        "Number of pictures": changes_table(results, "pictures", list(pictures()), STANDARD, SCORES),
        "LoRA, one thing changed": changes_table(results, "lora", list(lora()), ("methods", "lora"), SCORES),
        "A style from ten pictures": style_table(results),
    }
    return {title: table for title, table in made.items() if table.count("\n") > 1}


# --- findings ---------------------------------------------------------------------------------------------------------

HOLDS, FAILS, NOT_DECIDED = "holds", "does not hold", "is not decided"


@dataclass(frozen=True)
class Finding:
    """A sentence of the paper, whether it holds here, and the figures that say so."""

    claim: str
    holds: str
    figures: str


LITTLE = 0.05  # of scores that run from 0 to 1


def decided(difference: Interval | None, wanted: str) -> str:
    """Whether a difference is as a claim says: "above" 0, "below" 0, or "little", nearer to 0 than LITTLE; by its whole interval."""
    if difference is None:
        return NOT_DECIDED
    low, high = difference.low, difference.high
    if wanted == "below":
        low, high = -high, -low
    if wanted == "little":
        return HOLDS if -LITTLE < low and high < LITTLE else FAILS if low > LITTLE or high < -LITTLE else NOT_DECIDED
    return HOLDS if low > 0 else FAILS if high < 0 else NOT_DECIDED


def together(*verdicts: str) -> str:
    """Of a claim in several parts."""
    return next((word for word in (FAILS, NOT_DECIDED) if word in verdicts), HOLDS)


def findings(results: Results) -> list[Finding]:
    """Kumari et al. 2023, each claim with its own figures; those whose runs are there."""
    found = []
    moved = [row for row in results.rows if (row["run"]["part"], row["run"]["variant"]) == ("methods", "dreambooth")]
    if moved:
        kinds = {kind: {key_of(row): row["changes"][kind] for row in moved} for kind in KINDS}
        cross, *rest = kinds.values()
        gap = interval({key: cross[key] - max(kind[key] for kind in rest) for key in cross})
        figures = "; ".join(f"{kind} {100 * mean(values):.2f} %" for kind, values in kinds.items())
        found.append(Finding("In full fine-tuning the weights of cross-attention move most.", decided(gap, "above"), f"mean of |W' - W| / |W|: {figures}"))

    def compare(claim: str, one: tuple[str, str], other: tuple[str, str], wanted: Mapping[str, str]) -> None:
        gaps = {score: results.difference(one, other, score) for score in wanted}
        if all(gap is not None for gap in gaps.values()):
            figures = "; ".join(f"{score} {gap}" for score, gap in gaps.items())
            found.append(Finding(claim, together(*(decided(gap, wanted[score]) for score, gap in gaps.items())), f"{one[1]} minus {other[1]}: {figures}"))

    compare("Keys and values suffice: all weights are not better.", ("custom", "all weights"), STANDARD, {"likeness": "little", "text": "little"})
    compare("Regularisation prevents forgetting.", ("custom", "no regularisation"), STANDARD, {"kept": "below"})
    compare("Joint training is better than the merge, by little.", ("pairs", "joint"), ("pairs", "merged"), {"text": "above"})
    compare("The merge is better than training one after the other, by little.", ("pairs", "merged"), ("pairs", "sequential"), {"text": "above"})
    compare("Compression to 60 % costs little.", ("compression", "share 0.6"), STANDARD, {"likeness": "little", "text": "little"})
    for other in ("lora", "dreambooth", "custom-diffusion"):
        wanted = {"kept": "above", "likeness": "below"}
        compare("Textual Inversion keeps the class best and the subject least.", ("methods", "textual-inversion"), ("methods", other), wanted)
    return found


def key_of(row: dict) -> tuple[str, int]:
    return "+".join(row["run"]["subjects"]), row["run"]["seed"]


# --- sheets -----------------------------------------------------------------------------------------------------------


FIRST_ROWS = {"custom": STANDARD, "compression": STANDARD, "pictures": STANDARD, "lora": ("methods", "lora")}  # what a part's variants differ from


def sheet(results: Results, part: str, subjects: Sequence[str], seed: int) -> Image.Image:
    """The pictures that were learnt from, and a row for each variant of a part, its name beside it."""

    images = [(f"pictures: {subject}", grid(training_pictures(subject, seed), columns=PICTURES)) for subject in subjects]
    first = [FIRST_ROWS[part]] if part in FIRST_ROWS else []
    for place, variant in (*first, *dict.fromkeys((part, run.variant) for run in runs(part))):
        path = results.folder / "rows" / f"{Run(place, variant, tuple(subjects), seed).name}.png"
        if path.exists():
            images.append((variant, Image.open(path).convert("RGB")))
    label = 150
    width, height = max(image.width for _, image in images), images[0][1].height
    made = Image.new("RGB", (label + width, height * len(images)), "white")
    draw = ImageDraw.Draw(made)
    for i, (name, image) in enumerate(images):
        draw.text((6, i * height + height // 2 - 5), name, fill="black")
        made.paste(image, (label, i * height))
    return made


def as_text(made: Mapping[str, str], claims: Sequence[Finding]) -> str:
    """All tables and findings, as Markdown."""
    text = "\n\n".join(f"### {title}\n\n{table}" for title, table in made.items())
    return text + "\n\n### Findings\n\n" + "\n".join(f"- {one.claim} This **{one.holds}** here: {one.figures}." for one in claims) + "\n"


def write(results: Results, judge: Encoder) -> str:
    """folder/study.json, folder/study.md and the sheets of the first seed, PART-SUBJECTS.png; gives the text of study.md."""
    distances, claims = kids(results, judge), findings(results)
    text = as_text(tables(results, distances), claims)
    (results.folder / "study.md").write_text(text, encoding="utf-8")
    head = {"commands": ["minidiff evaluate study OUT", "minidiff evaluate report OUT"], "machine": machine()}
    head |= {"findings": [asdict(one) for one in claims], "kid": {name: asdict(one) for name, one in distances.items()}}
    rows = ",\n".join(json.dumps(row) for row in results.rows)  # a line each
    (results.folder / "study.json").write_text(json.dumps(head, indent=1)[:-2] + f',\n "results": [\n{rows}\n]}}\n', encoding="utf-8")
    for part, subjects in dict.fromkeys((row["run"]["part"], tuple(row["run"]["subjects"])) for row in results.rows if row["run"]["seed"] == SEEDS[0]):
        few_colours = sheet(results, part, subjects, SEEDS[0]).quantize(256)  # a third of the bytes
        save_png(few_colours, results.folder / f"{'-'.join((part, *subjects))}.png")
    return text
