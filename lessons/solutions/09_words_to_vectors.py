"""Answers of lesson 09."""

from lessons.exercises import Exercise, difference
from minidiff.scenes.train_bpe import join_pair


def spell(word, merges):
    pieces = (*word[:-1], word[-1] + "</w>")
    while True:
        known = [pair for pair in zip(pieces, pieces[1:]) if pair in merges]
        if not known:
            return pieces
        pieces = join_pair(pieces, min(known, key=merges.get))


def check_spell(function) -> str | None:
    """With merges that lead to another end in every other order."""
    merges = {("e", "r</w>"): 0, ("l", "o"): 1, ("o", "w"): 2, ("w", "er</w>"): 3, ("lo", "w"): 4}
    mistakes = {
        "joins the pair that stands first in 'lower'; of the pairs that are in merges take the one with the lowest rank": leftmost(
            "lower", merges
        ),
        "joins the pair with the highest rank; the lowest, 0, comes first: ('e', 'r</w>') in 'lower'": highest("lower", merges),
        "forgets that the last letter of 'lower' is 'r</w>', by which a piece at the end of a word is told from one inside": without_end(
            "lower", merges
        ),
        "stops after one merge of 'lower'; go on until no pair of neighbours is in merges": once("lower", merges),
    }
    for word in ("lower", "low", "e"):
        got = function(word, dict(merges))
        wrong = difference(
            tuple(got) if isinstance(got, list) else got, spell(word, merges), mistakes if word == "lower" else None, of=f"for {word!r}"
        )
        if wrong is not None:
            return wrong
    return None


def leftmost(word, merges):
    pieces = (*word[:-1], word[-1] + "</w>")
    while known := [pair for pair in zip(pieces, pieces[1:]) if pair in merges]:
        pieces = join_pair(pieces, known[0])
    return pieces


def highest(word, merges):
    pieces = (*word[:-1], word[-1] + "</w>")
    while known := [pair for pair in zip(pieces, pieces[1:]) if pair in merges]:
        pieces = join_pair(pieces, max(known, key=merges.get))
    return pieces


def without_end(word, merges):
    pieces = tuple(word)
    while known := [pair for pair in zip(pieces, pieces[1:]) if pair in merges]:
        pieces = join_pair(pieces, min(known, key=merges.get))
    return pieces


def once(word, merges):
    pieces = (*word[:-1], word[-1] + "</w>")
    known = [pair for pair in zip(pieces, pieces[1:]) if pair in merges]
    return join_pair(pieces, min(known, key=merges.get)) if known else pieces


EXERCISES = (
    Exercise(
        spell,
        check_spell,
        wrong=(
            (leftmost, "stands first in 'lower'"),
            (highest, "with the highest rank"),
            (without_end, "forgets that the last letter"),
            (once, "stops after one merge"),
        ),
    ),
)
