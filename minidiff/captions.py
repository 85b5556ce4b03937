"""The captions of a folder of pictures, in one of the three ways that other programs write them.

NAME.txt beside each picture, metadata.jsonl ({"file_name": ..., "text": ...} per line), or captions.json ({file name: caption})
"""

from collections.abc import Sequence
from pathlib import Path

from minidiff.files import parse_json, read_text

CAPTION_SOURCES = ("NAME.txt", "metadata.jsonl", "captions.json")


def find_text_files(folder: Path) -> list[Path]:
    """Return the .txt files of a folder, sorted by name."""
    return sorted(path for path in folder.glob("*.txt") if not path.name.startswith("."))


def find_caption_sources(folder: Path) -> list[str]:
    """Return those of CAPTION_SOURCES that the folder has."""
    return [name for name in CAPTION_SOURCES if (find_text_files(folder) if name == "NAME.txt" else (folder / name).is_file())]


def read_captions(folder: Path, paths: Sequence[Path]) -> dict[str, str]:
    """Return {file name: caption} for every picture. Raises ValueError for a picture without a caption or a caption without a picture."""
    found = find_caption_sources(folder)
    if not found:
        raise ValueError(f"{folder}: no captions; give one for all pictures, or write {', '.join(CAPTION_SOURCES)}")
    if len(found) > 1:
        raise ValueError(f"{folder}: captions in {' and in '.join(found)}; keep one of them")
    readers = {"metadata.jsonl": read_jsonl_captions, "captions.json": read_json_captions}
    captions = readers[found[0]](folder / found[0]) if found[0] in readers else read_text_captions(paths, find_text_files(folder))
    names = {path.name for path in paths}
    if strangers := [name for name in captions if name not in names]:
        raise ValueError(f"{folder / found[0]}: a caption for {strangers[0]!r}, which is no picture of the folder")
    if missing := [path for path in paths if path.name not in captions]:
        raise ValueError(f"{missing[0]}: no caption in {found[0]}; {len(missing)} of {len(paths)} pictures have none")
    return captions


def check_caption(path: Path, caption: str) -> None:
    """Raise ValueError for a caption that says nothing."""
    if not caption.strip():
        raise ValueError(f"{path}: its caption is empty; write what the picture shows")


def read_text_captions(paths: Sequence[Path], texts: Sequence[Path]) -> dict[str, str]:
    """Read NAME.txt beside each picture."""
    captions = {}
    for text in texts:
        owners = [path.name for path in paths if path.stem == text.stem]
        if not owners:
            raise ValueError(f"{text}: a caption without its picture; expected {text.stem}.png, or another ending of pictures, beside it")
        captions |= dict.fromkeys(owners, read_text(text))
    return captions


def read_jsonl_captions(path: Path) -> dict[str, str]:
    """Read metadata.jsonl, one {"file_name": ..., "text": ...} per line."""
    captions = {}
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        row = parse_json(line, f"{path}, line {number}")
        name, text = (row.get("file_name"), row.get("text")) if isinstance(row, dict) else (None, None)
        if not isinstance(name, str) or not isinstance(text, str):
            raise ValueError(f'{path}, line {number}: expected {{"file_name": "...", "text": "..."}}')
        captions[name] = text
    return captions


def read_json_captions(path: Path) -> dict[str, str]:
    """Read captions.json, one {file name: caption}."""
    captions = parse_json(read_text(path), str(path))
    if not isinstance(captions, dict) or not all(isinstance(text, str) for text in captions.values()):
        raise ValueError(f'{path}: expected one object {{"file name": "caption", ...}}')
    return captions
