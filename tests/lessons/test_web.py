"""The notebooks and the web page: built from a quick run of one lesson, and looked at in Chromium, as wide as a phone and as a desk's screen."""

import functools
import http.server
import re
import threading

import nbformat
import pytest

from lessons import execute
from lessons.catalogue import entries, find
from lessons.web import build_pages, with_captions, with_contents, with_mathml
from tests.browser import CHROMIUM, MOST_DOWNLOADS, visit

LESSON = find("01")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    made = list(build_pages(folder, ["01"], "--quick"))
    assert [path.name for path, _ in made] == ["index.html", f"{LESSON.name}.html"] and made[1][1] > 0
    return folder


@pytest.fixture(scope="module")
def address(built):
    yield from served(built)


def served(folder):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_a_notebook_has_every_cell_of_the_lesson_with_its_output(built):
    notebook = nbformat.read(built / f"{LESSON.name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    codes = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in codes)
    outputs = [output for cell in codes for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == len(list((built / "figures").glob("01-*.png"))) > 3
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}  # no warning


def test_a_page_shows_its_output_and_fetches_nothing(built):
    for path in built.glob("*.html"):
        page = path.read_text()
        assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", page)
        assert re.findall(r"<script.*?>", page) == (['<script src="page.js">'] if path.stem != "index" else [])
        assert "\\sqrt" not in re.sub(r"(?s)<pre>.*?</pre>", "", page)
    lesson = (built / f"{LESSON.name}.html").read_text()
    assert lesson.count("<math") > 10 and LESSON.question in lesson and "q_sample: not written yet" in lesson
    assert lesson.count('alt="') == lesson.count("<img ") > 3
    assert lesson.count("<figcaption>") == lesson.count("<img ") - 1  # all but the pipeline at the head
    index = (built / "index.html").read_text()
    assert LESSON.question in index and f"{LESSON.minutes} minutes" in index and LESSON.picture in index


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["index", LESSON.name])
@pytest.mark.parametrize("width", [375, 1280])
def test_phone_and_desk_show_the_page_without_an_error(name, dark, width, address, tmp_path):
    check_seen(visit(f"{address}/{name}.html", tmp_path, width=width, dark=dark), [f"{LESSON.name}.ipynb"], dark, width)


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
def test_long_lines_of_code_scroll_and_each_cell_has_a_button_to_copy(address, tmp_path):
    asked = {
        "wraps": "[...document.querySelectorAll('.input_area pre')].some(pre => getComputedStyle(pre).whiteSpace !== 'pre')",
        "scrolls": "[...document.querySelectorAll('.input_area pre')].some(pre => pre.scrollWidth > pre.clientWidth)",
        "cells": "document.querySelectorAll('.input_area .highlight').length",
        "buttons": "document.querySelectorAll('.input_area .highlight > button.copy').length",
        "dead": "[...document.querySelectorAll('a[href^=\"#\"]')].filter(a => !document.getElementById(a.hash.slice(1))).length",
        "sections": "document.querySelectorAll('.contents a').length",
        "copied": "(document.querySelector('button.copy').click(), getSelection().toString() || 'clipboard')",
    }
    seen = visit(f"{address}/{LESSON.name}.html", tmp_path, asked=asked).answers
    assert not seen["wraps"] and seen["scrolls"] and seen["buttons"] == seen["cells"] > 5
    assert seen["dead"] == 0 and seen["sections"] > 8 and seen["copied"]


def check_seen(seen, notebooks, dark, width=375):
    assert seen.errors == seen.missing == seen.outside == []
    assert seen.width <= width  # nothing has to be moved sideways
    assert seen.downloads == notebooks
    assert seen.shown["images"] and (seen.shown["background"] < 100) == dark


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
def test_what_is_wrong_with_a_page_is_seen(tmp_path):
    (tmp_path / "page").mkdir()
    broken = "<img src=gone.png><p style='width: 900px'>x</p><script>no_such_thing()</script>"
    (tmp_path / "page" / "index.html").write_text(f"<meta name=viewport content='width=device-width'>{broken}")
    for address in served(tmp_path / "page"):
        seen = visit(f"{address}/index.html", tmp_path / "visit")
    assert seen.width > 375 and seen.missing == [f"{address}/gone.png"]
    assert any("no_such_thing" in error for error in seen.errors) and any("404" in error for error in seen.errors)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
def test_all_lessons_are_built_and_shown(tmp_path):
    list(build_pages(tmp_path / "page"))
    for address in served(tmp_path / "page"):
        for entry in entries():
            check_seen(visit(f"{address}/{entry.name}.html", tmp_path / entry.name), [f"{entry.name}.ipynb"], dark=False)
        notebooks = [f"{entry.name}.ipynb" for entry in entries()]
        check_seen(visit(f"{address}/index.html", tmp_path / "index"), notebooks[:MOST_DOWNLOADS], dark=False)


def test_equations_become_mathml_and_code_stays_as_it_is():
    made = with_mathml("a $x_0 * y_t$ and `$HOME` and\n\n$$\n\\sqrt{2}\n$$\n\n```bash\necho $A $B\n```\n")
    assert made.count("<math") == 2 and "<msqrt>" in made and '<div class="equation">' in made
    assert "`$HOME`" in made and "echo $A $B" in made
    assert "*" not in re.sub(r"(?s)```.*?```", "", made)  # Markdown would make it bold


def test_a_lesson_that_fails_ends_the_build(tmp_path):
    with pytest.raises(Exception, match="no_such_model"):
        list(build_pages(tmp_path, ["01"], "--model no_such_model"))
    assert not (tmp_path / f"{LESSON.name}.html").exists() and not (tmp_path / f"{LESSON.name}.ipynb").exists()


def test_a_lesson_that_still_holds_is_not_run_again(built, monkeypatch):
    def run(*args):
        raise AssertionError("it was run again")

    monkeypatch.setattr(execute, "_run", run)
    assert [seconds for _, seconds in build_pages(built, ["01"], "--quick")] == [None, None]
    with pytest.raises(AssertionError, match="run again"):
        list(build_pages(built, ["01"], "--quick", again=True))
    monkeypatch.setattr(execute, "models_hash", lambda: "another model")
    with pytest.raises(AssertionError, match="run again"):
        list(build_pages(built, ["01"], "--quick"))


def test_sections_get_anchors_and_contents_and_pictures_captions():
    html, contents = with_contents("<h2>Your turn: <code>q_sample</code></h2><p>text</p><h2 id='x'>Read next</h2>")
    assert contents == [("your-turn-q-sample", "Your turn: q_sample"), ("read-next", "Read next")]
    assert '<h2 id="your-turn-q-sample">Your turn: <code>q_sample</code> <a class="anchor" href="#your-turn-q-sample"' in html
    shown = with_captions('<img alt="a lion" src="data:image/png;base64,x"/><img alt="a map" src="figures/pipeline-all.svg"/>')
    assert shown.count("<figure>") == 1 and "<figcaption>a lion</figcaption>" in shown
