"""The notebooks and the web page: built from a quick run of one lesson, and looked at on a phone's width in Chromium."""

import functools
import http.server
import re
import threading

import nbformat
import pytest

from lessons.catalogue import entries, find
from lessons.pages import build_pages, with_mathml
from tests.lessons.browser import CHROMIUM, MOST_DOWNLOADS, visit

LESSON = find("01")


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    assert [path.name for path in build_pages(folder, ["01"], "--quick")] == [f"{LESSON.name}.ipynb", f"{LESSON.name}.html", "index.html"]
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
    assert sum("image/png" in output.get("data", {}) for output in outputs) == len(list((built / "figures").iterdir())) > 3
    assert {output.name for output in outputs if output.output_type == "stream"} == {"stdout"}  # no warning


def test_a_page_shows_its_output_and_fetches_nothing(built):
    for path in built.glob("*.html"):
        page = path.read_text()
        assert not re.findall(r"""(?:src|href)=["'](?:https?:)?//""", page)
        assert "<script" not in page and "\\sqrt" not in re.sub(r"(?s)<pre>.*?</pre>", "", page)
    lesson = (built / f"{LESSON.name}.html").read_text()
    assert lesson.count("<math") > 10 and LESSON.question in lesson and "q_sample: not written yet" in lesson
    assert lesson.count('alt="') == lesson.count("<img ") > 3
    index = (built / "index.html").read_text()
    assert LESSON.question in index and f"{LESSON.minutes} minutes" in index and LESSON.picture in index


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("name", ["index", LESSON.name])
def test_a_phone_shows_the_page_without_an_error(name, dark, address, tmp_path):
    check_seen(visit(f"{address}/{name}.html", tmp_path, dark=dark), [f"{LESSON.name}.ipynb"], dark)


def check_seen(seen, notebooks, dark):
    assert seen.errors == seen.missing == seen.outside == []
    assert seen.width <= 375  # nothing has to be moved sideways
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
    assert not (tmp_path / "index.html").exists()
