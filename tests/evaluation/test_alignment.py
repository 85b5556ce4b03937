"""Alignment: cosines worked out by hand, and what they do not depend on."""

import torch
from torch.testing import assert_close

import weights_loader
from minidiff.evaluation.alignment import Encoder, drift, image_alignment, text_alignment


def test_text_alignment_is_each_pictures_cosine_with_its_own_text():
    pictures, texts = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [-2.0, 0.0]])
    assert_close(text_alignment(pictures, texts), torch.tensor([0.6, -1.0]))


def test_image_alignment_is_the_mean_cosine_with_all_references():
    pictures, references = torch.tensor([[3.0, 4.0]]), torch.tensor([[10.0, 0.0], [0.0, 0.1]])
    assert_close(image_alignment(pictures, references), torch.tensor([0.7]))  # (0.6 + 0.8) / 2; assert_close: fp32 rounding


def test_the_length_of_features_does_not_matter():
    x, y = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)), torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    assert_close(text_alignment(5 * x, 0.2 * y), text_alignment(x, y))
    assert_close(image_alignment(5 * x, 0.2 * y), image_alignment(x, y))


def test_drift_is_0_of_what_stayed_and_2_of_the_opposite():
    before = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0]])
    assert_close(drift(before * torch.tensor([[2.0], [-1.0], [1.0]]), before), torch.tensor([0.0, 2.0, 0.0]))
    assert_close(drift(torch.tensor([[1.0, 0.0]]), before[:1]), torch.tensor([0.4]))


def test_the_judge_is_an_encoder():
    assert isinstance(weights_loader.load_judge(), Encoder)
