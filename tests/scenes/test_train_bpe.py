"""The byte-pair encoding of the captions: merges in order, and those that ship."""

from minidiff.scenes.scenes import bpe_merges
from minidiff.scenes.train_bpe import join_pair, needed_words, train


def test_merges_go_by_frequency_and_then_by_the_alphabet():
    assert join_pair(("a", "b", "a", "b"), ("a", "b")) == ("ab", "ab")
    assert train(["ab", "ab", "b"]) == [("a", "b</w>")]
    assert train(["cat", "car"]) == [("c", "a"), ("ca", "r</w>"), ("ca", "t</w>")]


def test_the_merges_that_ship_are_those_of_the_needed_words():
    assert tuple(" ".join(pair) for pair in train(needed_words())) == bpe_merges()
