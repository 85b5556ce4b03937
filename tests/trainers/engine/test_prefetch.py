"""Draws that other processes make are those that this one would make."""

import pickle
from functools import partial

import pytest
import torch

from minidiff.bundled.tasks import autoencoder_draws
from minidiff.bundled.train_judge import judge_config, judge_draws
from minidiff.trainers.engine.prefetch import Prefetcher, draw_pickled, prefetch

DRAW = partial(autoencoder_draws, 3, 100, (4, 2, 2))


def test_a_cpu_draws_itself():
    assert prefetch(DRAW, torch.device("cpu")) is DRAW


def test_other_processes_draw_the_same_and_what_goes_wrong_there_is_told():
    there = Prefetcher(DRAW, workers=1)  # one process for all, as starting it takes seconds
    for step, samples in [(7, range(4)), (8, range(4)), (8, range(4, 8)), (9, range(4)), (7, range(4))]:
        assert all(map(torch.equal, there(step, samples), DRAW(step, samples)))
        # More than this one was asked for, and no more than that for each part of a batch.
        assert (step + 1, samples) in there.waiting and len(there.waiting) <= 2 * 2 * 1 + 3
    with pytest.raises(ValueError, match="need at least one array"):
        there(10, range(0))


def test_the_judges_draws_go_through_bytes():
    draw = partial(judge_draws, judge_config(), 5)
    (pixels, tokens, labels), (pixels_there, tokens_there, labels_there) = draw(1, range(2)), pickle.loads(draw_pickled(draw, 1, range(2)))
    assert torch.equal(pixels, pixels_there) and torch.equal(tokens, tokens_there)
    assert torch.equal(labels.cover, labels_there.cover) and torch.equal(labels.subject, labels_there.subject)
    pickle.dumps(draw)  # so that another process can have it


@pytest.mark.gpu
def test_a_gpu_has_its_draws_made_ahead():
    assert isinstance(prefetch(DRAW, torch.device("cuda")), Prefetcher)
