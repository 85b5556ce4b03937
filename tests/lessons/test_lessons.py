"""Every lesson: its parts, that it runs, that its text says what its code prints, its pictures; the map of them all."""

import ast
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import weights_loader
from lessons import catalogue
from lessons.catalogue import HERE, entries
from lessons.common import LARGEST
from lessons.exercises import exercises
from lessons.pipeline_map import title
from lessons.rendered import is_set_up
from tests.checkpoints import family_model
from tests.lessons.text import CLOSED, SETTLED, Section, run, sections, unprinted

LESSONS = [pytest.param(entry, id=entry.name) for entry in entries()]
HEADINGS = ("Guess first", "Your turn", "Break it", "On real Stable Diffusion", "On a GPU", "Read next")
ENDING = ("What you now know", "Your guess", "Quiz", "Now you", "Read next")  # of a lesson of the new anatomy, in this order
SECONDS, QUICK_SECONDS = 60, 15  # of one core's work, whatever else the machine does; on two cores it is less
LONG = ("15", "16", "17")  # train for longer: twice the time


def words_of(source: str, name: str) -> list[list[ast.expr]]:
    """The arguments of each call of the method `lesson.name` in a cell."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return [call.args for call in calls if call.func.attr == name and ast.unparse(call.func.value) == "lesson"]


@pytest.mark.parametrize("entry", LESSONS)
def test_a_lesson_has_all_its_parts_in_order(entry):
    titles = [section.title for section in sections(entry.path)]
    at = [next((i for i, title in enumerate(titles) if title.startswith(heading)), None) for heading in HEADINGS]
    assert None not in at, f"no section {HEADINGS[at.index(None)]!r}"
    assert at[0] == 1 and at[-3:] == sorted(at[-3:]) and at[-1] == len(titles) - 1
    assert entry.number not in CLOSED or tuple(titles[-len(ENDING) :]) == ENDING
    gpu = next(section for section in sections(entry.path) if section.title == "On a GPU")
    assert "```bash\n" in gpu.texts[0] and "minute" in gpu.texts[0]


@pytest.mark.parametrize("number", CLOSED)
def test_what_a_lesson_ends_with_has_five_lines_three_questions_and_their_answers(number):
    ending = {section.title: "".join(section.texts) for section in sections(catalogue.find(number).path) if section.title in ENDING}
    assert ending["What you now know"].count("\n- ") + ending["What you now know"].startswith("- ") == 5
    questions, answers = ending["Quiz"].split("<details><summary>Answers</summary>\n")
    for numbered in (questions, answers):
        assert [line[:2] for line in numbered.splitlines() if line[:1].isdigit()] == ["1.", "2.", "3."]
    assert answers.strip().endswith("</details>") and ending["Now you"].strip() and ending["Your guess"].strip()


@pytest.mark.parametrize("entry", LESSONS)
def test_the_picture_of_the_pipeline_stands_at_the_head(entry):
    head = sections(entry.path)[0].texts[0]
    found = re.search(r"!\[(.+)\]\(figures/pipeline-(\w+)\.svg\)", head)
    assert found and found[1] == title(found[2])


@pytest.mark.parametrize("number", SETTLED)
def test_nothing_but_a_folded_set_up_stands_before_the_first_idea(number):
    codes = [code for section in sections(catalogue.find(number).path) for code in section.codes]
    assert is_set_up(codes[0]) and not is_set_up(codes[1])


@pytest.mark.parametrize("entry", LESSONS)
def test_cells_are_short_and_shapes_are_asserted(entry):
    for section in sections(entry.path):
        for code in section.codes:
            lines = [line for line in code.splitlines() if line.strip()]
            assert len(lines) <= 15, f"{section.title}: {len(lines)} lines from {lines[0]!r} on; one idea a cell, at most 15"
            assert max(map(len, lines)) <= 100, f"{section.title}: wider than the page: {max(lines, key=len)}"
    assert "assert " in entry.path.read_text() and ".shape" in entry.path.read_text()


@pytest.mark.parametrize("entry", LESSONS)
def test_each_blank_is_marked_checked_and_answered(entry):
    source = entry.path.read_text()
    checked = [args[0].id for section in sections(entry.path) for code in section.codes for args in words_of(code, "check")]
    assert checked == list(exercises(entry.name)) and checked
    assert source.count("    # YOUR CODE, about ") == len(checked)


@pytest.mark.parametrize("entry", LESSONS)
def test_the_pictures_of_a_lesson_are_there_and_small(entry):
    drawn = {args[1].value for section in sections(entry.path) for code in section.codes for args in words_of(code, "show")}
    kept = {path.stem[3:]: path for path in (HERE / "figures").glob(f"{entry.number}-*.png")}
    assert drawn == set(kept), "run the lesson, and remove the pictures that it no longer makes"
    assert all(path.stat().st_size <= LARGEST for path in kept.values())
    assert (HERE / entry.picture).is_file()


def check_run(entry, options: str, folder: Path, monkeypatch) -> None:
    monkeypatch.setenv("LESSON_OPTIONS", f"{options} --figures '{folder}'")
    assert unprinted(run(entry.path)) == []
    assert list(folder.glob(f"{entry.number}-*.png"))


@pytest.mark.parametrize("entry", LESSONS)
def test_a_quick_run_prints_every_number_of_the_text(entry, tmp_path, monkeypatch):
    check_run(entry, "--quick", tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("entry", LESSONS)
def test_a_whole_run_prints_every_number_of_the_text(entry, tmp_path, monkeypatch):
    check_run(entry, "", tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("entry", LESSONS)
def test_a_lesson_runs_on_a_checkpoint_of_another_family(entry, tmp_path):
    """SD 1.x in small, its weights drawn at random: four levels become three, and it predicts eps."""
    weights_loader.save(family_model("SD 1"), tmp_path / "sd.safetensors")
    assert "[picture: " in program(entry, "--model", tmp_path / "sd.safetensors", "--quick", "--figures", tmp_path / "figures")


@pytest.mark.slow
@pytest.mark.parametrize("entry", LESSONS)
@pytest.mark.parametrize("options", ["", "--quick"])
def test_a_lesson_is_a_program_that_takes_its_time_and_no_more(entry, options, tmp_path):
    begin = seconds_worked()
    printed = program(entry, *options.split(), "--figures", tmp_path)
    limit = (QUICK_SECONDS if options else SECONDS) * (2 if entry.number in LONG and not options else 1)
    assert seconds_worked() - begin < limit
    assert printed.count("[picture: ") == len(list(tmp_path.iterdir())) > 0


def seconds_worked() -> float:
    """Of all processes that were started and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def program(entry, *options) -> str:
    command = [sys.executable, entry.path, *map(str, options)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_program_says_its_options():
    shown = program(entries()[0], "--help")
    assert all(option in shown for option in ("--model", "--device", "--quick", "--figures"))


def test_numbers_that_nothing_printed_are_found():
    first = Section(
        "A", ["It is 3 of 1,000, and 0.3 or 12 % (eq. 4, Ho et al. 2020, `7`, $8$), float32, Stable Diffusion 1.5.\n1. one"], ["code"]
    )
    first.printed = "1000 steps, 0.26, 11.6 %"
    assert unprinted([first]) == ["A: 3"]
    later = Section("B", ["0.26 again"], ["code"], "none")
    without_code = Section("C", ["0.26 again"])
    assert unprinted([first, later, without_code]) == ["A: 3", "B: 0.26"]
    assert unprinted([Section("On a GPU", ["9 minutes"], ["code"])]) == []


def test_the_map_is_made_from_the_lessons():
    text = (HERE / "README.md").read_text()
    assert text == catalogue.readme(text), "make it anew: python -m lessons map"
    for entry in entries():
        assert f"]({entry.name}.py)" in text and f"](pages/{entry.number}.md)" in text


def test_a_first_cell_of_another_form_is_refused(tmp_path, monkeypatch):
    source = entries()[0].path.read_text()
    monkeypatch.setattr(catalogue, "HERE", tmp_path)
    (tmp_path / "07_other.py").write_text(source)
    with pytest.raises(ValueError, match="its title says lesson"):
        entries()
    (tmp_path / "07_other.py").write_text(source.replace("# - Minutes: ", "# - Hours: "))
    with pytest.raises(ValueError, match="its first cell must have title"):
        entries()


def test_a_number_of_no_lesson_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match="lesson '99' unknown; choose .*01, "):
        catalogue.find("99")
    assert catalogue.find("1").number == "01"
