"""Byte-pair encoding (Sennrich et al. 2016, algorithm 1) with the names that minidiff/tokenizer.py uses of open_clip's SimpleTokenizer."""

import gzip
from io import BytesIO

import regex

END_OF_WORD = "</w>"
START, END = "<start_of_text>", "<end_of_text>"


class SimpleTokenizer:
    """The vocabulary of a list of merges: 256 bytes, 256 bytes at a word's end, one piece per merge, start and end.

    bpe_path: gzipped text, a line of header, then a merge per line; without it there are no merges.
    """

    def __init__(self, bpe_path: BytesIO | None = None):
        lines = gzip.decompress(bpe_path.read()).decode("utf-8").split("\n")[1:] if bpe_path else []
        merges = [tuple(line.split(" ")) for line in lines if line]
        self.byte_encoder = printable_bytes()
        letters = list(self.byte_encoder.values())
        pieces = [*letters, *(letter + END_OF_WORD for letter in letters), *("".join(pair) for pair in merges), START, END]
        self.encoder = {piece: i for i, piece in enumerate(pieces)}
        self.decoder = {i: piece for piece, i in self.encoder.items()}
        self.bpe_ranks = {pair: i for i, pair in enumerate(merges)}
        self.vocab_size, self.sot_token_id, self.eot_token_id = len(self.encoder), self.encoder[START], self.encoder[END]
        self.pat = regex.compile(r"\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")

    def clean_fn(self, text: str) -> str:
        """Return the text in lower case."""
        return text.lower()

    def bpe(self, word: str) -> str:
        """Return the pieces of a word, with spaces between: of all pairs of neighbours, the first in the list of merges is joined first."""
        parts = [*word[:-1], word[-1] + END_OF_WORD]
        while pairs := [pair for pair in zip(parts, parts[1:]) if pair in self.bpe_ranks]:
            first, joined, i = min(pairs, key=lambda pair: self.bpe_ranks[pair]), [], 0
            while i < len(parts):
                found = tuple(parts[i : i + 2]) == first
                joined.append("".join(first) if found else parts[i])
                i += 2 if found else 1
            parts = joined
        return " ".join(parts)

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens."""
        letters = {letter: byte for byte, letter in self.byte_encoder.items()}
        text = "".join(self.decoder[i] for i in ids).replace(END_OF_WORD, " ")
        return b"".join(bytes([letters[x]]) if x in letters else x.encode() for x in text).decode("utf-8", errors="replace")


def printable_bytes() -> dict[int, str]:
    """Return a printable letter for each byte, as GPT-2 chose them: Latin-1's own where it prints, else the next one from U+0100 on.

    Printing bytes come first, which is the order of their ids.
    """
    printing = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {byte: chr(byte) for byte in printing} | {byte: chr(256 + i) for i, byte in enumerate(others)}
