"""The evaluation: verdicts from made-up readings, means over the right pictures, the same figures twice."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from minidiff.bundled import evaluate as evaluation
from minidiff.bundled.evaluate import evaluate, judge_batch, mean_with_error, reconstruct, spread_prompts, summarize_verdicts
from minidiff.bundled.figures import Measure, Verdict, format_figures
from minidiff.bundled.judge import Judge, JudgeOutput
from minidiff.bundled.train_judge import judge_config
from minidiff.scenes.prompts import FixedPrompt, fixed_prompts
from minidiff.scenes.scenes import sample_scene
from minidiff.trainers.engine.loop import with_seed
from tests.small_models import small_config, small_model, training_config


@pytest.fixture(scope="module")
def judge():
    config = judge_config()
    with with_seed(0):
        return Judge(dataclasses.replace(config, widths=(8, 8, 8, 16), heads=2)).eval().requires_grad_(False)


def reading_of(judge, places, tint, background, style):
    """One picture, in which each subject of `places` fills the cells (row, column) given for it."""
    config = judge.config
    subjects = torch.full((1, len(config.subjects) + 1, 8, 8), -30.0)
    subjects[:, -1] = 0
    for name, cells in places.items():
        for row, column in cells:
            subjects[0, config.subjects.index(name), row, column] = 5
    tints = torch.zeros(1, len(config.colours) + 1, 8, 8)
    tints[0, -1 if tint is None else config.colours.index(tint)] = 3
    backgrounds = torch.eye(len(config.colours))[[config.colours.index(background)]]
    styles = torch.eye(len(config.styles))[[config.styles.index(style)]]
    return JudgeOutput(subjects.log_softmax(1), tints.log_softmax(1), backgrounds, styles, torch.ones(1, config.features))


def verdict(monkeypatch, judge, prompt, places, tint=None, background="red", style="noto"):
    monkeypatch.setattr(judge, "read", lambda pixels: reading_of(judge, places, tint, background, style))
    (found,), features = judge_batch(judge, torch.zeros(1, 3, 64, 64), [prompt])
    assert torch.equal(features, torch.ones(1, judge.config.features))
    return found


LEFT = [(3, 1), (4, 1), (4, 2)]
RIGHT = [(3, 6), (4, 6)]
TWO = FixedPrompt("a cat left of a dog on a red background", "two", ("cat", "dog"), "red", "left of")


def test_a_subject_is_right_when_it_is_the_likeliest(monkeypatch, judge):
    prompt = FixedPrompt("a cat on a red background", "one", ("cat",), "red")
    assert verdict(monkeypatch, judge, prompt, {"cat": LEFT}).subjects
    assert verdict(monkeypatch, judge, prompt, {"cat": LEFT, "dog": RIGHT}).subjects  # there is more cat
    wrong = verdict(monkeypatch, judge, prompt, {"cat": RIGHT, "dog": LEFT}, background="blue")
    assert not wrong.subjects and not wrong.background
    assert (wrong.place, wrong.style, wrong.tint) == (None, None, None)  # the prompt does not ask


def test_two_subjects_are_right_when_they_are_the_likeliest_two(monkeypatch, judge):
    assert verdict(monkeypatch, judge, TWO, {"cat": LEFT, "dog": RIGHT}).subjects
    for places in ({"cat": LEFT, "key": RIGHT}, {"cat": RIGHT[:1], "dog": RIGHT[1:], "key": LEFT}):
        found = verdict(monkeypatch, judge, TWO, places)
        assert not found.subjects and found.place is None  # of what is not there nobody asks where it is


@pytest.mark.parametrize(
    "relation, dog, right",
    [
        ("left of", (4, 6), True),
        ("left of", (6, 4), False),  # to the right a little, below by more
        ("left of", (4, 0), False),
        ("above", (6, 1), True),
        ("above", (0, 1), False),
        ("above", (6, 6), False),
    ],
)
def test_a_place_is_right_when_the_direction_is_the_main_one(monkeypatch, judge, relation, dog, right):
    prompt = dataclasses.replace(TWO, relation=relation)
    assert verdict(monkeypatch, judge, prompt, {"cat": [(3, 2)], "dog": [dog]}).place is right
    assert verdict(monkeypatch, judge, dataclasses.replace(TWO, relation="and"), {"cat": [(3, 2)], "dog": [dog]}).place is None


def test_style_and_tint_are_asked_where_the_prompt_names_them(monkeypatch, judge):
    prompt = FixedPrompt("", "colour", ("cat",), "red", style="fluent", tint="green")
    found = verdict(monkeypatch, judge, prompt, {"dog": LEFT}, tint="green", style="fluent")
    assert (found.tint, found.style, found.subjects) == (True, True, False)
    assert not verdict(monkeypatch, judge, prompt, {"cat": LEFT}, tint=None).tint
    assert not verdict(monkeypatch, judge, prompt, {"cat": LEFT}, tint="green", style="noto").style


def right(subjects=True, place=None, tint=None, alignment=0.5):
    return Verdict(subjects, True, place, None, tint, alignment)


def test_each_figure_is_a_mean_over_the_pictures_it_is_about():
    prompts = [
        FixedPrompt("", "one", ("cat",), "red"),
        TWO,
        dataclasses.replace(TWO, held_out=True),
        FixedPrompt("", "colour", ("cat",), "red", tint="blue"),
    ]
    model = [right(), right(place=True), right(subjects=False), right(subjects=False, tint=True, alignment=0.1)]
    real = [right(), right(place=True), right(place=False), right(tint=True)]
    features = {name: torch.eye(4) for name in ("model", "real", "reconstructed", "reference")}
    figures = summarize_verdicts(prompts, {"model": model, "real": real, "reconstructed": real}, features)
    assert {name: (f.model.value, f.model.count, f.real.value, f.real.count) for name, f in figures.items() if f and name != "kid"} == {
        "one_subject": (1, 1, 1, 1),
        "two_subjects": (0.5, 2, 1, 2),
        "two_subjects_held_out_pairs": (0, 1, 1, 1),
        "background": (1, 4, 1, 4),
        "place": (1, 1, 0.5, 2),
        "colour": (1, 1, 1, 1),
        "colour_and_subject": (0, 1, 1, 1),
        "text_alignment": (pytest.approx(0.4), 4, 0.5, 4),
    }
    assert figures["style"] is None


def test_a_mean_has_its_standard_error():
    assert mean_with_error([1, 0, 1, 1]) == Measure(0.75, math.sqrt(0.75 * 0.25 / 4), 4)  # binomial, all powers of 2 but the root
    assert mean_with_error([]).count == 0 and math.isnan(mean_with_error([]).value)


def test_the_whole_evaluation_gives_the_same_figures_twice(judge):
    sd = small_model(training_config())
    runs = [list(evaluate(sd, judge, steps=2, seeds=(0, 1), limit=5, batch=4)) for _ in range(2)]
    assert [(p.done, p.total) for p in runs[0]] == [(4, 10), (8, 10), (10, 10)]
    assert [p.figures is None for p in runs[0]] == [True, True, False]
    assert runs[0][-1].figures == runs[1][-1].figures
    figures = runs[0][-1].figures
    assert figures["background"].model.count == figures["kid"].real.count == 10
    assert "| background |" in format_figures(figures)
    # Another number of pictures at once gives other pictures by rounding only.
    *_, other = evaluate(sd, judge, steps=2, seeds=(0, 1), limit=5, batch=10)
    assert other.figures["text_alignment"].model.value == pytest.approx(figures["text_alignment"].model.value, abs=1e-4)


def test_an_evaluation_that_is_stopped_goes_on_and_ends_the_same(judge, tmp_path, monkeypatch):
    sd, options = small_model(training_config()), {"steps": 2, "seeds": (0, 1), "limit": 5, "batch": 4}
    *_, whole = evaluate(sd, judge, **options)
    state = tmp_path / "evaluation.pt"
    assert next(evaluate(sd, judge, **options, state=state)).done == 4
    rest = list(evaluate(sd, judge, **options, state=state))
    assert [p.done for p in rest] == [8, 10] and rest[-1].record == whole.record
    monkeypatch.setattr(sd, "denoise", None)  # not one more picture
    (again,) = evaluate(sd, judge, **options, state=state)
    assert again.record == whole.record
    assert list(again.record.verdicts) == [(prompt.text, seed) for seed in (0, 1) for prompt in spread_prompts(fixed_prompts(), 5)]
    with pytest.raises(ValueError, match="holds another run .*steps 2, now 3"):
        next(evaluate(sd, judge, **options | {"steps": 3}, state=state))
    with pytest.raises(ValueError, match="holds another run .*model "):
        next(evaluate(small_model(training_config(), seed=1), judge, **options, state=state))


def test_psnr_is_that_of_the_definition():
    sd = small_model(training_config())
    fresh, held_out = evaluation.held_out_psnr(sd, count=3)
    rng = np.random.default_rng(5)
    psnr = []
    for _ in range(3):
        scene = sample_scene(rng)
        decoded = reconstruct(sd, evaluation.to_pixels(scene.image[None]))[0].permute(1, 2, 0).numpy() * 127.5 + 127.5
        mse = np.average((decoded - scene.image) ** 2, weights=np.repeat(scene.mask[..., None], 3, axis=2))
        psnr.append(20 * math.log10(255) - 10 * math.log10(mse))
    assert fresh == pytest.approx(np.mean(psnr), abs=1e-4)  # dB; fp32
    assert held_out != fresh and 0 < held_out < 30


def test_the_real_scenes_and_their_reference_are_different_draws():
    pairs = [(prompt, 0) for prompt in fixed_prompts()[:3]]
    first, again, reference, other_seed = (
        evaluation.compose_real_pixels(p, draw) for p, draw in ((pairs, 0), (pairs[:2], 0), (pairs, 1), ([(pairs[0][0], 1)], 0))
    )
    assert torch.equal(first[:2], again)
    assert not torch.equal(first, reference) and not torch.equal(first[:1], other_seed)


def test_a_reconstruction_is_the_vaes_mean_decoded():
    sd, pixels = small_model(), torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = sd.vae.decode(sd.vae.encode(pixels).mean).clamp(-1, 1)
    torch.testing.assert_close(reconstruct(sd, pixels), expected, rtol=1e-4, atol=1e-5)  # fp32; times and by the scaling factor


def test_a_limit_keeps_all_groups():
    few = spread_prompts(fixed_prompts(), 12)
    assert len(few) == 12 and {prompt.group for prompt in few} == {"one", "two", "style", "colour"}
    assert spread_prompts(fixed_prompts(), None) == spread_prompts(fixed_prompts(), 1000) == fixed_prompts()


def test_what_cannot_be_judged_is_refused_at_once(judge):
    with pytest.raises(ValueError, match="draws 32 pixels, the judge reads 128"):
        evaluate(small_model(small_config()), judge)
    for wrong in ({"seeds": ()}, {"limit": 0}, {"batch": 0}):
        with pytest.raises(ValueError, match="no picture to judge"):
            evaluate(small_model(training_config()), judge, **wrong)
