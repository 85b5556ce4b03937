"""The study that is told in the README: its text comes from its results, and nothing else."""

import json
from pathlib import Path

from minidiff.evaluation.kid import KID
from minidiff.study.plan import PAIR_VARIANTS, SEEDS, SUBJECTS, UNTOUCHED, before, methods, runs
from minidiff.study.report import Results, as_text, findings, tables

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "benchmarks" / "study"
KEPT = json.loads((FOLDER / "study.json").read_text(encoding="utf-8"))
RESULTS = Results(FOLDER, tuple(KEPT["results"]))
DISTANCES = {name: KID(**numbers) for name, numbers in KEPT["kid"].items()}


def test_every_run_of_the_seeds_is_there():
    seeds = {row["run"]["seed"] for row in RESULTS.rows}
    assert seeds <= set(SEEDS) and {row["name"] for row in RESULTS.rows} == {run.name for run in runs("all") if run.seed in seeds}


def test_tables_and_findings_follow_from_the_results():
    assert as_text(tables(RESULTS, DISTANCES), findings(RESULTS)) == (FOLDER / "study.md").read_text(encoding="utf-8")


def test_the_readme_tells_the_same():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    made = tables(RESULTS, DISTANCES)
    told = [line for title in ("Methods", "What they cost", "Before and after", "Two subjects") for line in made[title].splitlines()[2:]]
    assert (
        len(told) == len(methods()) + 1 + len(methods()) + len(PAIR_VARIANTS) + len(before()) + 1 + len(PAIR_VARIANTS)
        and [line for line in told if line not in readme] == []
    )
    words = " ".join(readme.split())
    assert [one.claim for one in findings(RESULTS) if f"{one.claim} This **{one.holds}** here: {one.figures}" not in words] == []


def test_methods_that_learn_are_named_by_the_judge():
    """What the table calls learned by likeness, another number has to see too."""
    for name in methods():
        gain = RESULTS.difference(("methods", name), ("methods", UNTOUCHED), "likeness")
        if gain.low > 0:
            assert RESULTS.difference(("methods", name), ("methods", UNTOUCHED), "named").low > 0, name
    assert len(RESULTS.of("methods", UNTOUCHED, "likeness")) == len(SUBJECTS) * len({row["run"]["seed"] for row in RESULTS.rows})
