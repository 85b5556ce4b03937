"""Lessons as Markdown with their output, committed so that they can be read where the repository is looked at.

    NN_name.py: text and code ----------------+
    a run of it: printed output, figures -----+--> pages/NN.md     figures are those of figures/, shared and not copied

A page names the state of code and models that its output was made from. While that still holds, a new text is rendered around the old output
without running anything.
"""

import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path

from nbformat import NotebookNode

from lessons.catalogue import HERE, Entry, entries
from lessons.execute import Stamp, execute, executed, source, stamp

PAGES = HERE / "pages"
OUTPUT = re.compile(r"<!-- output (\d+) -->\n(.*?)<!-- end of output -->\n", flags=re.DOTALL)
STAMP = re.compile(r"<!-- Made by `python -m lessons pages`; output of code (\w+), models (\w+)\. -->")
LINK = re.compile(r"(?<=\]\()(?P<target>[^)\s]+)(?=\))")
CODE_OR_MATH = re.compile(r"(?P<code>```.*?```|`[^`\n]*`)|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+?)\$", flags=re.DOTALL)
PLAIN_MATH = re.compile(r"(?:[A-Za-z0-9=+/(). -]|\\[a-z]+\b|_[A-Za-z0-9])+")  # in which Markdown finds nothing of its own


def path_of(entry: Entry) -> Path:
    """Return where a lesson's page is."""
    return PAGES / f"{entry.number}.md"


def is_current(entry: Entry) -> bool:
    """Return whether the output on a lesson's page is that of its present code and of the present models."""
    path = path_of(entry)
    return path.is_file() and stamp_of(path.read_text()) == stamp(entry)


def write_pages(chosen: Sequence[Entry], build: Path, *, again: bool = False, jobs: int = 1) -> Iterator[tuple[Path, float | None]]:
    """Write the pages of the lessons; yield each with the seconds that its run took, None where no run was needed.

    Args:
        chosen: the lessons
        build: folder of executed notebooks, as `python -m lessons build` leaves it; what it lacks is run into it
        again: run even the lessons whose output still holds
        jobs: lessons that run side by side

    The figures of a lesson that was run replace those in figures/.
    """
    current = [entry for entry in chosen if is_current(entry) and not again]
    for entry in current:
        text = path_of(entry).read_text()
        yield write(entry, outputs_of(text), stamp(entry)), None
    for entry, seconds in execute([entry for entry in chosen if entry not in current], build, again=again, jobs=jobs):
        notebook = executed(entry, build)
        for old in (HERE / "figures").glob(f"{entry.number}-*.png"):
            old.unlink()
        for figure in (build / "figures").glob(f"{entry.number}-*.png"):
            if figure.stem[3:] in shown(notebook):
                shutil.copyfile(figure, HERE / "figures" / figure.name)
        yield write(entry, output_texts(notebook), stamp(entry)), seconds


def write(entry: Entry, outputs: Mapping[int, str], made_from: Stamp) -> Path:
    """Write a lesson's page; return its path."""
    PAGES.mkdir(exist_ok=True)
    path_of(entry).write_text(render(entry, outputs, made_from))
    return path_of(entry)


def render(entry: Entry, outputs: Mapping[int, str], made_from: Stamp) -> str:
    """Return a lesson's page. outputs: Markdown of what each cell printed and showed, by the number of the code cell."""
    parts = [f"<!-- Made by `python -m lessons pages`; output of code {made_from.code}, models {made_from.models}. -->\n"]
    numbers = count()
    for cell in source(entry).cells:
        if cell.cell_type == "markdown":
            parts.append(_markdown(cell.source, entry) + "\n")
            continue
        i, code = next(numbers), f"```python\n{cell.source}\n```\n"
        parts.append(f"<details><summary>Set-up</summary>\n\n{code}\n</details>\n" if is_set_up(cell.source) else code)
        if outputs.get(i):
            parts.append(f"<!-- output {i} -->\n{outputs[i]}<!-- end of output -->\n")
    return "\n".join([*parts, f"---\n\n{_around(entry)}\n"])


def is_set_up(code: str) -> bool:
    """Return whether a cell only imports, starts the lesson and loads: what a reader may skip."""
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith((" ", ")"))]
    return all(re.match(r"import |from |lesson = start\(|sd(, tuned)? = lesson\.load\(|#", line) for line in lines)


def output_texts(notebook: NotebookNode) -> dict[int, str]:
    """Return the outputs of an executed notebook as Markdown, by the number of their code cell.

    Raises ValueError for a path of this machine among what was printed.
    """
    found = {}
    for i, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        blocks = [_output(output) for output in cell.get("outputs", ())]
        if any(blocks):
            found[i] = "\n".join(block for block in blocks if block)
    return found


def outputs_of(page: str) -> dict[int, str]:
    """Return the outputs that a page shows, by the number of their code cell."""
    return {int(number): text for number, text in OUTPUT.findall(page)}


def stamp_of(page: str) -> Stamp | None:
    """Return what a page's output was made from, or None for a file that is no page."""
    found = STAMP.match(page)
    return Stamp(*found.groups()) if found else None


def shown(notebook: NotebookNode) -> list[str]:
    """Return the names of the figures that an executed notebook shows, without number and ending."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    return [output.metadata["image/png"]["name"][3:-4] for output in outputs if "image/png" in output.get("data", {})]


def _output(output: NotebookNode) -> str:
    if output.output_type == "stream":
        if str(HERE.parent) in output.text:
            raise ValueError(f"a lesson printed a path of this machine, which a page must not show: {output.text.strip()}")
        return f"```text\n{output.text.rstrip()}\n```\n"
    described = output.metadata["image/png"]
    return f"![{described['alt']}](../figures/{described['name']})\n\n*{described['alt']}*\n"


def _markdown(text: str, entry: Entry) -> str:
    """Return a cell's text with links and equations as GitHub reads them; the head names the script where it named a picture for the map."""
    text = CODE_OR_MATH.sub(_equation, LINK.sub(lambda link: _target(link["target"]), text))
    return re.sub(r"(\n- Minutes: \d+)\n- Picture: .+", rf"\1\n- Run it: [lessons/{entry.name}.py](../{entry.name}.py)", text)


def _equation(found: re.Match) -> str:
    if found["code"]:
        return found["code"]
    if found["block"]:
        return f"```math\n{' '.join(found['block'].split())}\n```"
    return f"${found['inline']}$" if PLAIN_MATH.fullmatch(found["inline"]) else f"$`{found['inline']}`$"


def _target(target: str) -> str:
    if "://" in target:
        return target
    lesson = re.fullmatch(r"(\d\d)_\w+\.py", target)
    return f"{lesson[1]}.md" if lesson else f"../{target}"


def _around(entry: Entry) -> str:
    every = entries()
    i = every.index(entry)
    links = [f"← [{every[i - 1].number} {every[i - 1].title}]({every[i - 1].number}.md)"] if i else []
    links.append("[All lessons](../README.md)")
    links += [f"[{every[i + 1].number} {every[i + 1].title}]({every[i + 1].number}.md) →"] if i + 1 < len(every) else []
    return " · ".join(links)
