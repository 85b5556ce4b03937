"""`minidiff play`: the page, driven in Chromium as wide as a desk's screen and as a phone; and what is wrong said in one line."""

import asyncio
import json
import re
import socket
import sys
from importlib.util import find_spec

import numpy as np
import pytest
from PIL import Image

import weights_loader
from minidiff.cli import play as play_file
from minidiff.cli import studio as studio_file
from minidiff.cli.studio import Studio
from minidiff.files import checksum
from minidiff.pictures import list_pictures
from minidiff.png_settings import read_parameters
from tests.browser import CHROMIUM, opened
from tests.command import runner
from tests.small_concepts import picture_folder
from tests.small_models import small_model, training_config

with_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="Gradio is not installed: pip install -e '.[play]'")
in_chromium = pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)")
SOURCE = "document.querySelector('#{} img')?.src"


@pytest.fixture
def studio(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(studio_file, "SHEET_STEPS", 1)
    monkeypatch.setattr(play_file, "REPLAY", 0.6)
    weights_loader.save(small_model(training_config()), tmp_path / "model.safetensors")
    return Studio(weights_loader.load("model.safetensors"), "model.safetensors", tmp_path / "made")


@pytest.fixture
def connected(monkeypatch):
    """Addresses that this process connects to, through Python."""
    asked, connect = [], socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda own, address: (asked.append(address), connect(own, address))[1])
    return asked


async def click(page, selector):
    await page.value(f"document.querySelector({json.dumps(selector)}).click()")


async def write(page, selector, text):
    await page.value(
        f"(() => {{ const box = document.querySelector({json.dumps(selector)}); box.value = {json.dumps(text)};"
        "box.dispatchEvent(new Event('input', {bubbles: true})) })()"
    )


async def says(page, selector, text):
    await page.until(f"document.querySelector({json.dumps(selector)})?.innerText.includes({json.dumps(text)})")


async def open_tab(page, name):
    await page.value(f"[...document.querySelectorAll('button[role=tab]')].find(tab => tab.innerText.trim() === '{name}').click()")


@with_gradio
@in_chromium
def test_draw_click_a_word_teach_cancel_and_take_settings_back(studio, tmp_path, connected):
    picture_folder(tmp_path / "cat", seed=1)
    before = checksum(*studio.sd.parts.values())

    async def visit(address):
        async with opened(address, tmp_path / "browser", width=1280) as page:
            await page.until("document.querySelector('#draw')")
            # Draw: the film is live, and its end is the file.
            await write(page, "#prompt textarea", "a red cat")
            await write(page, "#steps input", "6")
            await page.value(
                "window.seen = new Set(); window.watch = setInterval(() => seen.add(document.querySelector('#picture img')?.src), 5)"
            )
            await click(page, "#draw")
            await says(page, "#note", "saved with its settings: ")
            assert await page.value("[...seen].filter(Boolean).length") > 2
            said = await page.value("document.querySelector('#note').innerText")
            assert await page.value("[...document.querySelectorAll('#words label')].map(label => label.innerText.trim())") == ["a", "red", "cat"]
            picture = await page.value(SOURCE.format("picture"))
            # A word: its attention, step by step, and a step that is asked for.
            assert not await page.value(SOURCE.format("attention"))
            await page.value(
                "window.maps = new Set(); setInterval(() => maps.add(document.querySelector('#attention img')?.src + "
                "document.querySelector('#scrubber input').value), 5)"
            )
            await page.value("document.querySelectorAll('#words input')[2].click()")
            await page.until(SOURCE.format("attention"))
            await page.until("document.querySelector('#scrubber input').value === '6'")
            assert await page.value("[...maps].length") > 3
            last = await page.value(SOURCE.format("attention"))
            await write(page, "#scrubber input[type=range]", "1")
            await page.until(f"{SOURCE.format('attention')} !== {json.dumps(last)} && {SOURCE.format('picture')} !== {json.dumps(picture)}")
            # Teach twenty steps: it is on the first tab then, with its prompt.
            await open_tab(page, "Teach")
            await page.until("document.querySelector('#pictures input[type=file]')")
            await page.drop("#pictures input[type=file]", list_pictures(tmp_path / "cat"))
            await page.until("document.querySelectorAll('#pictures img').length >= 3")
            await write(page, "#class-word :is(input, textarea)", "cat")
            await write(page, "#lesson-steps input", "20")
            await click(page, "#teach")
            await says(page, "#progress", " of 20, loss")
            await says(page, "#progress", "lora-sks: learned")
            assert await page.value(SOURCE.format("sheet"))
            # Cancel another one.
            await write(page, "#lesson-steps input", "5000")
            await click(page, "#teach")
            await says(page, "#progress", " of 5000, loss")
            await click(page, "#cancel")
            await says(page, "#progress", "stopped: nothing was kept")
            # What was learned is drawn with.
            await open_tab(page, "Draw")
            assert await page.value("document.querySelector('#learned input').value") == "lora-sks"
            await click(page, "#draw")
            await says(page, "#note", "a-photo-of-a-sks-cat-0.png")
            # Its picture brings back what was asked for.
            await write(page, "#prompt textarea", "something else")
            await write(page, "#steps input", "9")
            await page.drop("#dropped input[type=file]", [studio.out / "a-photo-of-a-sks-cat-0.png"])
            await says(page, "#note", "settings taken from the picture")
            fields = "['#prompt textarea', '#steps input', '#learned input'].map(field => document.querySelector(field).value)"
            assert await page.value(fields) == ["a photo of a sks cat", "6", "lora-sks"]
            # An error is one line.
            await write(page, "#prompt textarea", "a (red:99) cat")
            await click(page, "#draw")
            await says(page, "body", "99")
            assert page.errors() == page.outside(address) == []
            return re.search("saved with its settings: (.*)", said)[1], picture

    with play_file.served(studio) as address:
        assert address.startswith("http://127.0.0.1:")
        file, picture = asyncio.run(visit(address))
    drawn = studio.sd.generate("a red cat", steps=6)
    assert studio.on is not None and studio.use() is None and checksum(*studio.sd.parts.values()) == before
    assert picture.endswith("a-red-cat-0.png") and np.array_equal(np.asarray(Image.open(file)), np.asarray(studio.sd.generate("a red cat", steps=6)[0]))
    assert not np.array_equal(np.asarray(drawn[0]), np.asarray(Image.open(file)))  # with what was learned
    assert "a sks cat" in read_parameters(studio.out / "a-photo-of-a-sks-cat-0.png")[0]
    assert sorted(path.name for path in studio.out.iterdir()) == ["a-photo-of-a-sks-cat-0.png", "a-red-cat-0.png", "lora-sks"]
    assert {address[0] for address in connected if isinstance(address, tuple)} <= {"127.0.0.1", "::1", "localhost"}


@with_gradio
@in_chromium
@pytest.mark.parametrize("tab", ["Draw", "Teach"])
@pytest.mark.parametrize(("width", "dark"), [(375, False), (1280, True)])
def test_phone_and_desk_show_both_tabs_with_nothing_to_be_moved_sideways(studio, tmp_path, tab, width, dark):
    async def visit(address):
        async with opened(address, tmp_path / "browser", width, dark) as page:
            await page.until("document.querySelector('#draw')")
            await open_tab(page, tab)
            await page.until(f"document.querySelector('#{tab.lower()}').offsetWidth > 0")
            await says(page, "body", "no web interface for production")
            assert await page.value("document.documentElement.scrollWidth") <= width
            assert page.errors() == page.outside(address) == []

    with play_file.served(studio) as address:
        asyncio.run(visit(address))


@with_gradio
def test_every_method_says_what_it_does_and_has_its_preset(studio):
    page = play_file.make_page(studio)
    (choose,) = [event.fn for event in page.fns.values() if event.name == "explain_method"]
    for name, options in studio.methods().items():
        summary, token, steps = choose(name)
        assert summary.startswith(("Train", "Fine-tune")) and steps == options.phases()[-1].settings.steps
        assert token == ("" if name == "fine-tune" else "sks" if "lora" in name or name == "dreambooth" else "<cat>")


@with_gradio
@pytest.mark.parametrize(
    ("args", "said"),
    [(("--port", "0"), "--port 0 is outside 1..65535"), (("--model", "gone.safetensors"), "gone.safetensors"), (("--out", "file"), "--out file")],
)
def test_bad_input_ends_in_one_line(monkeypatch, tmp_path, capsys, args, said):
    (tmp_path / "file").touch()
    code, out, err = runner(monkeypatch, tmp_path, capsys)("play", *args)
    assert (code, out) == (2, "") and said in err and err.count("\n") == 1


@with_gradio
def test_a_port_that_is_taken_is_one_line(monkeypatch, tmp_path, capsys, studio):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, err = runner(monkeypatch, tmp_path, capsys)("play", "--model", "model.safetensors", "--port", port)
    assert code == 2 and str(port) in err and "Traceback" not in err


def test_without_gradio_the_way_out_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, out, err = runner(monkeypatch, tmp_path, capsys)("play")
    assert (code, out) == (2, "") and err == "minidiff: minidiff play needs Gradio, which is not installed: pip install -e '.[play]'\n"
