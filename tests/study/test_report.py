"""The study's tables: intervals, differences run by run, and what the findings say of made-up results."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.evaluation.kid import kid
from minidiff.scenes.art import SIZE
from minidiff.study import report
from minidiff.study.plan import SEEDS, SUBJECTS, UNTOUCHED, list_runs
from minidiff.study.report import STUDENT, Interval, Results, decide, interval_over_subjects, judge_claims, make_tables, read_results

SUBJECT_NAMES = list(SUBJECTS)


def test_an_interval_of_equal_values_is_a_point_and_one_subject_tells_nothing_of_others():
    assert interval_over_subjects({(name, seed): 0.25 for name in "ab" for seed in (0, 1)}) == Interval(0.25, 0.25, 0.25)
    assert interval_over_subjects({("a", seed): float(seed) for seed in range(2)}) == Interval(0.5, -np.inf, np.inf)


def test_quantiles_are_students():
    """By the closed forms of the distribution with 1 to 4 degrees of freedom."""
    u = [t / (1 + t * t / n) ** 0.5 for n, t in enumerate(STUDENT, start=1)]
    tails = [
        0.5 + np.arctan(STUDENT[0]) / np.pi,
        0.5 + u[1] / 2**1.5,
        0.5 + (np.arctan(STUDENT[2] / 3**0.5) + STUDENT[2] / 3**0.5 / (1 + STUDENT[2] ** 2 / 3)) / np.pi,
        0.5 + 3 / 8 * u[3] * (1 - u[3] ** 2 / 12),
    ]
    assert tails == pytest.approx([0.975] * 4, abs=1.2e-5)  # half a unit of their last digit times the density there, at most 0.024


def test_an_interval_is_that_of_the_subjects_means_however_many_seeds_they_have():
    values = {(name, seed): float(i + 10 * (seed - 1)) for i, name in enumerate("abcde") for seed in range(3)}
    found = interval_over_subjects(values)
    half = 2.776 * 2.5**0.5 / 5**0.5  # 0..4 have the variance 2.5
    assert (found.mean, found.low, found.high) == pytest.approx((2, 2 - half, 2 + half))
    assert interval_over_subjects({key: value for key, value in values.items() if key[1] == 1}) == found


@pytest.mark.parametrize("subjects", [2, 3, 5])
def test_95_of_100_intervals_hold_the_truth(subjects):
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        shifts = rng.normal(size=subjects)
        found = interval_over_subjects({(str(i), seed): shift + 0.5 * rng.normal() for i, shift in enumerate(shifts) for seed in range(2)})
        hits += found.low <= 0 <= found.high
    assert 922 <= hits <= 978  # 950 +- 4 binomial deviations of 6.9


def test_a_mean_of_nothing_or_of_a_crowd_is_refused():
    with pytest.raises(ValueError, match="values of 0 subjects"):
        interval_over_subjects({})
    with pytest.raises(ValueError, match="values of 6 subjects; give those of 1 to 5"):
        interval_over_subjects({(name, 0): 0.0 for name in "abcdef"})


@pytest.mark.parametrize(
    "low, high, wanted, verdict",
    [
        (0.1, 0.2, "better", "holds"),
        (-0.1, 0.2, "better", "is not decided"),
        (-0.2, -0.1, "better", "does not hold"),
        (-0.2, -0.1, "worse", "holds"),
        (-0.1, 0.2, "worse", "is not decided"),
        (0.1, 0.2, "worse", "does not hold"),
        (-0.01, 0.02, "at least as good", "holds"),
        (0.2, 0.3, "at least as good", "holds"),
        (-0.04, 0.3, "at least as good", "holds"),
        (-0.2, 0.02, "at least as good", "is not decided"),
        (-0.2, -0.1, "at least as good", "does not hold"),
        (-0.3, -0.2, "at most as good", "holds"),
        (-0.3, 0.04, "at most as good", "holds"),
        (-0.3, 0.06, "at most as good", "is not decided"),
        (0.1, 0.2, "at most as good", "does not hold"),
    ],
)
def test_a_claim_is_decided_by_the_whole_interval(low, high, wanted, verdict):
    assert decide(Interval((low + high) / 2, low, high), wanted) == verdict


def test_a_claim_without_runs_is_not_decided():
    assert decide(None, "better") == "is not decided"


NAMED = {UNTOUCHED: 0.0, "prefix": 0.0}  # the others 0.5
LIKENESS = {UNTOUCHED: 0.6, "lora": 0.8, "textual-inversion": 0.7, "dreambooth": 0.85, "custom-diffusion": 0.82, "prefix": 0.6}
KEPT = {UNTOUCHED: 0.9, "lora": 0.2, "textual-inversion": 0.9, "dreambooth": 0.5, "custom-diffusion": 0.8, "prefix": 0.9}


@pytest.fixture
def made_up(tmp_path):
    """Results of some methods with known differences; each subject and seed adds its own, the same for all methods."""
    (tmp_path / "results").mkdir()
    (tmp_path / "features").mkdir()
    (tmp_path / "rows").mkdir()
    (tmp_path / "made-by.json").write_text('{"machine": {"processor": "an abacus"}}')
    rng = np.random.default_rng(0)
    for run in list_runs("methods"):
        if run.variant not in LIKENESS:
            continue
        shift = 0.1 * SUBJECT_NAMES.index(run.subjects[0]) + 0.01 * run.seed
        scores = {
            "likeness": LIKENESS[run.variant] + shift,
            "named": NAMED.get(run.variant, 0.5),
            "text": 0.7,
            "kept": KEPT[run.variant] + shift,
            "others": 0.9,
            "drift": 0.1,
        }
        changes = {"cross-attention": 0.03, "self-attention": 0.01, "other": 0.02} if run.variant == "dreambooth" else None
        row = {"run": {"part": run.part, "variant": run.variant, "subjects": run.subjects, "seed": run.seed}, "scores": scores}
        row |= {"trained": 1000, "bytes": 4000, "seconds": 60.0, "memory": 10**8, "changes": changes}
        (tmp_path / "results" / f"{run.name}.json").write_text(json.dumps(row))
        np.save(tmp_path / "features" / f"{run.name}.npy", rng.normal(size=(36, 128)).astype(np.float16))
        Image.new("RGB", (64, 64)).save(tmp_path / "rows" / f"{run.name}.png")
    return tmp_path


class FakeJudge:
    """Features of real pictures: their smallest colours, near the made-up ones of drawn pictures."""

    image_size = 64

    def encode_pictures(self, pixels):
        return pixels.flatten(1)[:, :128]

    def encode_texts(self, texts):
        raise AssertionError("KID looks at pictures alone")


def test_differences_are_taken_run_by_run(made_up):
    results = read_results(made_up)
    found = results.difference(("methods", "lora"), ("methods", UNTOUCHED), "likeness")
    # the same for every subject and seed, though these differ by half a unit among themselves
    assert (found.mean, found.low, found.high) == pytest.approx((0.2, 0.2, 0.2))
    assert len(results.values("methods", "lora", "likeness")) == len(SUBJECTS) * len(SEEDS)
    assert results.difference(("methods", "lora"), ("methods", "nothing"), "likeness") is None


def test_the_tables_say_what_learnt_and_what_it_cost(made_up):
    found = make_tables(read_results(made_up), report.kid_by_method(read_results(made_up), FakeJudge()))
    assert set(found) == {"Methods", "What they cost"}
    learned = {line.split(" | ")[0].strip("| "): line.rstrip(" |").split(" | ")[-1] for line in found["Methods"].splitlines()[2:]}
    assert learned == {
        UNTOUCHED: learned[UNTOUCHED],
        "textual-inversion": "yes",
        "lora": "yes",
        "dreambooth": "yes",
        "custom-diffusion": "yes",
        "prefix": "no",
    }
    assert "| lora | 1,000 | 4 kB | 60 s | 100.0 MB |" in found["What they cost"]
    lora = next(line for line in found["Methods"].splitlines() if line.startswith("| lora "))
    assert "| 0.20 [0.20, 0.20] |" in lora and "| 0.41 [0.21, 0.61] |" in lora  # gain; kept: 0.2, a seed's 0.01, and the subjects' 0 to 0.4


def test_findings_hold_or_do_not_by_the_results(made_up):
    found = {one.claim: one for one in judge_claims(read_results(made_up))}
    assert found["In full fine-tuning the weights of cross-attention move most."].holds == "holds"
    best = found["Of Custom Diffusion, DreamBooth and Textual Inversion the last keeps the class best."]
    assert best.holds == "holds" and "textual-inversion minus dreambooth: kept 0.400 [0.400, 0.400]" in best.figures
    assert found["Of the three Textual Inversion keeps the subject least."].holds == "holds"
    assert len(found) == 3  # no runs of the others: nothing is said


@pytest.mark.parametrize(
    "claim, part, variant, scores, worse",
    [
        ("Keys and values suffice", "custom", "all weights", {"text": 0.02, "likeness": -0.2}, {"text": 0.02, "likeness": 0.2}),
        ("Regularisation prevents", "custom", "no regularisation", {"kept": -0.2}, {"kept": 0.2}),
        ("Compression to 60 %", "compression", "share 0.6", {"text": 0.2, "likeness": -0.02}, {"text": 0.2, "likeness": -0.2}),
    ],
)
def test_claims_about_custom_diffusion_are_held_against_its_own_runs(claim, part, variant, scores, worse):
    def row(part, variant, subject, scores):
        return {"run": {"part": part, "variant": variant, "subjects": [subject], "seed": 0}, "scores": scores}

    verdicts = []
    for gaps in (scores, worse):
        rows = [row("methods", "custom-diffusion", subject, dict.fromkeys(gaps, 0.5)) for subject in SUBJECTS]
        rows += [row(part, variant, subject, {score: 0.5 + gap for score, gap in gaps.items()}) for subject in SUBJECTS]
        (one,) = judge_claims(Results(Path("."), tuple(rows)))
        assert one.claim.startswith(claim)
        verdicts.append(one.holds)
    assert verdicts == ["holds", "does not hold"]


def test_kid_leaves_out_pairs_of_a_prompt_and_sees_other_scenes_for_each_seed(made_up):
    judge, asked = FakeJudge(), []
    encode = judge.encode_pictures
    judge.encode_pictures = lambda pixels: asked.append(pixels) or encode(pixels)
    found = read_results(made_up).kid(judge, "methods", "lora")
    assert len(asked) == len(SUBJECTS) * len(SEEDS) and len({pixels.numpy().tobytes() for pixels in asked}) == len(asked)
    drawn = torch.cat(
        [
            torch.from_numpy(np.load(made_up / "features" / f"{row['name']}.npy")).float()
            for row in read_results(made_up).rows
            if row["run"]["variant"] == "lora"
        ]
    )
    real = torch.cat([encode(pixels) for pixels in asked])
    group = torch.cat(
        [
            torch.arange(36) + 36 * SUBJECT_NAMES.index(row["run"]["subjects"][0])
            for row in read_results(made_up).rows
            if row["run"]["variant"] == "lora"
        ]
    )
    assert found.value == pytest.approx(kid(drawn, real, groups=(group, group), blocks=10).value, rel=1e-9)
    assert found.value != pytest.approx(kid(drawn, real, blocks=10).value, rel=1e-9)


def test_the_report_writes_its_files(made_up):
    text = report.write_report(read_results(made_up), FakeJudge())
    assert (made_up / "study.md").read_text() == text
    kept = json.loads((made_up / "study.json").read_text())
    assert len(kept["results"]) == len(LIKENESS) * len(SUBJECTS) * len(SEEDS) and kept["findings"]
    assert kept["machine"] == {"processor": "an abacus"}  # the runs', not the report's
    assert (made_up / "findings.png").exists() and (made_up / "compression.png").exists()
    with Image.open(made_up / "methods-tiger.png") as picture:
        # below the five pictures that were learned from
        assert picture.size == (150 + 5 * SIZE, SIZE * (1 + len(LIKENESS)))


def test_the_report_renews_a_readme_and_nothing_else_of_it(made_up, tmp_path):
    readme = tmp_path / "README.md"
    marks = "".join(f"<!-- {name} -->\nold\n<!-- end of {name} -->\nkept\n" for name in ("methods", "costs", "before", "pairs", "findings"))
    readme.write_text(f"# Title\n{marks}")
    report.write_report(read_results(made_up), FakeJudge(), readme)
    text, whole = readme.read_text(), (made_up / "study.md").read_text()
    assert text.startswith("# Title\n<!-- methods -->\n| method | likeness |") and text.count("\nkept\n") == 5
    for name in ("methods", "costs", "findings"):
        assert text.split(f"<!-- {name} -->\n")[1].split(f"<!-- end of {name} -->")[0] in whole
    assert "<!-- before -->\nold\n" in text  # these results have no such runs


def test_a_readme_without_a_mark_is_refused_before_anything_is_written(made_up, tmp_path):
    (tmp_path / "README.md").write_text("<!-- methods -->\n<!-- end of methods -->\n")
    with pytest.raises(ValueError, match="no place for the table 'costs'"):
        report.write_report(read_results(made_up), FakeJudge(), tmp_path / "README.md")
    assert not (made_up / "study.md").exists()


def test_intervals_are_drawn_where_they_are():
    rows = [("a", Interval(0.1, -0.1, 0.3)), ("of one subject", Interval(0.1, -np.inf, np.inf)), ("b", Interval(-0.2, -0.25, -0.15))]
    picture = np.asarray(report.draw_intervals(rows))
    assert picture.shape[0] == 3 * report.LINE  # two lines and the axis
    blue = (picture == (65, 105, 225)).all(axis=2)
    for line, one in ((0, rows[0][1]), (1, rows[2][1])):
        across = np.flatnonzero(blue[report.LINE * line : report.LINE * (line + 1)].any(axis=0))
        ends = [(x - report.NAMES) / report.SCALE - 0.3 for x in (across[0], across[-1])]  # the axis begins at -0.3
        assert ends == pytest.approx([one.low, one.high], abs=2 / report.SCALE)  # pixels


def test_a_folder_without_results_says_what_to_run(tmp_path):
    with pytest.raises(ValueError, match="no results; run minidiff evaluate study"):
        read_results(tmp_path)
