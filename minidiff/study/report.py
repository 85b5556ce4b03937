"""The study's report: tables, findings and sheets of pictures from the files of its runs.

Each number is a mean over subjects and seeds, with a 95 % confidence interval for other subjects: Student's, over the subjects' own means.
Differences are taken run by run, on the same subject, seed and noise.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw

from minidiff.bundled.edits import renew_tables
from minidiff.evaluation.alignment import Encoder
from minidiff.evaluation.kid import KID, kid
from minidiff.evaluation.weights import KINDS
from minidiff.files import write_text
from minidiff.markdown import format_bytes, format_fixed, markdown_table
from minidiff.pictures import grid, save_png
from minidiff.study.learn import draw_training_pictures
from minidiff.study.measure import encode_class_scenes
from minidiff.study.plan import (
    PAIR_VARIANTS,
    PICTURES,
    SEEDS,
    SHARES,
    SUBJECTS,
    UNTOUCHED,
    StudyRun,
    custom_variants,
    list_runs,
    lora_variants,
    method_variants,
    picture_variants,
    unmended_variants,
)

STUDENT = (12.706, 4.303, 3.182, 2.776)  # 97.5 % quantiles of Student's t with 1, 2, 3 and 4 degrees of freedom
SCORES = ("likeness", "named", "text", "kept", "others", "drift")
ALIGNMENTS = ("text", "likeness")  # the paper's two
SHARES_OF_PICTURES = ("named", "kept", "others", "both")
STANDARD = ("methods", "custom-diffusion")
SMALLER = [f"share {share}" for share in SHARES]

Values = Mapping[tuple[str, int], float]  # by subject (or subjects) and seed


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval."""

    mean: float
    low: float
    high: float


def interval_over_subjects(values: Values) -> Interval:
    """Return the mean over subjects of their means over seeds, with its 95 % interval.

    Results for different seeds of one subject are correlated, so each subject counts as one observation; with a single subject the interval
    is unbounded. Raises ValueError for no values, and for more subjects than the study has.
    """
    subjects = list(dict.fromkeys(name for name, _ in values))
    if not 0 < len(subjects) <= len(SUBJECTS):
        raise ValueError(f"values of {len(subjects)} subjects; give those of 1 to {len(SUBJECTS)}")
    means = np.asarray([np.mean([value for (name, _), value in values.items() if name == subject]) for subject in subjects])
    half = STUDENT[len(means) - 2] * means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else np.inf
    return Interval(float(means.mean()), float(means.mean() - half), float(means.mean() + half))


@dataclass(frozen=True, eq=False)
class Results:
    """The results of a folder's runs, as read from their files."""

    folder: Path
    rows: tuple[dict, ...]

    def runs(self, part: str, variant: str) -> dict[tuple[str, int], dict]:
        """Return the rows of a variant by subject (or subjects) and seed."""
        rows = [row for row in self.rows if (row["run"]["part"], row["run"]["variant"]) == (part, variant)]
        return {("+".join(row["run"]["subjects"]), row["run"]["seed"]): row for row in rows}

    def values(self, part: str, variant: str, number: str) -> dict[tuple[str, int], float]:
        """Return a score or a cost by subject and seed, empty without such runs."""
        found = {key: row["scores"].get(number, row.get(number)) for key, row in self.runs(part, variant).items()}
        return {key: value for key, value in found.items() if value is not None}

    def difference(self, one: tuple[str, str], other: tuple[str, str], number: str) -> Interval | None:
        """Return one - other on the subjects and seeds that both have, None without any."""
        a, b = self.values(*one, number), self.values(*other, number)
        both = {key: a[key] - b[key] for key in a if key in b}
        return interval_over_subjects(both) if both else None

    def kid(self, judge: Encoder, part: str, variant: str) -> KID:
        """Return the KID between the class pictures of all runs of a variant and real scenes of the same prompts."""
        drawn, real, groups = [], [], []
        for (subject, seed), row in self.runs(part, variant).items():
            drawn.append(torch.from_numpy(np.load(self.folder / "features" / f"{row['name']}.npy").astype(np.float32)))
            real.append(encode_class_scenes(judge, SUBJECTS[subject], seed))
            # Pictures of one prompt resemble each other across runs too, and so does what they are compared with.
            groups.append(torch.full((len(drawn[-1]),), list(SUBJECTS).index(subject)) * 1000 + torch.arange(len(drawn[-1])))
        _, group = torch.cat(groups).unique(return_inverse=True)
        return kid(torch.cat(drawn), torch.cat(real), groups=(group, group), blocks=10)


def read_results(folder: Path) -> Results:
    """Read all results of a folder. Raises ValueError if there are none."""
    paths = sorted((folder / "results").glob("*.json"))
    if not paths:
        raise ValueError(f"{folder}: no results; run minidiff evaluate study {folder} first")
    return Results(folder, tuple({**json.loads(path.read_text(encoding="utf-8")), "name": path.stem} for path in paths))


# --- tables -----------------------------------------------------------------------------------------------------------


def format_interval(value: Interval | None, share: bool = False, digits: int = 2) -> str:
    """Format a mean and its interval for a table. share: the value lies in 0..1, so its interval is clipped to that."""
    if value is None:
        return ""
    low, high = (max(0.0, value.low), min(1.0, value.high)) if share else (value.low, value.high)
    return f"{format_fixed(value.mean, digits)} [{format_fixed(low, digits)}, {format_fixed(high, digits)}]"


def mean_over_runs(values: Values) -> float:
    """Return the plain mean over subjects and seeds."""
    return sum(values.values()) / len(values)


def kid_by_method(results: Results, judge: Encoder) -> dict[str, KID]:
    """Return the KID of each method that has runs."""
    return {name: results.kid(judge, "methods", name) for name in (UNTOUCHED, *method_variants()) if results.runs("methods", name)}


def format_scores(results: Results, part: str, name: str, scores: Sequence[str]) -> list[str]:
    """Format the means of several scores of one variant.

    Args:
        results: Of the folder.
        part: Of the study.
        name: Of the variant.
        scores: Names of scores.
    """
    return [format_interval(interval_over_subjects(results.values(part, name, score)), score in SHARES_OF_PICTURES) for score in scores]


def make_methods_table(results: Results, distances: Mapping[str, KID]) -> str:
    """Format what each method gives and forgets.

    gain: in likeness over the untouched model. learned: "yes" if the interval of `named` excludes 0, the untouched model's value.
    """

    def row(name: str) -> list[str]:
        gain, named = (results.difference(("methods", name), ("methods", UNTOUCHED), score) for score in ("likeness", "named"))
        likeness, *others = format_scores(results, "methods", name, SCORES)
        distance = f"{1000 * distances[name].value:.0f} ± {1000 * distances[name].error:.0f}"
        if name == UNTOUCHED:
            return [name, likeness, "", *others, distance, ""]
        return [name, likeness, format_interval(gain), *others, distance, "yes" if named and named.low > 0 else "no"]

    rows = [row(name) for name in (UNTOUCHED, *method_variants()) if results.runs("methods", name)]
    return markdown_table(("method", "likeness", "gain", *SCORES[1:], "KID x 1000", "learned"), rows)


def make_costs_table(results: Results) -> str:
    """Format what each method costs, and what two subjects cost."""

    def row(part: str, name: str, label: str) -> list[str]:
        numbers = ("trained", "bytes", "seconds", "memory")
        trained, kept, seconds, memory = (mean_over_runs(results.values(part, name, number)) for number in numbers)
        return [label, f"{trained:,.0f}", format_bytes(kept), f"{seconds:.0f} s", format_bytes(memory)]

    places = [("methods", name, name) for name in method_variants()] + [("pairs", name, f"two subjects: {name}") for name in PAIR_VARIANTS]
    rows = [row(part, name, label) for part, name, label in places if results.runs(part, name)]
    return markdown_table(("method", "numbers trained", "file, float32", "training", "memory, computed"), rows)


def make_changes_table(results: Results, part: str, names: Sequence[str], standard: tuple[str, str], scores: Sequence[str] = SCORES) -> str:
    """Format each variant's difference to a standard, on the same runs, and its file size if sizes differ.

    Args:
        results: Of the study.
        part: The part that the variants belong to.
        names: The variants, one row each.
        standard: The (part, variant) that is subtracted.
        scores: One column each.
    """
    present = [name for name in names if results.runs(part, name)]
    sizes = {name: format_bytes(mean_over_runs(results.values(part, name, "bytes"))) for name in present}
    differ = len(set(sizes.values())) > 1
    rows = [
        [
            name,
            *(format_interval(results.difference((part, name), standard, score)) for score in scores),
            *([sizes[name]] if differ else []),
        ]
        for name in present
    ]
    return markdown_table((f"minus {standard[1]}", *scores, *(["file"] if differ else [])), rows)


def make_pairs_table(results: Results) -> str:
    """Format the scores of two subjects learned together."""
    scores = ("both", *SCORES)
    names = (UNTOUCHED, *PAIR_VARIANTS)
    return markdown_table(
        ("two subjects", *scores), [[name, *format_scores(results, "pairs", name, scores)] for name in names if results.runs("pairs", name)]
    )


def make_before_table(results: Results) -> str:
    """Format methods before and after they were mended, on the same runs."""
    scores = ("likeness", "named", "text")

    def cells(name: str, score: str) -> tuple[str, str, str]:
        old, new = (results.values(part, name, score) for part in ("before", "methods"))
        before, after = (mean_over_runs({key: values[key] for key in old if key in new}) for values in (old, new))
        return f"{before:.2f}", f"{after:.2f}", format_interval(results.difference(("methods", name), ("before", name), score))

    compared = [name for name in unmended_variants() if results.difference(("methods", name), ("before", name), "likeness")]
    return markdown_table(
        ("mended", *(f"{score}{part}" for score in scores for part in (" before", " after", " gain"))),
        [[name, *chain.from_iterable(cells(name, score) for score in scores)] for name in compared],
    )


def make_style_table(results: Results) -> str:
    """Format the scores of a style learned from ten pictures."""
    scores = ("chroma", "chroma_given", "named", "others", "drift")
    rows = [
        [name, *(format_fixed(mean_over_runs(results.values("style", name, score)), 3) for score in scores)]
        for name in (UNTOUCHED, "custom-diffusion", "lora")
        if results.runs("style", name)
    ]
    return markdown_table(("style", *scores), rows)


def make_tables(results: Results, distances: Mapping[str, KID]) -> dict[str, str]:
    """Format all tables by title, without those that would be empty. distances: from `kid_by_method`."""
    made = {
        "Methods": make_methods_table(results, distances),
        "What they cost": make_costs_table(results),
        "Before and after": make_before_table(results),
        "Two subjects": make_pairs_table(results),
        "Custom Diffusion, one thing changed": make_changes_table(results, "custom", list(custom_variants()), STANDARD),
        "Compression": make_changes_table(results, "compression", SMALLER, STANDARD, ("likeness", "named", "text", "kept")),
        "Number of pictures": make_changes_table(results, "pictures", list(picture_variants()), STANDARD),
        "LoRA, one thing changed": make_changes_table(results, "lora", list(lora_variants()), ("methods", "lora")),
        "A style from ten pictures": make_style_table(results),
    }
    return {title: table for title, table in made.items() if table.count("\n") > 1}


# --- findings ---------------------------------------------------------------------------------------------------------

HOLDS, FAILS, NOT_DECIDED = "holds", "does not hold", "is not decided"


@dataclass(frozen=True)
class Finding:
    """A claim of the paper, whether it holds here, and the figures that decide it. gaps: the differences among these, by name."""

    claim: str
    holds: str
    figures: str
    gaps: tuple[tuple[str, Interval], ...] = ()


LITTLE = 0.05  # a difference that does not count, of scores that run from 0 to 1
WANTED = {
    "better": (1, 0.0),
    "worse": (-1, 0.0),
    "at least as good": (1, -LITTLE),
    "at most as good": (-1, -LITTLE),
}  # sign, and what it is above


def decide(difference: Interval | None, wanted: str) -> str:
    """Decide by its whole interval whether a difference is as a claim says.

    wanted: "better" or "worse", "at least as good" or "at most as good"; the last two leave a margin of LITTLE.
    """
    if difference is None:
        return NOT_DECIDED
    sign, least = WANTED[wanted]
    low, high = sorted((sign * difference.low, sign * difference.high))
    return HOLDS if low > least else FAILS if high < least else NOT_DECIDED


@dataclass(frozen=True)
class Gap:
    """What a claim expects of one difference: the score of `one` minus that of `other`, each a (part, variant), is as `wanted` says."""

    one: tuple[str, str]
    other: tuple[str, str]
    score: str
    wanted: str


EVERYTHING, UNREGULARISED, SMALLER_FILE = ("custom", "all weights"), ("custom", "no regularisation"), ("compression", "share 0.6")
JOINT, MERGED, SEQUENTIAL = ("pairs", "joint"), ("pairs", "merged"), ("pairs", "sequential")
INVERSION, RIVALS = ("methods", "textual-inversion"), (STANDARD, ("methods", "dreambooth"))
CLAIMS = {  # Kumari et al. 2023
    "Keys and values suffice: all weights are not better.": [Gap(EVERYTHING, STANDARD, score, "at most as good") for score in ALIGNMENTS],
    "Regularisation prevents forgetting: without it the class is lost more often.": [Gap(UNREGULARISED, STANDARD, "kept", "worse")],
    "Joint training is better than the merge.": [Gap(JOINT, MERGED, score, "better") for score in ALIGNMENTS],
    "The merge is better than training one after the other.": [Gap(MERGED, SEQUENTIAL, score, "better") for score in ALIGNMENTS],
    "Compression to 60 % costs little.": [Gap(SMALLER_FILE, STANDARD, score, "at least as good") for score in ALIGNMENTS],
    "Of Custom Diffusion, DreamBooth and Textual Inversion the last keeps the class best.": [
        Gap(INVERSION, rival, "kept", "better") for rival in RIVALS
    ],
    "Of the three Textual Inversion keeps the subject least.": [Gap(INVERSION, rival, "likeness", "worse") for rival in RIVALS],
}


def judge_claims(results: Results) -> list[Finding]:
    """Judge each claim of Kumari et al. 2023 whose runs are there."""
    found = [judge_weight_changes(results), *(judge_claim(results, claim, gaps) for claim, gaps in CLAIMS.items())]
    return [finding for finding in found if finding is not None]


def judge_claim(results: Results, claim: str, gaps: Sequence[Gap]) -> Finding | None:
    """Judge a claim by the differences that it speaks of, None if the runs of one are missing."""
    differences = {f"{gap.one[1]} minus {gap.other[1]}: {gap.score}": results.difference(gap.one, gap.other, gap.score) for gap in gaps}
    known = tuple((name, difference) for name, difference in differences.items() if difference is not None)
    if len(known) < len(gaps):
        return None
    verdicts = [decide(difference, gap.wanted) for (_, difference), gap in zip(known, gaps)]
    verdict = next((word for word in (FAILS, NOT_DECIDED) if word in verdicts), HOLDS)  # a claim holds if all of its parts do
    return Finding(claim, verdict, "; ".join(f"{name} {format_interval(gap, digits=3)}" for name, gap in known), known)


def judge_weight_changes(results: Results) -> Finding | None:
    """Judge by |W' - W| / |W| whether full fine-tuning moves cross-attention most, None without runs of it."""
    runs = results.runs("methods", "dreambooth")
    if not runs:
        return None
    kinds = {kind: {key: row["changes"][kind] for key, row in runs.items()} for kind in KINDS}
    cross, *rest = kinds.values()
    gap = interval_over_subjects({key: cross[key] - max(kind[key] for kind in rest) for key in cross})
    changes = "; ".join(f"{kind} {100 * mean_over_runs(values):.2f} %" for kind, values in kinds.items())
    lead = f"{100 * gap.mean:.2f} [{100 * gap.low:.2f}, {100 * gap.high:.2f}] %"
    figures = f"mean of |W' - W| / |W|: {changes}; cross-attention minus the larger of the others {lead}"
    return Finding("In full fine-tuning the weights of cross-attention move most.", decide(gap, "better"), figures)


# --- sheets -----------------------------------------------------------------------------------------------------------


FIRST_ROWS = {
    "custom": [STANDARD],
    "compression": [STANDARD],
    "pictures": [STANDARD],
    "lora": [("methods", "lora")],
}  # what a part's variants differ from


def make_sheet(results: Results, part: str, subjects: Sequence[str], seed: int) -> Image.Image:
    """Draw the training pictures, and one row for each variant of a part with its name.

    Args:
        results: Of the folder, which has the rows as files.
        part: Of the study.
        subjects: Of the runs that are shown.
        seed: Of the runs that are shown.
    """
    images = [(f"pictures: {subject}", grid(draw_training_pictures(subject, seed), columns=PICTURES)) for subject in subjects]
    for place, variant in (*FIRST_ROWS.get(part, ()), *dict.fromkeys((part, run.variant) for run in list_runs(part))):
        path = results.folder / "rows" / f"{StudyRun(place, variant, tuple(subjects), seed).name}.png"
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


STEP, NAMES, SCALE, LINE = 0.1, 360, 480, 20  # of the axis; pixels: of the names, of 1 on the axis, of a line


def draw_intervals(rows: Sequence[tuple[str, Interval]]) -> Image.Image:
    """Draw each interval as a line with a dot at its mean, over one axis with a line at 0; unbounded ones are left out."""
    rows = [(name, one) for name, one in rows if np.isfinite((one.low, one.high)).all()]
    first = math.floor(min([0.0, *(one.low for _, one in rows)]) / STEP)
    last = math.ceil(max([0.0, *(one.high for _, one in rows)]) / STEP)

    def at(value: float) -> float:
        return NAMES + (value - first * STEP) * SCALE

    height = LINE * (len(rows) + 1)
    made = Image.new("RGB", (int(at(last * STEP)) + LINE, height), "white")
    draw = ImageDraw.Draw(made)
    for i in range(first, last + 1):
        draw.line([(at(i * STEP), 0), (at(i * STEP), height - LINE)], fill="black" if i == 0 else "lightgrey")
        draw.text((at(i * STEP) - 10, height - LINE + 4), format_fixed(i * STEP, 1), fill="black")
    for i, (name, one) in enumerate(rows):
        middle = LINE * i + LINE // 2
        draw.text((6, middle - 5), name, fill="black")
        draw.line([(at(one.low), middle), (at(one.high), middle)], fill="royalblue", width=2)
        draw.ellipse([at(one.mean) - 4, middle - 4, at(one.mean) + 4, middle + 4], fill="royalblue")
    return made


LEGEND = """\
Means with 95 % intervals for other subjects (Student's, over the subjects' own means); differences are taken run by run. The judge of
the scenes looks at all pictures. likeness: cosine of the subject's pictures with those it was learned from; gain: what training added.
named: share of them in which the judge finds the subject likelier than any other; learned: whether its interval excludes 0, the
untouched model's value. text: cosine of new prompts' pictures with their text. kept: share of the class's pictures that show the class;
others: the same of other subjects; drift: 1 - cosine with what the untouched model drew. KID: of the class's pictures and real scenes,
with its standard error over prompts. both: share of new prompts of two subjects in which these are the two likeliest. Training leaves
out the drawing of class pictures. "all weights" are trained as DreamBooth does, so that its word and rate differ too."""


def format_report(made: Mapping[str, str], claims: Sequence[Finding]) -> str:
    """Format all tables and findings as Markdown."""
    text = "\n\n".join(f"### {title}\n\n{table}" for title, table in made.items())
    return f"{LEGEND}\n\n{text}\n\n### Findings\n\n{format_findings(claims)}\n"


def format_findings(claims: Sequence[Finding]) -> str:
    """Format each finding as an item of a Markdown list."""
    return "\n".join(f"- {one.claim} This **{one.holds}** here: {one.figures}." for one in claims)


README_TABLES = {"methods": "Methods", "costs": "What they cost", "before": "Before and after", "pairs": "Two subjects"}


def select_for_readme(made: Mapping[str, str], claims: Sequence[Finding]) -> dict[str, str]:
    """Return what README.md shows of the report, by the names of its marks: the tables of README_TABLES, and "findings".

    made, claims: from `make_tables` and `judge_claims`. A table that the results do not have is left as it is.
    """
    return {mark: made[title] for mark, title in README_TABLES.items() if title in made} | {"findings": format_findings(claims)}


def write_report(results: Results, judge: Encoder, readme: Path | None = None) -> str:
    """Write the report into the results' folder, and return the text of study.md.

    study.md has tables and findings, study.json all numbers; findings.png and compression.png draw intervals, PART-SUBJECTS.png the
    pictures of the first seed. In `readme` the tables of `select_for_readme` are renewed between their marks; raises ValueError, before
    anything is computed or written, if it lacks one.
    """
    if readme is not None:
        renew_tables(readme.read_text(encoding="utf-8"), dict.fromkeys((*README_TABLES, "findings"), ""))
    distances, claims = kid_by_method(results, judge), judge_claims(results)
    made = make_tables(results, distances)
    text = format_report(made, claims)
    write_text(results.folder / "study.md", text)
    if readme is not None:
        write_text(readme, renew_tables(readme.read_text(encoding="utf-8"), select_for_readme(made, claims)))
    head = {
        "commands": ["minidiff evaluate study OUT", "minidiff evaluate report OUT"],
        "machine": json.loads((results.folder / "made-by.json").read_text(encoding="utf-8"))["machine"],  # that began the runs
        "findings": [asdict(one) for one in claims],
        "kid": {name: asdict(one) for name, one in distances.items()},
    }
    rows = ",\n".join(json.dumps(row) for row in results.rows)  # a line each
    write_text(results.folder / "study.json", json.dumps(head, indent=1)[:-2] + f',\n "results": [\n{rows}\n]}}\n')
    save_png(draw_intervals([gap for one in claims for gap in one.gaps]), results.folder / "findings.png")
    curve = [
        (f"{name}: {score}", results.difference(("compression", name), STANDARD, score))
        for score in (*ALIGNMENTS, "kept")
        for name in SMALLER
    ]
    save_png(draw_intervals([(name, gap) for name, gap in curve if gap]), results.folder / "compression.png")
    for part, subjects in dict.fromkeys(
        (row["run"]["part"], tuple(row["run"]["subjects"])) for row in results.rows if row["run"]["seed"] == SEEDS[0]
    ):
        few_colours = make_sheet(results, part, subjects, SEEDS[0]).quantize(256)  # a third of the bytes
        save_png(few_colours, results.folder / f"{'-'.join((part, *subjects))}.png")
    return text
