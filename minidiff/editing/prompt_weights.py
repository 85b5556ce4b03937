"""Prompts of any length, and words that count more or less than others: another text side in place of the model's own.

    "a (small:1.4) cat ..." -> parts of text, each with a weight -> chunks of the context length -> text encoder, chunk by chunk
                            -> z, one vector per token, all chunks in a row -> e + w (z - e) -> context

e is the empty prompt's vector at the same position: a word of weight 0 says nothing, one of weight 1 what it always says, and beyond that
the same line goes on. That is ComfyUI's arithmetic. A1111 multiplies z by w and then the whole prompt by a ratio of means, so that words
without a weight change too, and so does a prompt when another one is in its batch.

Only `(text:number)` is a weight; other brackets are text, as are \\( and \\). A weight inside another one takes its place. A prompt that
has no weights and fits into the context gives what the model's own text side gives, bit for bit. Chunks are encoded apart (the text
encoder has no positions beyond its context) and filled with whole words; shorter prompts are filled up with empty chunks. Of two text
encoders each does so with its own tokens.

Left out: weights without a number, words exchanged along the way, several prompts joined by AND.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from minidiff.conditioning import Conditioning, TextSide
from minidiff.tokenizer import Tokenizer
from minidiff.two_encoders import FIRST, SECOND, TwoEncoders

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


def weighted_side(text: TextSide) -> "WeightedText | WeightedTwoEncoders":
    """Return a text side that reads weights and prompts of any length, in place of a model's own: `sd.text = weighted_side(sd.text)`."""
    return WEIGHTED.get(type(text), type(text))(**vars(text))  # one that reads them already stays as it is


class WeightedText(TextSide):
    """A text side of one encoder that reads weights, and prompts of any length."""

    def __call__(self, prompts: Sequence[str], size: tuple[int, int] | None = None) -> Conditioning:
        """Encode prompts, one row each, as long as the longest prompt's chunks. size: as in TextSide. Raises like `parse_weights`."""
        parts = [parse_weights(prompt) for prompt in prompts]
        if fits(self.tokenizers[FIRST], parts):
            return super().__call__([plain(one) for one in parts], size)
        (chunks,) = pad_chunks([[split_chunks(self.tokenizers[FIRST], one) for one in parts]])
        return Conditioning(encode_chunks(self, FIRST, chunks).context)


class WeightedTwoEncoders(TwoEncoders):
    """The same with two encoders: each weighs its own tokens, and both have as many chunks.

    The pooled vector is that of the first chunk, without weights, as in ComfyUI.
    """

    def encode(self, texts: Sequence[str], texts_2: Sequence[str]) -> tuple[Float[Tensor, "R L D"], Float[Tensor, "R P"]]:
        """Encode as TwoEncoders does, as long as the longest prompt's chunks. Raises like `parse_weights`."""
        parts = {FIRST: [parse_weights(text) for text in texts], SECOND: [parse_weights(text) for text in texts_2]}
        if all(fits(self.tokenizers[name], own) for name, own in parts.items()):
            return super().encode(*([plain(one) for one in own] for own in parts.values()))
        chunks = pad_chunks([[split_chunks(self.tokenizers[name], one) for one in own] for name, own in parts.items()])
        first, second = (encode_chunks(self, name, own) for name, own in zip(parts, chunks))
        return torch.cat([first.context, second.context], dim=-1), self.encoders[SECOND].pool(second.first, second.ends)


WEIGHTED = {TextSide: WeightedText, TwoEncoders: WeightedTwoEncoders}


def plain(parts: Sequence[Weighted]) -> str:
    """Return the text of parts without their weights."""
    return "".join(part.text for part in parts)


def fits(tokenizer: Tokenizer, prompts: Sequence[Sequence[Weighted]]) -> bool:
    """Say whether all prompts are read at once and have no weights, so that nothing is to be done here."""
    return all(part.weight == 1 for parts in prompts for part in parts) and all(len(split_chunks(tokenizer, one)) == 1 for one in prompts)


def split_chunks(tokenizer: Tokenizer, parts: Sequence[Weighted]) -> list[Chunk]:
    """Fill chunks with whole words; a word that is longer than a chunk is split. No words make one empty chunk."""
    room = tokenizer.config.context_length - 2
    filled: list[Chunk] = [[]]
    for part in parts:
        assert part.weight is not None, "parse_weights has filled it in"
        for _, ids in tokenizer.spell(part.text):
            for piece in (ids[i : i + room] for i in range(0, len(ids), room)):
                if len(filled[-1]) + len(piece) > room:
                    filled.append([])
                filled[-1].extend((i, part.weight) for i in piece)
    return filled


def pad_chunks(texts: Sequence[Sequence[list[Chunk]]]) -> list[list[list[Chunk]]]:
    """Fill the prompts of each encoder up with empty chunks, to as many as the longest prompt of any encoder has."""
    most = max(len(chunks) for prompts in texts for chunks in prompts)
    return [[[*chunks, *[[] for _ in range(most - len(chunks))]] for chunks in prompts] for prompts in texts]


@dataclass(frozen=True)
class EncodedChunks:
    """What an encoder gives for prompts of as many chunks each.

    context: of all chunks in a row, weighted. first: the context of the first chunk without weights. ends: where its end token is.
    """

    context: Float[Tensor, "B N D"]
    first: Float[Tensor, "B L D"]
    ends: Int[Tensor, "B"]


def encode_chunks(text: TextSide, name: str, prompts: Sequence[list[Chunk]]) -> EncodedChunks:
    """Encode the chunks of prompts by the encoder of this name, and weigh their tokens."""
    tokenizer, encoder, most = text.tokenizers[name], text.encoders[name], len(prompts[0])
    chunks = [chunk for own in prompts for chunk in own]
    tokens = torch.stack([tokenizer.frame([i for i, _ in chunk]) for chunk in [*chunks, []]]).to(encoder.token_embedding.weight.device)
    *rows, empty = encoder(tokens)
    z = rearrange(torch.stack(rows), "(B n) L D -> B (n L) D", n=most)
    e = repeat(empty, "L D -> (n L) D", n=most)
    weights = torch.ones(len(chunks), tokens.shape[1])  # of start, end and padding too
    for row, chunk in zip(weights, chunks):
        row[1 : len(chunk) + 1] = torch.tensor([weight for _, weight in chunk])
    w = rearrange(weights, "(B n) L -> B (n L) 1", n=most).to(z)
    weighted = torch.where(w == 1, z, e + w * (z - e))  # a weight of 1 changes nothing, not even by rounding
    return EncodedChunks(weighted, z[:, : tokens.shape[1]], torch.tensor([len(own[0]) + 1 for own in prompts]))
