"""The study's tables: intervals, differences run by run, and what the findings say of made-up results."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.study import report
from minidiff.study.plan import SEEDS, SUBJECTS, UNTOUCHED, runs
from minidiff.study.report import Interval, decided, findings, interval, read, tables

SUBJECT_NAMES = list(SUBJECTS)


def test_an_interval_of_equal_values_is_a_point_and_of_one_subject_is_the_bootstrap_over_seeds():
    assert interval({(name, seed): 0.25 for name in "ab" for seed in (0, 1)}) == Interval(0.25, 0.25, 0.25)
    found = interval({("a", seed): float(seed) for seed in range(2)})
    # two values drawn twice: means 0, 1/2, 1 with shares 1/4, 1/2, 1/4, so that 2.5 % and 97.5 % are the ends
    assert found == Interval(0.5, 0.0, 1.0)


def test_an_intervals_width_is_that_of_the_clusters():
    # Subjects differ, seeds do not: the bootstrap is that of 5 subject means, whose deviation is known.
    values = {(name, seed): float(i) for i, name in enumerate("abcde") for seed in range(3)}
    found = interval(values)
    assert found.mean == 2.0
    # the mean of 5 draws of 0..4 has deviation sqrt(2 / 5) = 0.632; 1.96 of it is 1.24, on a grid of 1/5
    assert found.high - 2 == pytest.approx(1.24, abs=0.2) and 2 - found.low == pytest.approx(1.24, abs=0.2)


def test_a_mean_of_nothing_is_refused():
    with pytest.raises(ValueError, match="no values"):
        interval({})


@pytest.mark.parametrize(
    "low, high, wanted, verdict",
    [
        (0.1, 0.2, "above", "holds"), (-0.1, 0.2, "above", "is not decided"), (-0.2, -0.1, "above", "does not hold"),
        (-0.2, -0.1, "below", "holds"), (-0.1, 0.2, "below", "is not decided"), (0.1, 0.2, "below", "does not hold"),
        (-0.01, 0.02, "little", "holds"), (-0.01, 0.2, "little", "is not decided"), (0.1, 0.2, "little", "does not hold"),
    ],
)  # fmt: skip
def test_a_claim_is_decided_by_the_whole_interval(low, high, wanted, verdict):
    assert decided(Interval((low + high) / 2, low, high), wanted) == verdict


def test_a_claim_without_runs_is_not_decided():
    assert decided(None, "above") == "is not decided"


LIKENESS = {UNTOUCHED: 0.6, "lora": 0.8, "textual-inversion": 0.7, "dreambooth": 0.85, "custom-diffusion": 0.82, "prefix": 0.6}
KEPT = {UNTOUCHED: 0.9, "lora": 0.2, "textual-inversion": 0.9, "dreambooth": 0.5, "custom-diffusion": 0.8, "prefix": 0.9}


@pytest.fixture
def made_up(tmp_path):
    """Results of some methods with known differences; each subject and seed adds its own, the same for all methods."""
    (tmp_path / "results").mkdir()
    (tmp_path / "features").mkdir()
    (tmp_path / "rows").mkdir()
    rng = np.random.default_rng(0)
    for run in runs("methods"):
        if run.variant not in LIKENESS:
            continue
        shift = 0.1 * SUBJECT_NAMES.index(run.subjects[0]) + 0.01 * run.seed
        wobble = 0.0 if run.variant != "prefix" else float(rng.normal(0, 0.05))
        scores = {"likeness": LIKENESS[run.variant] + shift + wobble, "named": 0.5, "text": 0.7, "kept": KEPT[run.variant] + shift, "others": 0.9, "drift": 0.1}
        changes = {"cross-attention": 0.03, "self-attention": 0.01, "other": 0.02} if run.variant == "dreambooth" else None
        row = {"run": {"part": run.part, "variant": run.variant, "subjects": run.subjects, "seed": run.seed}, "scores": scores}
        row |= {"trained": 1000, "bytes": 4000, "seconds": 60.0, "memory": 10**8, "changes": changes}
        (tmp_path / "results" / f"{run.name}.json").write_text(json.dumps(row))
        np.save(tmp_path / "features" / f"{run.name}.npy", rng.normal(size=(36, 128)).astype(np.float16))
        Image.new("RGB", (64, 64)).save(tmp_path / "rows" / f"{run.name}.png")
    return tmp_path


class FakeJudge:
    """Features of real pictures, by chance: KID needs some."""

    image_size = 64

    def encode_pictures(self, pixels):
        return torch.randn(len(pixels), 128, generator=torch.Generator().manual_seed(0))

    def encode_texts(self, texts):
        raise AssertionError("KID looks at pictures alone")


def test_differences_are_taken_run_by_run(made_up):
    results = read(made_up)
    found = results.difference(("methods", "lora"), ("methods", UNTOUCHED), "likeness")
    # the same for every subject and seed, though these differ by half a unit among themselves
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.2, 0.2))
    assert len(results.of("methods", "lora", "likeness")) == len(SUBJECTS) * len(SEEDS)
    assert results.difference(("methods", "lora"), ("methods", "nothing"), "likeness") is None


def test_the_tables_say_what_learnt_and_what_it_cost(made_up):
    found = tables(read(made_up), report.kids(read(made_up), FakeJudge()))
    assert set(found) == {"Methods", "What they cost"}
    learnt = {line.split(" | ")[0].strip("| "): line.rstrip(" |").split(" | ")[-1] for line in found["Methods"].splitlines()[2:]}
    assert learnt == {UNTOUCHED: learnt[UNTOUCHED], "textual-inversion": "yes", "lora": "yes", "dreambooth": "yes", "custom-diffusion": "yes", "prefix": "no"}
    assert "| lora | 1,000 | 0.00 MB | 60 s | 100 MB |" in found["What they cost"]


def test_findings_hold_or_do_not_by_the_results(made_up):
    found = {(one.claim, one.figures.split(":")[0]): one.holds for one in findings(read(made_up))}
    assert found["In full fine-tuning the weights of cross-attention move most.", "mean of |W' - W| / |W|"] == "holds"
    claim = "Textual Inversion keeps the class best and the subject least."
    assert found[claim, "textual-inversion minus lora"] == "holds"
    assert found[claim, "textual-inversion minus custom-diffusion"] == "holds"
    assert not any("Regularisation" in words for words, _ in found)  # no such runs: nothing is said


def test_the_report_writes_its_files(made_up):
    text = report.write(read(made_up), FakeJudge())
    assert (made_up / "study.md").read_text() == text
    kept = json.loads((made_up / "study.json").read_text())
    assert len(kept["results"]) == len(LIKENESS) * len(SUBJECTS) * len(SEEDS) and kept["findings"]
    with Image.open(made_up / "methods-tiger.png") as picture:
        # below the five pictures that were learnt from
        assert picture.size == (150 + 5 * 64, 64 * (1 + len(LIKENESS)))


def test_a_folder_without_results_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="no results; run minidiff evaluate study"):
        read(tmp_path)
