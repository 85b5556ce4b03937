"""The tokenizer: a prompt becomes the 77 integers that the text encoder reads.

    "a photo of a cat" -> [start, 320, 1125, 539, 320, 2368, end, padding ...]

Byte-pair encoding (Sennrich et al. 2016) as in CLIP (Radford et al. 2021): clean the text, split it into words, spell each
word in bytes, and join the pair of pieces that comes first in a list of merges until no pair of the list is left. The list
and the joining are open_clip's. The cleaning and the padding differ between the families of Stable Diffusion, and are here.

A placeholder is a word that was learned later (Textual Inversion, Gal et al. 2022): it is not spelled in pieces but stands for ids of its
own. adapters/tokens.py adds them.

Left out: truncation strategies other than cutting the end; prompts longer than the context are read in editing/prompt_weights.py.
"""

import gzip
import importlib
import importlib.util
import io
import unicodedata
import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import regex
import torch
from jaxtyping import Int
from torch import Tensor

from minidiff.config import TokenizerConfig, check_choice

# As transformers' CLIPTokenizer splits: English contractions, runs of letters, single digits, runs of anything else.
CLIP_WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
CLIP_SPECIAL = regex.compile(r"(<\|startoftext\|>|<\|endoftext\|>)")
LETTER = r"[\p{L}\p{N}]"
MOST_MERGES = 49152 - 256 - 2  # open_clip reads no more of a file


class Tokenizer:
    """Words to integers and back; bpe is open_clip's tokenizer underneath.

    Ids: 512 bytes (inside and at the end of a word), one per merge, start, end, and one for each of config.added; vocab_size counts these.
    added: placeholders and their ids, one id a vector; kept as they are after cleaning, so in lower case. A placeholder is found wherever
    it stands in a prompt, the longest first; one that begins or ends with a letter or digit only as a whole word ("sks" is not in "tasks").
    Raises ValueError for a config with unknown choices, malformed merges or no room for a token, and for a placeholder that is empty, has
    whitespace in it, is a token already or could not be found again in a prompt.
    """

    def __init__(self, config: TokenizerConfig, added: Mapping[str, tuple[int, ...]] | None = None):
        check_choice("TokenizerConfig: cleaning", config.cleaning, ("clip", "open_clip"))
        check_choice("TokenizerConfig: padding", config.padding, ("end", "zero"))
        if config.context_length < 3:
            raise ValueError(f"TokenizerConfig: context_length {config.context_length}; start, one token and end need 3")
        self.config = config
        self.bpe = _simple_tokenizer(config.merges)
        self.vocab_size: int = self.bpe.vocab_size + len(config.added)
        self.start_id: int = self.bpe.sot_token_id
        self.end_id: int = self.bpe.eot_token_id
        self.added: dict[str, tuple[int, ...]] = {}
        # The checkpoint's own words, and those of added.
        self._spelled: dict[str, tuple[int, ...]] = {self.clean(name): (self.bpe.vocab_size + i,) for i, name in enumerate(config.added)}
        if len(self._spelled) < len(config.added) or "" in self._spelled:
            raise ValueError(f"TokenizerConfig: added {config.added}; expected words that are not empty and differ by more than case")
        self._placeholder = _any_of(self._spelled) if self._spelled else None
        for name, ids in (added or {}).items():
            self._add(name, ids)

    def with_added(self, added: Mapping[str, tuple[int, ...]]) -> "Tokenizer":
        """Return this tokenizer with more placeholders. Raises ValueError as the class does."""
        both = Tokenizer(self.config, self.added)
        for name, ids in added.items():
            both._add(name, ids)
        return both

    def without(self, names: Iterable[str]) -> "Tokenizer":
        """Return this tokenizer without some of its placeholders."""
        gone = {self.clean(name) for name in names}
        return Tokenizer(self.config, {name: ids for name, ids in self.added.items() if name not in gone})

    def _add(self, name: str, ids: tuple[int, ...]):
        cleaned = self.clean(name)
        if not cleaned or any(letter.isspace() for letter in cleaned):
            raise ValueError(f"placeholder {name!r} is empty or has whitespace in it; choose a word such as <cat>")
        if cleaned in self.added:
            raise ValueError(f"placeholder {name!r} was added before; choose another word, or take the other one off first")
        pieces = self.encode(name)
        if len(pieces) == 1:
            raise ValueError(f"placeholder {name!r} is a word of the vocabulary already (token {pieces[0]}); choose another, such as <cat>")
        self.added[cleaned] = self._spelled[cleaned] = tuple(ids)
        self._placeholder = _any_of(self._spelled)
        if self.encode(name) != list(ids):
            raise ValueError(f"placeholder {name!r} would be split where {CLIP_SPECIAL.pattern} stands in it; choose another word")

    def __call__(self, texts: list[str]) -> Int[Tensor, "B L"]:
        """Return start, tokens, end and padding for each text, int64. What does not fit is cut, and a warning shows it."""
        if isinstance(texts, str):
            raise ValueError(f"texts is the string {texts!r}; give a list of strings")
        room, rows = self.config.context_length - 2, torch.empty(len(texts), self.config.context_length, dtype=torch.int64)
        for row, text in zip(rows, texts):
            ids = self.encode(text)
            ids, lost = ids[:room], ids[room:]
            if lost:
                warnings.warn(
                    f"the prompt has {len(ids) + len(lost)} tokens and the model reads {room}; cut off: {self.decode(lost)!r}",
                    stacklevel=2,
                )
            row[:] = self.frame(ids)
        return rows

    def frame(self, ids: Sequence[int]) -> Int[Tensor, " L"]:
        """Return start, these tokens, end and padding, int64; at most context_length - 2 of them fit."""
        row = torch.full((self.config.context_length,), self.end_id if self.config.padding == "end" else 0)
        row[: len(ids) + 2] = torch.tensor([self.start_id, *ids, self.end_id])
        return row

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without start, end and padding."""
        return [i for _, ids in self.spell(text) for i in ids]

    def decode(self, ids: list[int]) -> str:
        """Return the text of tokens, as it was after cleaning, without start and end. Raises ValueError for an unknown id."""
        placeholders = {i: name for name, its in self._spelled.items() for i in its}
        parts, plain = [], []
        for n, i in enumerate(ids):
            if not 0 <= i < self.vocab_size and i not in placeholders:
                raise ValueError(f"token id {i} is outside 0..{self.vocab_size - 1}")
            if i not in placeholders:
                plain += [i] if i not in (self.start_id, self.end_id) else []
            elif n == 0 or i == self._spelled[placeholders[i]][0]:  # once for all its ids, also where the first were cut off
                parts += [self.bpe.decode(plain).strip(), placeholders[i]]
                plain = []
        return " ".join(part for part in [*parts, self.bpe.decode(plain).strip()] if part)

    def words(self, text: str) -> list[tuple[str, list[int]]]:
        """Return each word as it was split, with the positions of its tokens in the row that __call__ gives; cut words are left out."""
        placed, position = [], 1  # the start token is at 0
        for word, ids in self.spell(text):
            positions = [p for p in range(position, position + len(ids)) if p < self.config.context_length - 1]
            if positions:
                placed.append((word, positions))
            position += len(ids)
        return placed

    def clean(self, text: str) -> str:
        """Normalise a text, before it is split into words. With "clip" the two special words are to be taken out first."""
        if self.config.cleaning == "open_clip":
            return self.bpe.clean_fn(text)
        # Letter by letter: str.lower knows that a Greek sigma at the end of a word has a form of its own, CLIPTokenizer does not.
        return "".join(letter.lower() for letter in unicodedata.normalize("NFC", text))

    def spell(self, text: str) -> list[tuple[str, list[int]]]:
        """Return each word as it is split, with its tokens."""
        if self.config.cleaning == "open_clip":
            return self._split(self.clean(text), self.bpe.pat)
        words, special = [], {"<|startoftext|>": self.start_id, "<|endoftext|>": self.end_id}
        for part in CLIP_SPECIAL.split(text):
            words += [(part, [special[part]])] if part in special else self._split(self.clean(part), CLIP_WORDS)
        return words

    def _split(self, text: str, pattern: regex.Pattern) -> list[tuple[str, list[int]]]:
        """Split at placeholders, and what is between them into words."""
        words = []
        for part in self._placeholder.split(text) if self._placeholder else [text]:
            if part in self._spelled:
                words.append((part, list(self._spelled[part])))
            else:
                words += [(word, self._spell(word)) for word in pattern.findall(part)]
        return words

    def _spell(self, word: str) -> list[int]:
        letters = "".join(self.bpe.byte_encoder[byte] for byte in word.encode("utf-8"))
        return [self.bpe.encoder[piece] for piece in self.bpe.bpe(letters).split(" ")]


def _any_of(placeholders: Mapping[str, tuple[int, ...]]) -> regex.Pattern:
    """Return a pattern of any placeholder, the longest first; where one begins or ends with a letter or digit, none may stand beside it."""
    parts = []
    for name in sorted(placeholders, key=len, reverse=True):
        before = f"(?<!{LETTER})" if regex.match(LETTER, name[0]) else ""
        after = f"(?!{LETTER})" if regex.match(LETTER, name[-1]) else ""
        parts.append(f"{before}{regex.escape(name)}{after}")
    return regex.compile(f"({'|'.join(parts)})")


@cache
def _simple_tokenizer(merges: tuple[str, ...] | None):
    """Return open_clip's SimpleTokenizer over its own merges or these."""
    tokenizer = _open_clip_tokenizer().SimpleTokenizer
    if merges is None:
        return tokenizer()
    if len(merges) > MOST_MERGES:
        raise ValueError(f"TokenizerConfig: {len(merges)} merges; at most {MOST_MERGES} are read")
    for i, merge in enumerate(merges):
        if len(merge.split(" ")) != 2 or len(merge.split()) != 2:
            raise ValueError(f"TokenizerConfig: merge {i} is {merge!r}; expected two pieces with a space between")
    # It wants a gzipped file whose first line is a header. A newline at the end would count as one more merge.
    lines = "\n".join(["#version: 0.2", *merges])
    small = tokenizer(bpe_path=io.BytesIO(gzip.compress(lines.encode("utf-8"))))
    if small.vocab_size != 512 + len(merges) + 2:
        raise ValueError("TokenizerConfig: two merges give the same piece; every piece needs an id of its own")
    return small


@cache
def _open_clip_tokenizer() -> ModuleType:
    """Run open_clip's tokenizer.py by itself: 0.2 s, where `import open_clip` brings torchvision and timm and takes 5 s.

    The file needs nothing else of its package. If a later version does, the whole package is imported.
    """
    package = importlib.util.find_spec("open_clip")  # finds, does not run
    if package is None or package.submodule_search_locations is None:
        raise ImportError("open_clip is not installed; run: pip install open_clip_torch")
    file = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("minidiff.open_clip_tokenizer", file)
    assert spec is not None and spec.loader is not None  # as for every file that ends in .py
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, FileNotFoundError):
        return importlib.import_module("open_clip.tokenizer")
    return module
