"""Make bpe.txt, the word pieces of the bundled model: a small byte-pair encoding in CLIP's own algorithm and format.

CLIP's table has 49,408 entries and would weigh more than the rest of the bundled model; its captions need 250 words.
Here a word starts as its letters, the last one marked </w>; again and again the most frequent pair of neighbours in a
corpus becomes one piece (Sennrich et al. 2016, https://arxiv.org/abs/1508.07909), until every word below is one piece.
The vocabulary is CLIP's: 256 bytes, 256 bytes with </w>, one entry a merge, start and end of text. So any text can be
encoded, and transformers' and open_clip's tokenizers read the same file.

    python -m minidiff.scenes.train_bpe

The corpus is every word that a scene's caption can have, once, plus the words that personalisation needs: those of its prompt
templates, and rare words without a meaning, one token each, to which a subject of one's own can be tied.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import tyro

from minidiff.scenes.scenes import COLOURS, STYLES, subjects

HERE = Path(__file__).parent
RARE_WORDS = ("sks", "ktn", "pll", "ucd", "ohwx", "zqj", "vbx", "wkf", "jgd", "qhy")
GRAMMAR_WORDS = ["a", "an", "small", "large", "on", "background", "in", "style", "and", "left", "of", "above"]
# The templates of DreamBooth and Textual Inversion, and what people are likely to try.
TEMPLATE_WORDS = [
    "photo",
    "picture",
    "image",
    "drawing",
    "painting",
    "rendering",
    "rendition",
    "icon",
    "emoji",
    "the",
    "my",
    "this",
    "that",
    "one",
    "two",
    "with",
    "no",
    "close",
    "up",
    "very",
    "zoomed",
    "in",
    "far",
    "away",
    "cropped",
    "bright",
    "dark",
    "dirty",
    "clean",
    "cool",
    "weird",
    "nice",
    "good",
    "big",
    "little",
    "right",
    "below",
    "under",
    "next",
    "to",
    "new",
    "old",
    "object",
    "thing",
]


def needed_words() -> tuple[str, ...]:
    """Return every word that must be a single token, in a fixed order, each once."""
    named = [word for subject in subjects().values() for word in f"{subject.name} {subject.class_name}".split()]
    return tuple(dict.fromkeys([*GRAMMAR_WORDS, *COLOURS, *STYLES, *named, *RARE_WORDS, *TEMPLATE_WORDS]))


def join_pair(pieces: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """Join each occurrence of `pair` in `pieces`, from left to right."""
    joined: list[str] = []
    for piece in pieces:
        if (*joined[-1:], piece) == pair:
            joined[-1] += piece  # now longer than either, so it begins no other pair
        else:
            joined.append(piece)
    return tuple(joined)


def train(words: Iterable[str]) -> list[tuple[str, str]]:
    """Return the merges in order, until each word is one piece; among equally frequent pairs the first by the alphabet."""
    pieces = {word: (*word[:-1], word[-1] + "</w>") for word in words}
    merges = []
    while True:
        pairs = Counter(pair for parts in pieces.values() for pair in zip(parts, parts[1:]))
        if not pairs:
            return merges
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = {word: join_pair(parts, best) for word, parts in pieces.items()}


def write_merges(out: Path = HERE / "bpe.txt") -> None:
    """Make the byte-pair encoding of the bundled model.

    Args:
        out: the file to write
    """
    merges = train(needed_words())
    # No newline at the end: open_clip would count an empty last line as a merge, and shift the start and end tokens.
    out.write_text("\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]), encoding="utf-8")
    print(f"{out}: {len(merges)} merges, {512 + len(merges) + 2} entries")


if __name__ == "__main__":
    tyro.cli(write_merges)
