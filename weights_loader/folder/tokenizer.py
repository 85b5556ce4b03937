"""Read the tokenizer of a diffusers folder: its merges, its added words, what pads a prompt; and whether all files of it agree.

A merges.txt that was cut short gives every later piece, and the end of the text, another id than the model learned. So the ids that
follow from the merges are compared with those that vocab.json, the text encoder's config and its number of rows state.
"""

import hashlib
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minidiff.config import TextEncoderConfig, TokenizerConfig
from weights_loader.brief import brief
from weights_loader.folder.settings import read_json

# The digest of CLIP's own merges, one per line: the tokenizer knows them without a copy in every config.
CLIP_MERGES_SHA256 = "f61f2adf497e6f5357c347aeb4646fabe82f341e946de5bdec5d2858e41bef4a"
BYTES = 512  # pieces of a single byte, inside a word and at its end; the merges' pieces follow
OLD_END = 2  # the id of the end token in configs that transformers wrote before 4.32, wrong for every model


def tokenizer_config(folder: Path, encoder: TextEncoderConfig, end: int | None) -> TokenizerConfig:
    """Read vocab.json and merges.txt, or the tokenizer.json that transformers 5 writes in their place.

    Args:
        folder: the tokenizer's.
        encoder: the config of the text encoder that it belongs to.
        end: the id of the end token, if the text encoder's config states it.

    Raises ValueError for files that do not agree, and for an entry of another type than transformers writes.
    """
    settings, whole = read_json(folder / "tokenizer_config.json"), {}
    if (folder / "tokenizer.json").is_file():
        whole = read_json(folder / "tokenizer.json")
    model = _expect(folder / "tokenizer.json", whole.get("model", {}), dict, "model")
    if (folder / "merges.txt").is_file():
        source = folder / "merges.txt"
        try:
            lines = source.read_text(encoding="utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}: no text in UTF-8 ({error}); interrupted download?") from None
        merges = tuple(line for line in lines if line and not line.startswith("#version"))
    else:
        source = folder / "tokenizer.json"
        listed = _expect(source, model.get("merges", []), list, "model.merges")
        merges = tuple(pair if isinstance(pair, str) else " ".join(_expect(source, pair, list, "a merge", str)) for pair in listed)
    vocabulary = read_json(folder / "vocab.json") if (folder / "vocab.json").is_file() else model.get("vocab", {})
    is_clip = hashlib.sha256("\n".join(merges).encode()).hexdigest() == CLIP_MERGES_SHA256
    _check_ids(source, merges, _expect(folder / "vocab.json", vocabulary, dict, "the vocabulary"))
    first = BYTES + len(merges) + 2
    if end not in (None, OLD_END, first - 1):
        raise ValueError(
            f"{source}: the end of a text has id {first - 1} by its {len(merges)} merges, and {end} by the text encoder; cut short?"
        )
    added = _added_words(folder, settings, whole, first)
    if not is_clip and not vocabulary and first + len(added) != encoder.vocab_size:
        raise ValueError(
            f"{source}: {len(merges)} merges make {first} tokens, and the text encoder has {encoder.vocab_size} rows; cut short?"
        )
    length = settings.get("model_max_length", 77)
    return TokenizerConfig(
        added=added,
        merges=None if is_clip else merges,
        padding="zero" if _padding(folder, settings) == "!" else "end",  # "!" is token 0
        context_length=min(_expect(folder / "tokenizer_config.json", length, int, "model_max_length"), encoder.context_length),
    )


def _check_ids(source: Path, merges: tuple[str, ...], vocabulary: Mapping[str, object]) -> None:
    """Raise ValueError unless the vocabulary gives each merge's piece, and the end of the text, the id that follows from the merges."""
    if not vocabulary:
        return
    ids = {merge.replace(" ", "", 1): BYTES + i for i, merge in enumerate(merges)} | {"<|endoftext|>": BYTES + len(merges) + 1}
    for piece, i in ids.items():
        if vocabulary.get(piece) != i:
            raise ValueError(
                f"{source}: {brief(piece)} has id {i} by its {len(merges)} merges, and {brief(vocabulary.get(piece))} by the vocabulary; "
                "cut short, or of another tokenizer?"
            )


def _padding(folder: Path, settings: Mapping[str, Any]) -> str | None:
    pad, place = settings.get("pad_token"), folder / "tokenizer_config.json"
    # As transformers: where the settings are of the old kind, the map has the last word. SD 2.x's own files differ in this.
    if (folder / "special_tokens_map.json").is_file() and (pad is None or "added_tokens_decoder" not in settings):
        place = folder / "special_tokens_map.json"
        pad = read_json(place).get("pad_token", pad)
    pad = pad.get("content") if isinstance(pad, dict) else pad
    return None if pad is None else _expect(place, pad, str, "pad_token")


def _added_words(folder: Path, settings: Mapping[str, Any], whole: Mapping[str, Any], first: int) -> tuple[str, ...]:
    """Return the words behind the vocabulary of the merges, from any of the three files that name them. `first` is their first id."""
    place = folder / "tokenizer_config.json"
    decoder = _expect(place, settings.get("added_tokens_decoder", {}), dict, "added_tokens_decoder", dict)
    pairs = [(i, token.get("content")) for i, token in decoder.items()]
    if (folder / "added_tokens.json").is_file():
        place = folder / "added_tokens.json"
        pairs += [(i, word) for word, i in read_json(place).items()]
    listed = _expect(folder / "tokenizer.json", whole.get("added_tokens", []), list, "added_tokens", dict)
    pairs += [(token.get("id"), token.get("content")) for token in listed]
    if odd := next((pair for pair in pairs if not str(pair[0]).isdecimal() or not isinstance(pair[1], str)), None):
        raise ValueError(f"{place}: an added word {reprlib.repr(odd[1])} of id {reprlib.repr(odd[0])}; expected text and a whole number")
    ids = {int(i): word for i, word in pairs}
    added = sorted((i, word) for i, word in ids.items() if i >= first)
    if [i for i, _ in added] != list(range(first, first + len(added))):
        shown = ", ".join(f"{i} {brief(word)}" for i, word in added[:8])
        raise ValueError(f"{folder}: added words have the ids {shown}; expected {first}, {first + 1}, ...")
    return tuple(word for _, word in added)


def _expect(path: Path, value: Any, kind: type, name: str, inside: type = object) -> Any:
    """Return the value. Raises ValueError unless it has that type, and its entries the type `inside`."""
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not isinstance(value, kind) or isinstance(value, bool) or not all(isinstance(entry, inside) for entry in entries):
        words = {dict: "an object", list: "a list", int: "a whole number", str: "text"}[kind]
        raise ValueError(f"{path}: {name} is {reprlib.repr(value)}; expected {words}")
    return value
