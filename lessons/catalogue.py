"""The lessons as a list, read from their first cells; README.md's table and paths are made from it.

A first cell begins so:

    # 01 Adding noise
    **The question in one sentence?**
    - Explains: [minidiff/schedule.py](../minidiff/schedule.py)
    - You change: ...
    - Minutes: 20
    - Picture: [figures/01-ladder.png](figures/01-ladder.png)
"""

import re
from dataclasses import dataclass
from pathlib import Path

import jupytext

HERE = Path(__file__).parent
PATHS = {
    "I want to understand": ("00", "01", "02", "03", "04", "05", "06", "07", "08", "09", "10", "11", "12", "13", "20"),
    "I want to personalise": ("00", "01", "02", "04", "09", "10", "14", "15", "16", "17"),
}
HEAD = re.compile(
    r"# (?P<number>\d\d) (?P<title>.+)\n\n\*\*(?P<question>.+?)\*\*\n\n- Explains: (?P<explains>.+)\n- You change: (?P<change>.+)\n"
    r"- Minutes: (?P<minutes>\d+)\n- Picture: \[(?P<picture>figures/.+\.png)\]\((?P=picture)\)",
    flags=re.DOTALL,
)


@dataclass(frozen=True)
class Entry:
    """A lesson. name: of its file, without .py. minutes: to work through it. picture: the most telling one, under lessons/."""

    name: str
    number: str
    title: str
    question: str
    explains: str
    change: str
    minutes: int
    picture: str

    @property
    def path(self) -> Path:
        return HERE / f"{self.name}.py"


def entries() -> list[Entry]:
    """All lessons in order. Raises ValueError for a first cell of another form."""
    return [_entry(path) for path in sorted(HERE.glob("[0-9][0-9]_*.py"))]


def find(number: str) -> Entry:
    """The lesson of a number, "04" or "4". Raises ValueError where there is none."""
    for entry in entries():
        if entry.number == number.zfill(2):
            return entry
    raise ValueError(f"lesson {number!r} unknown; choose {', '.join(entry.number for entry in entries())}")


def readme(text: str) -> str:
    """The text of README.md with its table and paths made anew, between their marks."""
    rows = [
        f"| [{e.number} {e.title}](pages/{e.number}.md) ([script]({e.name}.py)) | {e.explains} | {e.minutes} | {e.change} "
        f'| <img src="{e.picture}" width="240" alt=""> |'
        for e in entries()
    ]
    table = "\n".join(["| lesson | explains | minutes | you change | |", "|---|---|---|---|---|", *rows])
    return _between(_between(text, "map", table), "paths", "\n\n".join(f"**{name}:** {_links(numbers)}" for name, numbers in PATHS.items()))


def _links(numbers: tuple[str, ...]) -> str:
    known = {entry.number: entry for entry in entries()}
    return " → ".join(f"[{known[n].number} {known[n].title}](pages/{n}.md)" for n in numbers if n in known)


def _between(text: str, mark: str, content: str) -> str:
    before, rest = text.split(f"<!-- {mark} -->\n")
    return f"{before}<!-- {mark} -->\n{content}\n<!-- end of {mark} -->{rest.split(f'<!-- end of {mark} -->')[1]}"


def _entry(path: Path) -> Entry:
    head = HEAD.match(jupytext.read(path, fmt="py:percent").cells[0].source)
    if head is None:
        raise ValueError(
            f"{path.name}: its first cell must have title, question, Explains, You change, Minutes and Picture; see catalogue.py"
        )
    fields = {name: " ".join(value.split()) for name, value in head.groupdict().items()}
    if fields["number"] != path.stem[:2]:
        raise ValueError(f"{path.name}: its title says lesson {fields['number']}")
    return Entry(name=path.stem, **fields | {"minutes": int(fields["minutes"])})
