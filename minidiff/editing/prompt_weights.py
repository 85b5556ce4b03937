"""Prompts of any length, and words that count more or less than others: another text side in place of the model's own.

    "a (small:1.4) cat ..." -> parts of text, each with a weight -> chunks of the context length -> text encoder, chunk by chunk
                            -> z, one vector per token, all chunks in a row -> e + w (z - e) -> context

e is the empty prompt's vector at the same position: a word of weight 0 says nothing, one of weight 1 what it always says, and beyond that
the same line goes on. That is ComfyUI's arithmetic. A1111 multiplies z by w and then the whole prompt by a ratio of means, so that words
without a weight change too, and so does a prompt when another one is in its batch.

Only `(text:number)` is a weight; other brackets are text, as are \\( and \\). A weight inside another one takes its place. A prompt that
has no weights and fits into the context gives what the model's own text side gives, bit for bit. Chunks are encoded apart (the text
encoder has no positions beyond its context) and filled with whole words; shorter prompts are filled up with empty chunks.

Left out: weights without a number, words exchanged along the way, several prompts joined by AND.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from minidiff.conditioning import Conditioning, TextSide

MOST = 5.0  # of a weight: beyond that a prompt means something else, such as (at 12:30)
BRACKET = re.compile(r"\\[()]|[()]")
WEIGHT = re.compile(r":\s*(?P<number>\d+\.?\d*|\.\d+)\s*$")
NEARLY = re.compile(r":\s*[-+]?[.,]?\d[\d.,]*(?P<rest>[^:]*)$")  # what looks like a weight, and what follows it


@dataclass(frozen=True)
class Weighted:
    """A part of a prompt; None is no weight of its own yet."""

    text: str
    weight: float | None = None


def parse_weights(prompt: str) -> list[Weighted]:
    """Split a prompt into parts with their weights, 1 where none is given.

    Raises ValueError, with the character's number, for a weight that is no number in 0..MOST, a bracket with a weight that is never closed,
    and a weight of nothing.
    """
    groups: list[tuple[int, list[Weighted]]] = [(0, [])]  # of each open bracket: where it stands, and its parts so far
    after = 0
    for found in BRACKET.finditer(prompt):
        groups[-1][1].append(Weighted(prompt[after : found.start()]))
        after = found.end()
        if found[0] == "(":
            groups.append((found.start(), []))
        elif found[0] == ")" and len(groups) > 1:
            at, parts = groups.pop()
            groups[-1][1].extend(_close(prompt, at, parts))
        else:
            groups[-1][1].append(Weighted(found[0][-1]))
    groups[-1][1].append(Weighted(prompt[after:]))
    while len(groups) > 1:  # brackets that are never closed: text, unless a weight was meant
        at, parts = groups.pop()
        if any(NEARLY.search(part.text) for part in parts if part.weight is None):
            raise _wrong(prompt, at, "is never closed")
        groups[-1][1].extend([Weighted("("), *parts])
    weighted = [(part.text, 1.0 if part.weight is None else part.weight) for part in groups[0][1] if part.text]
    return [Weighted("".join(text for text, _ in same), weight) for weight, same in groupby(weighted, key=lambda part: part[1])]


def _close(prompt: str, at: int, parts: list[Weighted]) -> list[Weighted]:
    """Return the parts of a bracket that was closed, weighted if it says a weight."""
    *before, last = parts
    weight = WEIGHT.search(last.text)
    if weight is None:
        if (nearly := NEARLY.search(last.text)) and not nearly["rest"].strip():
            raise _wrong(prompt, at, f"has no weight behind its colon: {last.text.rpartition(':')[2]!r} is no number of 0 or more")
        return [Weighted("("), *parts, Weighted(")")]
    number = float(weight["number"])
    if number > MOST:
        raise _wrong(prompt, at, f"has the weight {number:g}; weights go from 0 to {MOST:g}")
    parts = [*before, Weighted(last.text[: weight.start()])]
    if not "".join(part.text for part in parts).strip():
        raise _wrong(prompt, at, "weighs nothing")
    return [Weighted(part.text, number if part.weight is None else part.weight) for part in parts]


def _wrong(prompt: str, at: int, what: str) -> ValueError:
    return ValueError(f"prompt {prompt!r}: the bracket at character {at + 1} {what}; write (word:1.3), or \\( for a bracket that is text")


Chunk = list[tuple[int, float]]  # tokens, each with its weight


class WeightedText(TextSide):
    """A text side that reads weights, and prompts of any length, for models with one text encoder.

    Take it on by `sd.text = WeightedText(sd.text.tokenizers, sd.text.encoders)`.
    """

    def __call__(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """Encode prompts, one row each, as long as the longest prompt's chunks. size: as in TextSide. Raises like `parse_weights`."""
        parts = [parse_weights(prompt) for prompt in prompts]
        chunks = [self.chunks(one) for one in parts]
        most = max(map(len, chunks))
        if most == 1 and all(part.weight == 1 for one in parts for part in one):
            return super().__call__(["".join(part.text for part in one) for one in parts], size)
        padded = [chunk for one in chunks for chunk in (*one, *[[]] * (most - len(one)))]
        return Conditioning(self._encode(padded, most))

    def chunks(self, parts: Sequence[Weighted]) -> list[Chunk]:
        """Fill chunks with whole words; a word that is longer than a chunk is split. No words make one empty chunk."""
        room = self.tokenizers["text_encoder"].config.context_length - 2
        filled: list[Chunk] = [[]]
        for word in self._words(parts):
            for piece in (word[i : i + room] for i in range(0, len(word), room)):
                if len(filled[-1]) + len(piece) > room:
                    filled.append([])
                filled[-1].extend(piece)
        return filled

    def _words(self, parts: Sequence[Weighted]) -> Iterator[Chunk]:
        for part in parts:
            assert part.weight is not None, "parse_weights has filled it in"
            for _, ids in self.tokenizers["text_encoder"].spell(part.text):
                yield [(i, part.weight) for i in ids]

    def _encode(self, chunks: Sequence[Chunk], most: int) -> Float[Tensor, "B L D"]:
        """Encode the chunks, `most` for each prompt, and weigh their tokens."""
        tokenizer, encoder = self.tokenizers["text_encoder"], self.encoders["text_encoder"]
        tokens = torch.stack([tokenizer.frame([i for i, _ in chunk]) for chunk in [*chunks, []]])
        *rows, empty = encoder(tokens.to(encoder.token_embedding.weight.device))
        z = rearrange(torch.stack(rows), "(B n) L D -> B (n L) D", n=most)
        e = repeat(empty, "L D -> (n L) D", n=most)
        weights = torch.ones(len(chunks), tokens.shape[1])  # of start, end and padding too
        for row, chunk in zip(weights, chunks):
            row[1 : len(chunk) + 1] = torch.tensor([weight for _, weight in chunk])
        w = rearrange(weights, "(B n) L -> B (n L) 1", n=most).to(z)
        return torch.where(w == 1, z, e + w * (z - e))  # a weight of 1 changes nothing, not even by rounding
