"""Notebooks and a web page of the lessons: each is run, and its output goes into both.

    NN_name.py --jupytext--> notebook --nbclient--> with its output --> NN_name.ipynb
                                                                    --nbconvert--> NN_name.html     equations as MathML
                                                                                   index.html, style.css, figures/

The page needs no JavaScript and fetches nothing from outside; its folder can be opened from the disk or put on any server.
"""

import copy
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import jinja2
import jupytext
import nbformat
from latex2mathml.converter import convert
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter

from lessons.catalogue import HERE, PATHS, Entry, entries, find

CODE_OR_MATH = re.compile(r"(?P<code>```.*?```|`[^`\n]*`)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+?)\$", flags=re.DOTALL)
LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<target>[^)]+)\)")
SECONDS = 1800  # a cell may take


def build_pages(out: Path, numbers: Sequence[str] = (), options: str = "") -> Iterator[Path]:
    """Builds the lessons of these numbers, or all, into the folder; yields each file when it stands. options: as on a lesson's command line.

    Raises ValueError for a number that there is not, nbclient's CellExecutionError for a lesson that fails.
    """
    chosen = [find(number) for number in numbers] or entries()
    out.mkdir(parents=True, exist_ok=True)
    (out / "style.css").write_text((HERE / "page" / "style.css").read_text() + _code_colours())
    for i, entry in enumerate(chosen):
        notebook = run(entry, out / "figures", options)
        nbformat.write(notebook, out / f"{entry.name}.ipynb")
        yield out / f"{entry.name}.ipynb"
        around = {"before": chosen[i - 1] if i else None, "after": chosen[i + 1] if i + 1 < len(chosen) else None}
        page = _template("lesson.html.j2").render(entry=entry, body=body(notebook, chosen), **around)
        (out / f"{entry.name}.html").write_text(page)
        yield out / f"{entry.name}.html"
    known = {entry.number: entry for entry in chosen}
    paths = {name: [known[number] for number in numbers if number in known] for name, numbers in PATHS.items()}
    (out / "index.html").write_text(_template("index.html.j2").render(entries=chosen, paths=paths))
    yield out / "index.html"


def run(entry: Entry, figures: Path, options: str = "") -> NotebookNode:
    """The lesson as a notebook with its output; its pictures are written into `figures` too."""
    notebook = jupytext.read(entry.path, fmt="py:percent")
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
    environment = os.environ | {
        "LESSON_OPTIONS": f"{options} --figures '{figures.resolve()}'",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]),
    }
    quiet = ["--log-level=ERROR"]  # a warning that whoever shares the machine could listen
    folder = {"metadata": {"path": str(HERE)}}
    client = NotebookClient(notebook, timeout=SECONDS, resources=folder, extra_arguments=quiet, coalesce_streams=True)
    client.execute(env=environment)
    return notebook


def body(notebook: NotebookNode, chosen: Sequence[Entry]) -> str:
    """The notebook as HTML for the inside of a page, its links leading to the pages of the chosen lessons."""
    notebook = copy.deepcopy(notebook)
    notebook.cells[0].source = re.sub(r"\n- Picture: .+", "", notebook.cells[0].source)
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_mathml(LINK.sub(lambda link: _link(link, {entry.name for entry in chosen}), cell.source))
    exporter = HTMLExporter(template_name="basic", exclude_input_prompt=True, exclude_output_prompt=True, exclude_anchor_links=True)
    return exporter.from_notebook_node(notebook)[0]


def with_mathml(markdown: str) -> str:
    """$x$ and $$x$$ outside code as MathML, which browsers draw without help."""

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
