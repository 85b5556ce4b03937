"""The captions of a folder of pictures, in one of the three ways that other programs write them.

NAME.txt beside each picture, metadata.jsonl ({"file_name": ..., "text": ...} per line), or captions.json ({file name: caption})
"""

import json
from collections.abc import Sequence
from pathlib import Path

CAPTION_SOURCES = ("NAME.txt", "metadata.jsonl", "captions.json")


def caption_texts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.txt") if not path.name.startswith("."))


def caption_sources(folder: Path) -> list[str]:
    """Which of CAPTION_SOURCES the folder has."""
    return [name for name in CAPTION_SOURCES if (caption_texts(folder) if name == "NAME.txt" else (folder / name).is_file())]


def read_captions(folder: Path, paths: Sequence[Path]) -> dict[str, str]:
    """{file name: caption} for every picture. Raises ValueError for a picture without caption and a caption without picture."""
    found = caption_sources(folder)
    if not found:
        raise ValueError(f"{folder}: no captions; give one for all pictures, or write {', '.join(CAPTION_SOURCES)}")
    if len(found) > 1:
        raise ValueError(f"{folder}: captions in {' and in '.join(found)}; keep one of them")
    if found == ["NAME.txt"]:
        captions = captions_beside(paths, caption_texts(folder))
    elif found == ["metadata.jsonl"]:
        captions = captions_of_lines(folder / "metadata.jsonl")
    else:
        captions = captions_of_object(folder / "captions.json")
    names = {path.name for path in paths}
    if strangers := [name for name in captions if name not in names]:
        raise ValueError(f"{folder / found[0]}: a caption for {strangers[0]!r}, which is no picture of the folder")
    if missing := [path for path in paths if path.name not in captions]:
        raise ValueError(f"{missing[0]}: no caption in {found[0]}; {len(missing)} of {len(paths)} pictures have none")
    return captions


def captions_beside(paths: Sequence[Path], texts: Sequence[Path]) -> dict[str, str]:
    captions = {}
    for text in texts:
        owners = [path.name for path in paths if path.stem == text.stem]
        if not owners:
            raise ValueError(f"{text}: a caption without its picture; expected {text.stem}.png, or another ending of pictures, beside it")
        captions |= dict.fromkeys(owners, read_text(text))
    return captions


def captions_of_lines(path: Path) -> dict[str, str]:
    captions = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        row = parsed(line, f"{path}, line {number}")
        name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(f'{path}, line {number}: expected {{"file_name": "...", "text": "..."}}')
        captions[name] = text
    return captions


def captions_of_object(path: Path) -> dict[str, str]:
    captions = parsed(read_text(path), str(path))
    if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
        raise ValueError(f'{path}: expected one object {{"file name": "caption", ...}}')
    return captions


def parsed(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: no JSON ({error})") from error


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # some editors put a mark in front
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from error
