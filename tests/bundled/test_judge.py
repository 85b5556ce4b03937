"""The judge's network: its loss against loops, what its readings say worked out by hand, what they do not depend on."""

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close

from minidiff.bundled.judge import AttentionPool, Judge, JudgeConfig, JudgeOutput, contrastive_loss
from minidiff.config import TextEncoderConfig, TokenizerConfig
from minidiff.evaluation.kid import scale_features
from minidiff.scenes.scenes import bpe_merges
from minidiff.trainers.engine.loop import with_seed

TOKENIZER = TokenizerConfig(merges=bpe_merges(), context_length=32)
CONFIG = JudgeConfig(
    TOKENIZER,
    TextEncoderConfig(514 + len(TOKENIZER.merges), 32, width=16, layers=2, heads=2),
    subjects=("cat", "dog", "key"),
    colours=("red", "blue"),
    styles=("noto", "fluent"),
    widths=(8, 16),
    blocks=(1, 1),
    heads=2,
    features=12,
    image_size=32,
)


@pytest.fixture(scope="module")
def judge():
    with with_seed(0):
        return Judge(CONFIG).eval()


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_the_contrastive_loss_is_both_cross_entropies():
    pictures, texts, scale = noise(4, 6).double(), noise(4, 6, seed=1).double(), 3.0
    cosine = [[(p @ t / p.norm() / t.norm()).item() for t in texts] for p in pictures]
    by_picture = [-math.log(math.exp(scale * cosine[i][i]) / sum(math.exp(scale * cosine[i][j]) for j in range(4))) for i in range(4)]
    by_text = [-math.log(math.exp(scale * cosine[i][i]) / sum(math.exp(scale * cosine[j][i]) for j in range(4))) for i in range(4)]
    loss = contrastive_loss(pictures, texts, torch.tensor(scale).double().log())
    assert loss.item() == pytest.approx((sum(by_picture) + sum(by_text)) / 8, rel=1e-12)  # float64


def test_the_contrastive_loss_knows_right_from_wrong():
    x, log_scale = torch.eye(5), torch.tensor(20.0).log()
    assert contrastive_loss(x, x, log_scale) < 1e-6  # 4 exp(-20)
    assert contrastive_loss(x, x.roll(1, 0), log_scale) > 19
    assert_close(contrastive_loss(torch.ones(5, 3), x[:, :3] * 0 + 1, log_scale), torch.tensor(5.0).log())  # nothing to tell them apart by


def test_the_temperature_has_a_limit():
    x, y = noise(5, 4), noise(5, 4, seed=1)
    assert_close(contrastive_loss(x, y, torch.tensor(9.0)), contrastive_loss(x, y, torch.tensor(100.0).log()))


def test_features_have_the_length_that_makes_their_mean_product_the_cosine(judge):
    pictures, texts = judge.encode_pictures(noise(3, 3, 32, 32)), judge.encode_texts(["a cat", "a red key", ""])
    for features in (pictures, texts, scale_features(noise(3, 12) * 7)):
        assert_close(features.square().mean(dim=1), torch.ones(3))


def test_a_text_is_read_at_its_end_and_padding_changes_nothing(judge):
    whole = judge.tokenizer(["a cat and a dog"])
    end = whole[0].tolist().index(judge.tokenizer.end_id)
    # fp32 sums over another number of rows
    assert_close(judge.encode_tokens(whole[:, : end + 1]), judge.encode_tokens(whole), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(judge.encode_texts(["a cat and a dog"]), judge.encode_texts(["a cat and a key"]), atol=1e-3)


def test_a_picture_is_read_alone_as_among_others(judge):
    pixels = noise(3, 3, 32, 32).clamp(-1, 1)
    whole, alone = judge.read(pixels), judge.read(pixels[1:2])
    for field in dataclasses.fields(JudgeOutput):
        assert_close(getattr(alone, field.name), getattr(whole, field.name)[1:2], rtol=1e-4, atol=1e-5)  # fp32, another batch


def test_the_readings_are_probabilities(judge):
    reading = judge.read(noise(2, 3, 32, 32))
    assert reading.subjects.shape == (2, 4, 8, 8) and reading.tints.shape == (2, 3, 8, 8)
    for values in (reading.subjects, reading.tints, reading.backgrounds, reading.styles):
        total = values.exp().sum(dim=1)
        assert_close(total, torch.ones_like(total))


def reading_of(subjects, tints):
    """Of one picture, from probabilities."""
    return JudgeOutput(subjects.log()[None], tints.log()[None], torch.zeros(1, 2), torch.zeros(1, 2), torch.ones(1, 4))


def test_shares_places_and_tints_are_those_of_the_cells():
    # 2 x 2 cells; a cat in the upper ones, more of it on the right, a dog below on the left, nothing below on the right
    cat, dog = torch.tensor([[0.25, 0.75], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    red = torch.tensor([[0.9, 0.9], [0.2, 0.5]])
    reading = reading_of(torch.stack([cat, dog, 1 - cat - dog]), torch.stack([red, 1 - red]))
    assert_close(reading.shares(), torch.tensor([[0.25, 0.25]]))
    assert_close(reading.centroids(torch.tensor([0])), torch.tensor([[0.25 * 0.25 + 0.75 * 0.75, 0.25]]))
    assert_close(reading.centroids(torch.tensor([1])), torch.tensor([[0.25, 0.75]]))
    assert [reading.tint_of(torch.tensor([k])).item() for k in (0, 1)] == [0, 1]
    # ln 0.9 + ln 0.2 = -1.7 for red, ln 0.1 + ln 0.8 = -2.5 for blue: one cell's worth of cat, one of dog
    assert reading.tint_of().item() == 0


def test_the_pool_knows_where_things_stand():
    with with_seed(0):
        pool = AttentionPool(8, 4, 2)
    x = noise(1, 8, 4, 4)
    assert not torch.allclose(pool(x), pool(x.flip(-1)), atol=1e-4)


def test_pictures_of_another_size_are_refused(judge):
    with pytest.raises(ValueError, match="40 x 32 pixels given, the judge reads 32 x 32"):
        judge.read(torch.zeros(1, 3, 32, 40))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"blocks": (1,)}, "2 widths, 1 blocks"),
        ({"widths": (8, 12)}, "width 12; expected a multiple of 8"),
        ({"heads": 3}, "16 does not divide into 3 heads"),
        ({"image_size": 30}, "2 levels halve 30 pixels"),
    ],
)
def test_numbers_that_make_no_judge_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
