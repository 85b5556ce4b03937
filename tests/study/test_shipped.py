"""The study that is told in study/README.md: its text comes from its results, and nothing else."""

import json
from pathlib import Path

import minidiff.study
from minidiff.bundled.edits import renew_tables
from minidiff.evaluation.kid import KID
from minidiff.study.plan import PAIR_VARIANTS, SEEDS, SUBJECTS, UNTOUCHED, list_runs, method_variants, unmended_variants
from minidiff.study.report import Results, format_report, judge_claims, make_tables, select_for_readme

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "benchmarks" / "study"
KEPT = json.loads((FOLDER / "study.json").read_text(encoding="utf-8"))
RESULTS = Results(FOLDER, tuple(KEPT["results"]))
DISTANCES = {name: KID(**numbers) for name, numbers in KEPT["kid"].items()}


def test_every_run_of_the_seeds_is_there():
    seeds = {row["run"]["seed"] for row in RESULTS.rows}
    assert seeds <= set(SEEDS) and {row["name"] for row in RESULTS.rows} == {run.name for run in list_runs("all") if run.seed in seeds}


def test_tables_and_findings_follow_from_the_results():
    assert format_report(make_tables(RESULTS, DISTANCES), judge_claims(RESULTS)) == (FOLDER / "study.md").read_text(encoding="utf-8")


def test_the_readme_tells_the_same():
    made, claims = make_tables(RESULTS, DISTANCES), judge_claims(RESULTS)
    told = select_for_readme(made, claims)
    rows = {"methods": len(method_variants()) + 1, "costs": len(method_variants()) + len(PAIR_VARIANTS)}
    rows |= {"before": len(unmended_variants()), "pairs": len(PAIR_VARIANTS) + 1}
    assert {name: len(told[name].splitlines()) - 2 for name in rows} == rows and len(told["findings"].splitlines()) == len(claims) == 8
    readme = Path(minidiff.study.__file__).with_name("README.md").read_text(encoding="utf-8")
    assert renew_tables(readme, told) == readme, "make it anew: minidiff evaluate report OUT --readme minidiff/study/README.md"


def test_methods_that_learn_are_named_by_the_judge():
    """What the table calls learned by likeness, another number has to see too."""
    for name in method_variants():
        gain = RESULTS.difference(("methods", name), ("methods", UNTOUCHED), "likeness")
        if gain.low > 0:
            assert RESULTS.difference(("methods", name), ("methods", UNTOUCHED), "named").low > 0, name
    assert len(RESULTS.values("methods", UNTOUCHED, "likeness")) == len(SUBJECTS) * len({row["run"]["seed"] for row in RESULTS.rows})
