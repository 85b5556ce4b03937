"""A lesson's text beside what its code prints: every number in the text must be printed, in the same run and the same section.

A number counts as printed if one that was printed, rounded to as many decimals, is the same. What is no claim of the lesson is left out: code, equations,
links, years, what stands after "eq.", "section", "lesson" and the like, names such as "Stable Diffusion 1.x", the items' own numbers,
the facts of the first cell, and the section "On a GPU", which this machine need not have. A section without code may name any number of the run.
"""

import contextlib
import io
import re
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import jupytext

# Lessons of the new anatomy: two or three blanks, nothing before the first idea
SETTLED = ("01", "02", "03", "04", "05", "06", "07", "08", "09", "10", "11", "12", "13", "14")
# Lessons that end with what one knows now, the guess, a quiz and a task of one's own
CLOSED = ("00", "01", "02", "03", "04", "05", "06", "07", "08", "09", "10", "11", "12", "13", "14")

NUMBER = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?(?![\w]|\.\d)")
NO_CLAIM = re.compile(
    r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$\n]+\$|\]\([^)]*\)|^- Minutes: .*|^# \d\d |^\d+\. "
    r"|\b(?:19|20)\d\d\b"
    r"|\b(?:eqs?\.|equations?|sections?|figures?|tables?|algorithms?|appendix|lessons?|SD|Stable Diffusion) \d[\d.x]*(?:(?:,| and| to) \d[\d.x]*)*",
    flags=re.DOTALL | re.MULTILINE | re.IGNORECASE,
)


@dataclass
class Section:
    """From one heading to the next: the texts of its Markdown cells, its code cells, and what these printed."""

    title: str
    texts: list[str] = field(default_factory=list)
    codes: list[str] = field(default_factory=list)
    printed: str = ""


def sections(path: Path) -> list[Section]:
    """The lesson's sections, the part before the first heading among them; nothing is run."""
    found = []
    for cell in jupytext.read(path, fmt="py:percent").cells:
        if cell.cell_type != "markdown":
            found[-1].codes.append(cell.source)
            continue
        for heading, text in re.findall(r"^(## .+\n)?((?:(?!## ).*\n?)*)", cell.source, flags=re.MULTILINE):
            if heading or not found:
                found.append(Section(heading.strip("# \n")))
            found[-1].texts.append(text)
    return found


def run(path: Path) -> list[Section]:
    """The same with what each printed: cell by cell in one namespace, as in a notebook."""
    namespace, found = {"__name__": "__main__"}, sections(path)
    for section in found:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            for code in section.codes:
                exec(compile(code, str(path), "exec"), namespace)
        section.printed = out.getvalue()
    return found


def unprinted(found: list[Section]) -> list[str]:
    """The numbers of the text that nothing printed, each with its section's title."""
    everything = "\n".join(section.printed for section in found)
    return [
        f"{section.title or 'first cell'}: {number}"
        for section in found
        if section.title != "On a GPU"
        for text in section.texts
        for number in NUMBER.findall(NO_CLAIM.sub(" ", text))
        if not _is_among(number, section.printed if section.codes else everything)
    ]


def _is_among(number: str, printed: str) -> bool:
    number = number.replace(",", "")
    decimals = Decimal(number).as_tuple().exponent
    return any(_rounded(other.replace(",", ""), decimals) == Decimal(number) for other in NUMBER.findall(printed))


def _rounded(number: str, decimals: int) -> Decimal:
    return round(Decimal(number), -decimals) if decimals < 0 else Decimal(round(Decimal(number)))
