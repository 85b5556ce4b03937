"""The stand-in for open_clip's tokenizer, against open_clip's."""

import gzip
import io
import os
import sys

import pytest
from open_clip.tokenizer import SimpleTokenizer as Original

from minidiff.bench import stand_in
from minidiff.bench.stand_in.open_clip.tokenizer import SimpleTokenizer
from tests.small_models import MERGES


def packed() -> io.BytesIO:
    return io.BytesIO(gzip.compress("\n".join(["#version: 0.2", *MERGES]).encode()))


@pytest.mark.parametrize("word", ["a", "apple", "tigers", "naïve", "Übung", "日本", "zzzz", "background", "42"])
def test_words_have_the_pieces_and_the_ids_that_open_clip_gives_them(word):
    ours, theirs = SimpleTokenizer(packed()), Original(bpe_path=packed())
    assert ours.byte_encoder == theirs.byte_encoder and list(ours.encoder)[:-2] == list(theirs.encoder)[:-2]
    assert (ours.vocab_size, ours.sot_token_id, ours.eot_token_id) == (theirs.vocab_size, theirs.sot_token_id, theirs.eot_token_id)
    letters = "".join(ours.byte_encoder[byte] for byte in word.encode())
    assert ours.bpe(letters) == theirs.bpe(letters)
    ids = [ours.encoder[piece] for piece in ours.bpe(letters).split(" ")]
    assert ours.decode(ids) == theirs.decode(ids) == f"{word} "


def test_it_takes_the_place_of_open_clip_only_where_that_is_missing(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "before")
    stand_in.provide_open_clip()
    assert os.environ["PYTHONPATH"] == "before"
    monkeypatch.setattr(stand_in.importlib.util, "find_spec", lambda name: None)
    stand_in.provide_open_clip()
    assert sys.path[-1].endswith("stand_in") and os.environ["PYTHONPATH"] == os.pathsep.join(["before", sys.path[-1]])
