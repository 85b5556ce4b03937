"""Notebooks and a web page of the lessons, both with the output of a run.

    NN_name.py --execute.py--> NN_name.ipynb --nbconvert--> NN_name.html     equations as MathML, figures with captions, contents
                                                            index.html, style.css, page.js, figures/

The page fetches nothing from outside; its folder can be opened from the disk or put on any server. Without JavaScript only the buttons that
copy a cell are missing.
"""

import copy
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from shutil import copyfile

import jinja2
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

from lessons.catalogue import HERE, PATHS, Entry, entries, find
from lessons.execute import execute, executed
from lessons.rendered import CODE_OR_MATH, is_set_up

LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<target>[^)]+)\)")
HEADING = re.compile(r"<h2[^>]*>(?P<inner>.*?)</h2>", flags=re.DOTALL)
FIGURE = re.compile(r'<img\s+alt="(?P<alt>[^"]*)"(?P<rest>[^>]*)>|<img(?P<before>[^>]*?)\s+alt="(?P<other>[^"]*)"(?P<after>[^>]*)>')
CELL = re.compile(r'(?=<div class="cell border-box-sizing)')


def build_pages(
    out: Path, numbers: Sequence[str] = (), options: str = "", *, again: bool = False, jobs: int = 1
) -> Iterator[tuple[Path, float | None]]:
    """Build the lessons into a folder, its index first; yield each page with the seconds its run took, None where none was needed.

    Args:
        out: the folder; a lesson whose notebook there still holds is not run again
        numbers: of the lessons; all by default
        options: as on a lesson's command line
        again: run every lesson
        jobs: lessons that run side by side

    Raises ValueError for a number that there is not, nbclient's CellExecutionError for a lesson that fails.
    """
    chosen = [find(number) for number in numbers] or entries()
    (out / "figures").mkdir(parents=True, exist_ok=True)
    (out / "style.css").write_text((HERE / "page" / "style.css").read_text() + _code_colours())
    copyfile(HERE / "page" / "page.js", out / "page.js")
    for picture in [*(HERE / "figures").glob("pipeline-*.svg"), *(HERE / entry.picture for entry in chosen)]:
        if not (out / "figures" / picture.name).exists():
            copyfile(picture, out / "figures" / picture.name)  # until the lesson's own run makes it
    known = {entry.number: entry for entry in chosen}
    paths = {name: [known[number] for number in numbers if number in known] for name, numbers in PATHS.items()}
    (out / "index.html").write_text(_template("index.html.j2").render(entries=chosen, paths=paths))
    yield out / "index.html", None
    for entry, seconds in execute(chosen, out, options, again=again, jobs=jobs):
        i = chosen.index(entry)
        around = {"before": chosen[i - 1] if i else None, "after": chosen[i + 1] if i + 1 < len(chosen) else None}
        html, contents = with_contents(body(executed(entry, out), chosen))
        (out / f"{entry.name}.html").write_text(_template("lesson.html.j2").render(entry=entry, body=html, contents=contents, **around))
        yield out / f"{entry.name}.html", seconds


def body(notebook: NotebookNode, chosen: Sequence[Entry]) -> str:
    """Return the notebook as HTML for the inside of a page, its links leading to the pages of the chosen lessons."""
    notebook = copy.deepcopy(notebook)
    notebook.cells[0].source = re.sub(r"\n- Picture: .+", "", notebook.cells[0].source)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_mathml(LINK.sub(lambda link: _link(link, {entry.name for entry in chosen}), cell.source))
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True, exclude_anchor_links=True)
    cells = CELL.split(exporter.from_notebook_node(notebook)[0])[1:]
    assert len(cells) == len(notebook.cells)
    folded = '<details class="set-up"><summary>Set-up</summary>{}</details>'
    set_up = (cell.cell_type == "code" and is_set_up(cell.source) for cell in notebook.cells)
    return with_captions("".join(folded.format(html) if fold else html for html, fold in zip(cells, set_up)))


def with_captions(html: str) -> str:
    """Return the HTML with every picture of a cell in a figure, its description below it as a caption."""

    def replace(found: re.Match) -> str:
        alt = found["alt"] if found["alt"] is not None else found["other"]
        return f"<figure>{found[0]}<figcaption>{alt}</figcaption></figure>" if "data:image/png" in found[0] else found[0]

    return FIGURE.sub(replace, html)


def with_contents(html: str) -> tuple[str, list[tuple[str, str]]]:
    """Return the HTML with an anchor at each section, and the contents: anchors and titles."""
    contents = []

    def replace(found: re.Match) -> str:
        title = re.sub(r"<[^>]+>", "", found["inner"]).strip()
        anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")
        contents.append((anchor, title))
        return f'<h2 id="{anchor}">{found["inner"]} <a class="anchor" href="#{anchor}" aria-label="Link to {escape(title)}">#</a></h2>'

    return HEADING.sub(replace, html), contents


def with_mathml(markdown: str) -> str:
    """Return the text with $x$ and $$x$$ outside code as MathML, which browsers draw without help."""

    def replace(found: re.Match) -> str:
        if found["code"]:
            return found["code"]
        mathml = convert(found["inline"] or " ".join(found["block"].split()), display="inline" if found["inline"] else "block")
        mathml = mathml.replace("*", "&#42;").replace("_", "&#95;")  # which Markdown would take for its own
        return mathml if found["inline"] else f'<div class="equation">{mathml}</div>'

    return CODE_OR_MATH.sub(replace, markdown)


def _link(link: re.Match, names: set[str]) -> str:
    """Lessons become their pages; files of the repository are not on the page, so only their names stay."""
    target = Path(link["target"])
    if target.suffix == ".py" and target.stem in names:
        return f"[{link['text']}]({target.stem}.html)"
    return link[0] if target.parts[0] == "figures" or "://" in link["target"] else f"`{link['text'].strip('`')}`"


def _template(name: str) -> jinja2.Template:
    return jinja2.Environment(loader=jinja2.FileSystemLoader(HERE / "page"), autoescape=True).get_template(name)


def _code_colours() -> str:
    light, dark = (HtmlFormatter(style=style).get_style_defs(".highlight") for style in ("xcode", "github-dark"))
    return f"\n{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"
