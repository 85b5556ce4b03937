"""The Markdown pages: text and code are those of the lessons, output that of the run they name, figures and links are there."""

import re
from pathlib import Path

import nbformat
import pytest

from lessons import execute, rendered
from lessons.catalogue import HERE, entries, find
from lessons.pipeline_map import PARTS, drawing
from lessons.rendered import outputs_of, path_of, render, stamp_of, write_pages

LESSONS = [pytest.param(entry, id=entry.name) for entry in entries()]
LIMIT = 200_000  # bytes of a page


@pytest.mark.parametrize("entry", LESSONS)
def test_a_page_has_the_text_and_code_of_its_lesson(entry):
    page = path_of(entry).read_text()
    made_from = stamp_of(page)
    assert made_from is not None
    assert page == render(entry, outputs_of(page), made_from), "render it anew: python -m lessons pages"
    assert made_from.code == execute.stamp(entry).code, f"its output is that of other code: python -m lessons pages {entry.number}"


@pytest.mark.parametrize("entry", LESSONS)
def test_a_page_shows_every_figure_of_its_lesson_and_what_it_links_to_is_there(entry):
    page = path_of(entry).read_text()
    shown = {Path(path).stem for path in re.findall(rf"\]\(\.\./figures/({entry.number}-[^)]+)\)", page)}
    assert shown == {path.stem for path in (HERE / "figures").glob(f"{entry.number}-*.png")}
    text = re.sub(r"(?s)```.*?```", "", page)
    targets = [target for target in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in target]
    assert targets and all((path_of(entry).parent / target.split("#")[0]).exists() for target in targets), targets
    assert len(page) < LIMIT and "data:image" not in page


@pytest.mark.parametrize("entry", LESSONS)
def test_every_code_cell_that_prints_has_its_output(entry):
    page = path_of(entry).read_text()
    codes = [cell.source for cell in execute.source(entry).cells if cell.cell_type == "code"]
    outputs = outputs_of(page)
    for i, code in enumerate(codes):
        if re.search(r"^(print\(|lesson\.show\()", code, flags=re.MULTILINE):
            assert i in outputs, code
        assert outputs.get(i, "").count("![") == len(re.findall(r"\blesson\.show\(", code))


@pytest.mark.slow
def test_the_pages_were_made_with_the_models_that_ship():
    old = [entry.number for entry in entries() if not rendered.is_current(entry)]
    assert not old, "make them anew: python -m lessons pages"


@pytest.mark.parametrize("part", PARTS)
def test_the_pictures_of_the_pipeline_are_those_that_the_code_draws(part):
    assert (HERE / "figures" / f"pipeline-{part}.svg").read_text() == drawing(part), "draw them anew: python -m lessons map"


def test_a_new_text_is_rendered_around_the_old_output_and_new_code_is_run(tmp_path, monkeypatch):
    lesson = find("01")
    page = path_of(lesson).read_text()
    monkeypatch.setattr(rendered, "PAGES", tmp_path)
    monkeypatch.setattr(execute, "models_hash", lambda: stamp_of(page).models)
    path_of(lesson).write_text(page.replace("## Guess first", "## Another title"))
    ran = []
    monkeypatch.setattr(rendered, "execute", lambda chosen, *args, **options: ran.extend(chosen) or iter(()))
    assert list(write_pages([lesson], tmp_path / "build")) == [(path_of(lesson), None)]
    assert path_of(lesson).read_text() == page and ran == []
    monkeypatch.setattr(execute, "models_hash", lambda: "another")
    assert list(write_pages([lesson], tmp_path / "build")) == [] and ran == [lesson]


def test_a_path_of_the_machine_stops_the_page():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("print(1)")])
    notebook.cells[0].outputs = [nbformat.v4.new_output("stream", text=f"read {rendered.HERE / 'x.safetensors'}\n")]
    with pytest.raises(ValueError, match="a page must not show: read .*x.safetensors"):
        rendered.output_texts(notebook)


def test_outputs_become_text_and_shared_figures():
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("a"), nbformat.v4.new_code_cell("b")])
    picture = nbformat.v4.new_output("display_data", {"image/png": "x"}, metadata={"image/png": {"alt": "A lion.", "name": "01-lion.png"}})
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="one\ntwo\n"), picture]
    assert rendered.output_texts(notebook) == {0: "```text\none\ntwo\n```\n\n![A lion.](../figures/01-lion.png)\n\n*A lion.*\n"}
    assert rendered.shown(notebook) == ["lion"]


@pytest.mark.parametrize(
    "written, expected",
    [
        ("$x_0$ and $t$", "$x_0$ and $t$"),
        (r"$\sqrt{x} \; y$", r"$`\sqrt{x} \; y`$"),
        ("$$\na_t\n= b\n$$", "```math\na_t = b\n```"),
        ("`$HOME`", "`$HOME`"),
        (
            "[a](../minidiff/vae.py), [b](01_adding_noise.py), [c](https://x.org)",
            "[a](../../minidiff/vae.py), [b](01.md), [c](https://x.org)",
        ),
    ],
)
def test_equations_and_links_are_those_of_github(written, expected):
    assert rendered._markdown(written, find("01")) == expected


@pytest.mark.parametrize(
    "code, expected",
    [("import a\nfrom b import (\n    c,\n)\nlesson = start('01')", True), ("import a\n\nx = 3", False), ("sd = lesson.load()", True)],
)
def test_only_what_imports_and_loads_is_set_up(code, expected):
    assert rendered.is_set_up(code) == expected
