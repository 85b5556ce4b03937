"""The tokenizer: a prompt becomes the 77 integers that the text encoder reads.

    "a photo of a cat" -> [start, 320, 1125, 539, 320, 2368, end, padding ...]

Byte-pair encoding (Sennrich et al. 2016) as in CLIP (Radford et al. 2021): clean the text, split it into words, spell each
word in bytes, and join the pair of pieces that comes first in a list of merges until no pair of the list is left. The list
and the joining are open_clip's. The cleaning and the padding differ between the families of Stable Diffusion, and are here.

Left out: truncation strategies other than cutting the end, and prompts longer than the context.
"""

import gzip
import importlib
import importlib.util
import io
import unicodedata
import warnings
from functools import cache
from pathlib import Path
from types import ModuleType

import regex
import torch
from jaxtyping import Int
from torch import Tensor

from minidiff.config import TokenizerConfig

# As transformers' CLIPTokenizer splits: English contractions, runs of letters, single digits, runs of anything else.
CLIP_WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+")
CLIP_SPECIAL = regex.compile(r"(<\|startoftext\|>|<\|endoftext\|>)")
MOST_MERGES = 49152 - 256 - 2  # open_clip reads no more of a file


class Tokenizer:
    """Words to integers and back; bpe is open_clip's tokenizer underneath. Ids: 512 bytes (inside and at the end of a word), one per merge, start, end.

    Raises ValueError for a config with unknown choices, malformed merges or no room for a token.
    """

    def __init__(self, config: TokenizerConfig):
        if config.cleaning not in ("clip", "open_clip"):
            raise ValueError(f"TokenizerConfig: cleaning {config.cleaning!r} unknown; choose clip, open_clip")
        if config.padding not in ("end", "zero"):
            raise ValueError(f"TokenizerConfig: padding {config.padding!r} unknown; choose end, zero")
        if config.context_length < 3:
            raise ValueError(f"TokenizerConfig: context_length {config.context_length}; start, one token and end need 3")
        self.config = config
        self.bpe = _simple_tokenizer(config.merges)
        self.vocab_size: int = self.bpe.vocab_size
        self.start_id: int = self.bpe.sot_token_id
        self.end_id: int = self.bpe.eot_token_id

    def __call__(self, texts: list[str]) -> Int[Tensor, "B L"]:
        """start, tokens, end and padding for each text, int64. What does not fit is cut, and a warning shows it."""
        if isinstance(texts, str):
            raise ValueError(f"texts is the string {texts!r}; give a list of strings")
        length = self.config.context_length
        rows = torch.full((len(texts), length), self.end_id if self.config.padding == "end" else 0)
        for row, text in zip(rows, texts):
            ids = self.encode(text)
            ids, lost = ids[: length - 2], ids[length - 2 :]
            if lost:
                warnings.warn(
                    f"the prompt has {len(ids) + len(lost)} tokens and the model reads {length - 2}; cut off: {self.decode(lost)!r}",
                    stacklevel=2,
                )
            row[: len(ids) + 2] = torch.tensor([self.start_id, *ids, self.end_id])
        return rows

    def encode(self, text: str) -> list[int]:
        """The tokens of a text, without start, end and padding."""
        return [i for _, ids in self._words(text) for i in ids]

    def decode(self, ids: list[int]) -> str:
        """The text of tokens, as it was after cleaning; start and end are left out. Raises ValueError for an unknown id."""
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"token id {i} is outside 0..{self.vocab_size - 1}")
        return self.bpe.decode([i for i in ids if i not in (self.start_id, self.end_id)]).strip()

    def words(self, text: str) -> list[tuple[str, list[int]]]:
        """Each word as it was split, with the positions of its tokens in the row that __call__ gives; cut words are left out."""
        placed, position = [], 1  # the start token is at 0
        for word, ids in self._words(text):
            positions = [p for p in range(position, position + len(ids)) if p < self.config.context_length - 1]
            if positions:
                placed.append((word, positions))
            position += len(ids)
        return placed

    def _words(self, text: str) -> list[tuple[str, list[int]]]:
        if self.config.cleaning == "open_clip":
            return [(word, self._spell(word)) for word in self.bpe.pat.findall(self.bpe.clean_fn(text))]
        words, special = [], {"<|startoftext|>": self.start_id, "<|endoftext|>": self.end_id}
        for part in CLIP_SPECIAL.split(text):
            if part in special:
                words.append((part, [special[part]]))
                continue
            # Letter by letter: str.lower knows that a Greek sigma at the end of a word has a form of its own, CLIPTokenizer does not.
            part = "".join(letter.lower() for letter in unicodedata.normalize("NFC", part))
            words += [(word, self._spell(word)) for word in CLIP_WORDS.findall(part)]
        return words

    def _spell(self, word: str) -> list[int]:
        letters = "".join(self.bpe.byte_encoder[byte] for byte in word.encode("utf-8"))
        return [self.bpe.encoder[piece] for piece in self.bpe.bpe(letters).split(" ")]


@cache
def _simple_tokenizer(merges: tuple[str, ...] | None):
    """open_clip's SimpleTokenizer over its own merges or these."""
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
    """open_clip's tokenizer.py, run by itself: 0.2 s, where `import open_clip` brings torchvision and timm and takes 5 s.

    The file needs nothing else of its package. Should a later version do, the whole package is imported after all.
    """
    package = importlib.util.find_spec("open_clip")  # finds, does not run
    if package is None:
        raise ImportError("open_clip is not installed; run: pip install open_clip_torch")
    file = Path(package.submodule_search_locations[0]) / "tokenizer.py"
    spec = importlib.util.spec_from_file_location("minidiff.open_clip_tokenizer", file)
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    except (ImportError, FileNotFoundError):
        return importlib.import_module("open_clip.tokenizer")
    return module
