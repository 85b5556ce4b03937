"""What the card of the shipped model says is what its figures say, and the figures come out again."""

from pathlib import Path

import pytest
from safetensors import safe_open

import weights_loader
from minidiff.bundled.evaluate import evaluate
from minidiff.bundled.figures import format_figures, from_json
from minidiff.bundled.recipe import RECIPES
from minidiff.scenes.prompts import fixed_prompts

FOLDER = Path(weights_loader.__file__).parent / "bundled"
RECORD = from_json((FOLDER / "figures.json").read_text(encoding="utf-8"))
LIMIT, SEED = 82, 0  # a third of the prompts, spread over all groups


def test_the_cards_table_is_that_of_the_figures():
    assert format_figures(RECORD.figures) in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_the_recorded_pictures_are_of_the_fixed_prompts():
    texts = {prompt.text for prompt in fixed_prompts()}
    assert len(RECORD.verdicts) >= LIMIT and {prompt for prompt, _ in RECORD.verdicts} <= texts
    assert RECORD.figures["background"].model.count == len(texts) * 3  # the figures are of all of them


@pytest.mark.slow
def test_the_judge_says_the_same_again_of_a_third_of_the_pictures():
    sd, judge = weights_loader.load("tiny"), weights_loader.load_judge()
    *_, last = evaluate(sd, judge, steps=RECORD.steps, guidance_scale=RECORD.guidance_scale, seeds=(SEED,), limit=LIMIT)
    assert len(last.record.verdicts) == LIMIT
    for key, verdict in last.record.verdicts.items():
        recorded = RECORD.verdicts[key]
        assert (verdict.subjects, verdict.background, verdict.place, verdict.style, verdict.tint) == (
            recorded.subjects,
            recorded.background,
            recorded.place,
            recorded.style,
            recorded.tint,
        ), key
        # A cosine. float32 rounding, grown over 20 guided steps, where batches or the machine are others.
        assert verdict.alignment == pytest.approx(recorded.alignment, abs=2e-3), key


def test_the_half_trained_model_is_narrower_and_has_the_same_vae_of_which_it_brings_no_copy():
    with safe_open(FOLDER / "half.safetensors", "pt") as file:
        assert not any(name.startswith("first_stage_model.") for name in file.keys())
    half, whole = weights_loader.load("half"), weights_loader.load("tiny")
    assert half.notes == () and half.config.unet.widths == RECIPES["half"].widths and half.tokenizer.config == whole.tokenizer.config
    for (name, p), q in zip(half.vae.state_dict().items(), whole.vae.state_dict().values(), strict=True):
        assert p.equal(q), name


@pytest.mark.slow
def test_the_half_trained_model_knows_backgrounds_and_hardly_any_subject():
    *_, last = evaluate(weights_loader.load("half"), weights_loader.load_judge(), steps=10, seeds=(SEED,), limit=24)
    assert last.figures["background"].model.value == 1
    assert last.figures["one_subject"].model.value < 0.5
