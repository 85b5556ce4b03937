"""`minidiff play`: the page, driven in Chromium as wide as a desk's screen and as a phone; and what is wrong said in one line."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import weights_loader
from minidiff.cli import play as play_file
from minidiff.cli.studio import Studio
from minidiff.pictures import list_pictures
from minidiff.png_settings import read_parameters
from tests.browser import CHROMIUM, opened
from tests.command import runner
from tests.small_concepts import picture_folder
from tests.small_models import small_model, training_config

with_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="Gradio is not installed: pip install -e '.[play]'")
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
ROOT = Path(__file__).parents[2]
SOURCE = "document.querySelector('#{} img')?.src"


COMMAND = """
import socket, sys
from pathlib import Path

connect, find = socket.socket.connect, socket.getaddrinfo

def note(address):
    with Path("connected").open("a") as file:
        file.write(f"{address}\\n")

def noted_connect(own, address):
    note(address[0] if isinstance(address, tuple) else address)
    return connect(own, address)

def noted_find(host, *rest, **named):
    note(host)
    return find(host, *rest, **named)

socket.socket.connect, socket.getaddrinfo = noted_connect, noted_find
from minidiff.cli.main import main

main()
"""  # the command line, which notes where it connects to, and asks for, through Python


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address and the folder of a page with a small model; interrupted at the end, its process leaves no temporary file."""
    folder = tmp_path_factory.mktemp("play")
    (folder / "temporary").mkdir()
    weights_loader.save(small_model(training_config()), folder / "model.safetensors")
    command = [sys.executable, "-c", COMMAND, "play", "--model", "model.safetensors", "--out", "made"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder / "temporary")}
    with (
        (folder / "said").open("w") as said,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=said, text=True) as process,
    ):
        try:
            assert process.stdout is not None
            address = process.stdout.readline().strip()
            assert address.startswith("http://127.0.0.1:"), (folder / "said").read_text()
            yield address, folder
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 130
            assert [path for path in (folder / "temporary").rglob("*") if path.is_file()] == []
            assert "Traceback" not in (folder / "said").read_text()
        finally:
            process.kill()


async def click(page, selector):
    await page.value(f"document.querySelector({json.dumps(selector)}).click()")


async def write(page, selector, text):
    await page.value(
        f"(() => {{ const box = document.querySelector({json.dumps(selector)}); box.value = {json.dumps(text)};"
        "box.dispatchEvent(new Event('input', {bubbles: true})) })()"
    )


async def says(page, selector, text):
    await page.until(f"document.querySelector({json.dumps(selector)})?.innerText.includes({json.dumps(text)})")


async def collect(page, name, expression):
    """Collects in a set of this name what an expression gives over time."""
    await page.value(f"window.{name} = new Set(); setInterval(() => {{ const found = {expression}; if (found) {name}.add(found) }}, 5)")


async def open_tab(page, name):
    await page.value(f"[...document.querySelectorAll('button[role=tab]')].find(tab => tab.innerText.trim() === '{name}').click()")


@with_gradio
@in_chromium
def test_draw_click_a_word_teach_cancel_and_take_settings_back(served, tmp_path):
    address, folder = served
    pictures = list_pictures(picture_folder(tmp_path / "cat", seed=1, size=64))
    seen = asyncio.run(use_the_page(address, tmp_path / "browser", pictures, folder / "made"))
    assert seen["words"] == ["a", "red", "cat"]
    assert seen["frames"] > 2  # of the film, live
    assert seen["maps"] > 2  # step by step
    assert seen["after teaching"] == "lora-sks"
    assert seen["taken back"] == ["a photo of a sks cat", "6", "lora-sks"]
    assert seen["errors"] == seen["outside"] == []
    sd = weights_loader.load(folder / "model.safetensors")
    assert np.array_equal(np.asarray(Image.open(folder / "made" / "a-red-cat-0.png")), np.asarray(sd.generate("a red cat", steps=6)[0]))
    assert "LoRA: made/lora-sks/lora.safetensors" in read_parameters(folder / "made" / "a-photo-of-a-sks-cat-0.png")[0]
    assert sorted(path.name for path in (folder / "made").iterdir()) == ["a-photo-of-a-sks-cat-0.png", "a-red-cat-0.png", "lora-sks"]
    assert set((folder / "connected").read_text().split()) <= {"127.0.0.1", "::1", "localhost"}


async def use_the_page(address, browser, pictures, made):
    """Does all that the page is for, and returns what was seen."""
    seen = {}
    async with opened(address, browser, width=1280) as page:
        await page.until("document.querySelector('#draw')")
        # Draw.
        await write(page, "#prompt textarea", "a red cat")
        await write(page, "#steps input", "6")
        await collect(page, "frames", SOURCE.format("picture"))
        await click(page, "#draw")
        await says(page, "#note", "saved with its settings: made/a-red-cat-0.png")
        seen["frames"] = await page.value("frames.size")
        seen["words"] = await page.value("[...document.querySelectorAll('#words label')].map(label => label.innerText.trim())")
        picture = await page.value(SOURCE.format("picture"))
        assert picture.endswith("/a-red-cat-0.png")  # what the browser downloads is the file itself
        # Click a word: its attention step by step; then move to another step.
        assert not await page.value(SOURCE.format("attention"))
        await collect(page, "maps", SOURCE.format("attention"))
        await page.value("document.querySelectorAll('#words input')[2].click()")
        await page.until(f"maps.size > 2 && document.querySelector('#scrubber input').value === '6' && {SOURCE.format('attention')}")
        seen["maps"], last = await page.value("maps.size"), await page.value(SOURCE.format("attention"))
        await write(page, "#scrubber input[type=range]", "1")
        await page.until(f"{SOURCE.format('attention')} !== {json.dumps(last)} && {SOURCE.format('picture')} !== {json.dumps(picture)}")
        # Teach it in twenty steps.
        await open_tab(page, "Teach")
        await page.until("document.querySelector('#pictures input[type=file]')")
        await page.drop("#pictures input[type=file]", pictures)
        await page.until("document.querySelectorAll('#pictures img').length >= 3")
        await write(page, "#class-word :is(input, textarea)", "cat")
        await write(page, "#lesson-steps input", "20")
        await click(page, "#teach")
        await says(page, "#progress", " of 20, loss")
        await says(page, "#progress", "lora-sks: learned")
        await page.until(SOURCE.format("sheet"))
        # Teach it once more, and cancel.
        await write(page, "#lesson-steps input", "5000")
        said = "document.querySelector('#progress').innerText.includes(' of 5000, loss')"
        await page.until(f"{said} || document.querySelector('#teach').click()")  # a click while the last lesson ends is not taken
        await click(page, "#cancel")
        await says(page, "#progress", "stopped: nothing was kept")
        # Draw with what was learned: it is chosen, and so is its prompt.
        await open_tab(page, "Draw")
        seen["after teaching"] = await page.value("document.querySelector('#learned input').value")
        await click(page, "#draw")
        await says(page, "#note", "saved with its settings: made/a-photo-of-a-sks-cat-0.png")
        # The picture brings back what it was made with.
        await write(page, "#prompt textarea", "something else")
        await write(page, "#steps input", "9")
        await page.drop("#dropped input[type=file]", [made / "a-photo-of-a-sks-cat-0.png"])
        await says(page, "#note", "settings taken from the picture")
        fields = "['#prompt textarea', '#steps input', '#learned input'].map(field => document.querySelector(field).value)"
        seen["taken back"] = await page.value(fields)
        # What cannot be drawn is said in a line.
        await write(page, "#prompt textarea", "a (red:99) cat")
        await click(page, "#draw")
        await says(page, "body", "weight 99")
        return seen | {"errors": page.errors(), "outside": page.outside(address)}


@with_gradio
@in_chromium
@pytest.mark.parametrize("tab", ["Draw", "Teach"])
@pytest.mark.parametrize(("width", "dark"), [(375, False), (1280, True)])
def test_phone_and_desk_show_both_tabs_with_nothing_to_be_moved_sideways(served, tmp_path, tab, width, dark):
    address, _ = served

    async def visit():
        async with opened(address, tmp_path / "browser", width, dark) as page:
            await page.until("document.querySelector('#draw')")
            await open_tab(page, tab)
            await page.until(f"document.querySelector('#{tab.lower()}').offsetWidth > 0")
            await says(page, "body", "no web interface for production")
            assert await page.value("document.documentElement.scrollWidth") <= width
            assert page.errors() == page.outside(address) == []

    asyncio.run(visit())


@with_gradio
def test_every_method_says_what_it_does_and_has_its_preset(tmp_path):
    studio = Studio(small_model(), "small", tmp_path)
    page = play_file.make_page(studio)
    (choose,) = [event.fn for event in page.fns.values() if event.name == "explain_method"]
    for name, options in studio.methods().items():
        summary, token, steps = choose(name)
        assert summary.startswith(("Train", "Fine-tune")) and steps == options.phases()[-1].settings.steps
        assert token == ("" if name == "fine-tune" else "sks" if "lora" in name or name == "dreambooth" else "<cat>")


@with_gradio
@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--port", "0"), "--port 0 is outside 1..65535"),
        (("--model", "gone.safetensors"), "gone.safetensors"),
        (("--out", "file"), "--out file"),
    ],
)
def test_bad_input_ends_in_one_line(monkeypatch, tmp_path, capsys, args, said):
    (tmp_path / "file").touch()
    code, out, err = runner(monkeypatch, tmp_path, capsys)("play", *args)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1


@with_gradio
def test_a_port_that_is_taken_is_one_line(monkeypatch, tmp_path, capsys):
    weights_loader.save(small_model(), tmp_path / "model.safetensors")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = runner(monkeypatch, tmp_path, capsys)("play", "--model", "model.safetensors", "--port", port)
    assert code == 2 and str(port) in err and "Traceback" not in err


def test_without_gradio_the_way_out_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, out, err = runner(monkeypatch, tmp_path, capsys)("play")
    assert (code, out) == (2, "") and err == "minidiff: minidiff play needs Gradio, which is not installed: pip install -e '.[play]'\n"
