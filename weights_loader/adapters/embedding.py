"""Files of learned words (Textual Inversion embeddings) in and out.

    diffusers   {"<cat>": rows}                                        .safetensors, .bin; a single vector may come as [D]
    a1111       {"emb_params": rows}                                   .safetensors, kohya's too; the word is the file's name
                {"string_to_param": {"*": rows}, "name": "<cat>"}      .pt
    SDXL        {"clip_l": rows, "clip_g": rows}                       .safetensors of all programs; one of each for every vector

Rows are [n, D]: one vector per row, as wide as the text encoder's other words; here those of two encoders lie side by side.
"""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from minidiff.adapters.tokens import NewTokens, words_width
from minidiff.config import check_choice
from minidiff.pipeline import StableDiffusion
from weights_loader.adapters.origin import describe_origin
from weights_loader.brief import brief
from weights_loader.detect import FEW, describe, kind
from weights_loader.families import made_for_another
from weights_loader.metadata import FORMAT, settings_to_metadata
from weights_loader.read import Checkpoint, read
from weights_loader.write import write_safetensors, write_torch

NAME_KEY = "name"  # of the word, in a1111's .pt and in the metadata of its .safetensors; without it the word is the file's name
PAIR: tuple[str, str] = ("clip_l", "clip_g")  # of the first and the second text encoder
LEFT = r"^string_to_token\."  # the number of the word that was split open in training
A1111_START = 265  # the id of "*", the word that the web interfaces split open


def read_embedding(path: str | Path, sd: StableDiffusion, token: str | None = None) -> NewTokens:
    """Read the words of a file, not attached; float32.

    token: the word in prompts, in place of the file's own name for it; only for a file of one word.
    Raises FileNotFoundError, and ValueError for what is no embedding or is of another width than the model's words.
    """
    checkpoint = read(path)
    try:
        rows = parse(checkpoint)
        if token is not None:
            if len(rows) > 1:
                raise ValueError(f"{len(rows)} words in it ({', '.join(rows)}); a name can be given to a single one")
            rows = {token: next(iter(rows.values()))}
        check_width(rows, sd)
        return NewTokens(rows)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def parse(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return {word: rows [n, D]}, float32. Raises ValueError for what is no embedding, and for a tensor that is no part of one."""
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not re.search(LEFT, name)}
    names = list(tensors)
    if not is_embedding(tensors):
        if kind(names) != "embedding":
            raise ValueError(f"given as an embedding, but it is {describe(list(checkpoint.tensors))}")
        name, tensor = next((name, tensor) for name, tensor in tensors.items() if not _is_vectors(tensor))
        raise ValueError(f"'{name}' is {tensor.dtype} of shape {tuple(tensor.shape)}; expected vectors of floating point, [D] or [n, D]")
    if any(name in PAIR for name in names):
        stated = checkpoint.metadata.get(NAME_KEY)
        return {stated or checkpoint.path.stem: _side_by_side(tensors)}
    ours = [name for name in names if name == "emb_params" or name.startswith("string_to_param.")]
    if ours and names != ours[:1]:
        unknown = [name for name in names if name not in ours[:1]]
        raise ValueError(f"beside {ours[0]} it holds {', '.join(unknown)}; expected one word alone")
    if ours:
        fields = checkpoint.metadata if ours[0] == "emb_params" else checkpoint.tree
        stated = fields.get(NAME_KEY) if isinstance(fields, Mapping) else None
        tensors = {stated if isinstance(stated, str) and stated else checkpoint.path.stem: tensors[ours[0]]}
    return {word: rows.float().reshape(-1, rows.shape[-1]) for word, rows in tensors.items()}


def _side_by_side(tensors: Mapping[str, Tensor]) -> Tensor:
    if set(tensors) != {*PAIR}:
        raise ValueError(f"an embedding for Stable Diffusion XL has {' and '.join(PAIR)}; this one has {', '.join(tensors)}")
    first, second = (rows.float().reshape(-1, rows.shape[-1]) for rows in (tensors[name] for name in PAIR))
    if len(first) != len(second):
        raise ValueError(f"{len(first)} vectors in {PAIR[0]} and {len(second)} in {PAIR[1]}; expected as many of each")
    return torch.cat([first, second], dim=1)


def is_embedding(tensors: dict[str, Tensor]) -> bool:
    """Return whether the names are an embedding's, or plain words: a few vectors or matrices without a module's dots in their names."""
    if not tensors or not all(map(_is_vectors, tensors.values())):
        return False
    found = kind(list(tensors))
    return found == "embedding" or found is None and (len(tensors) <= FEW or not any("." in name for name in tensors))


def _is_vectors(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dim() in (1, 2) and 0 not in tensor.shape


def parse_named(text: str) -> tuple[str, str | None]:
    """Split "cat.pt:<cat>" into ("cat.pt", "<cat>"): a file, and the word that it is to have in prompts; None without one.

    The word stands behind the ending of a file's name, or behind the name of a file that is there.
    """
    if Path(text).exists():
        return text, None
    if match := re.fullmatch(r"(.+?\.(?:safetensors|pt|pth|bin|ckpt)):(.+)", text, re.IGNORECASE | re.DOTALL):
        return match[1], match[2]
    file, colon, word = text.rpartition(":")
    return (file, word) if colon and word and Path(file).exists() else (text, None)


def check_width(rows: Mapping[str, Tensor], sd: StableDiffusion) -> None:
    """Raise ValueError unless the rows are as wide as the model's words."""
    for word, vectors in rows.items():
        if vectors.shape[1] != words_width(sd):
            raise ValueError(f"not an embedding for this model: {brief(word)} is {made_for_another(sd.config, vectors.shape[1])}")


def write_embedding(
    path: str | Path,
    tokens: NewTokens,
    form: str = "diffusers",
    settings: dict[str, object] | None = None,
    widths: Sequence[int] = (),
    sd: StableDiffusion | None = None,
) -> None:
    """Write learned words.

    Args:
        path: the file
        tokens: the words. The web interfaces call a word by its file's name, and neither they nor diffusers take two words from one file;
            this project does
        form: "diffusers" as .safetensors or .bin, "a1111" as .safetensors or .pt
        settings: what they were made with, kept as JSON in the metadata of a .safetensors file
        widths: of the vectors of each text encoder; two make a pair for SDXL, in a .safetensors file that both forms share
        sd: the model that they were learned on, for the metadata (origin.py)

    Raises ValueError for an unknown form or another suffix, for several words for a1111, and for settings that the file has no place for;
    FileNotFoundError without the folder.
    """
    path = Path(path)
    suffixes = {"diffusers": (".safetensors", ".bin"), "a1111": (".safetensors", ".pt")}
    check_choice("form", form, suffixes)
    if path.suffix not in suffixes[form]:
        raise ValueError(f"{path}: an embedding for {form} is written as {' or '.join(suffixes[form])}")
    if settings and path.suffix != ".safetensors":
        raise ValueError(f"{path}: settings are kept in .safetensors only; leave them out, or change the name")
    rows, pair = {name: vectors.detach() for name, vectors in tokens.rows.items()}, len(widths) > 1
    if (form == "a1111" or pair) and len(rows) > 1:
        form = "SDXL" if pair else form
        raise ValueError(f"{len(rows)} words ({', '.join(rows)}), and a file of {form} holds one; write each into its own")
    if pair and path.suffix != ".safetensors":
        raise ValueError(f"{path}: an embedding for two text encoders is written as .safetensors")
    word, vectors = next(iter(rows.items()))
    if path.suffix == ".safetensors":
        metadata = FORMAT | settings_to_metadata(settings or {})
        if sd is not None:
            metadata |= describe_origin("textual-inversion", path, sd, settings)
        if pair:
            rows, metadata = dict(zip(PAIR, vectors.split(list(widths), dim=1), strict=True)), metadata | {NAME_KEY: word}
        elif form == "a1111":
            rows, metadata = {"emb_params": vectors}, metadata | {NAME_KEY: word}
        write_safetensors(path, rows, metadata)
    elif form == "diffusers":
        write_torch(path, {**rows})
    else:
        # The fields that the web interfaces look for; "*" and its id are the word that they split open in training.
        unknown = dict.fromkeys(("step", "sd_checkpoint", "sd_checkpoint_name"))
        write_torch(path, {"string_to_token": {"*": A1111_START}, "string_to_param": {"*": vectors}, "name": word, **unknown})
