"""`minidiff play`: a page in the browser, to watch the model at work and to teach it something; what it does is studio.py's.

    Draw     prompt, seed, ... -> the film of x0_hat, live; a click on a word -> what attended to it, step by step
    Teach    pictures, a method, words -> progress and sheets, live -> a name and a weight on the first tab

Gradio makes the page and queues its jobs. It is asked to send nothing, and to listen to this machine alone.
"""

import os
import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from time import sleep
from typing import TYPE_CHECKING, Any

from minidiff.cli.failures import explain
from minidiff.cli.flags import DTypes, Whole
from minidiff.cli.model import load
from minidiff.cli.names import check_folder
from minidiff.cli.studio import LOW_RANK, Film, Progress, Request, Studio
from minidiff.trainers.methods.table import METHODS

if TYPE_CHECKING:
    from gradio import Blocks

HOST = "127.0.0.1"
REPLAY = 3.0  # seconds in which the attention to a word is shown, all steps together
LARGEST_SEED = 2**53 - 1  # the largest whole number that JavaScript holds exactly
ABOUT = """# minidiff play
The model `{model}`, {width} x {height} pixels. This page is for seeing how the model works; it is no web interface for production.
Pictures and what is learned go to `{out}`."""
CSS = """
.pixels img { width: 100%; height: auto; object-fit: contain; image-rendering: pixelated; }
.pixels .image-container, .pixels .image-frame { width: 100%; }
#picture, #attention { aspect-ratio: 1; }
footer { display: none; }
"""


def play(model: str = "tiny", out: Path = Path("runs/play"), port: Whole = None, dtype: DTypes = "auto", device: str = "auto") -> None:
    """Open a page on this machine to draw with the model, step by step, and to teach it something.

        minidiff play
        minidiff play --model v1-5-pruned-emaonly.safetensors --dtype float32

    It is for seeing how the model works, and no web interface for production. It needs `pip install -e '.[play]'`; Ctrl-C ends it.

    Args:
        model: "tiny" (ships with minidiff), a .safetensors or .ckpt file, or a diffusers folder
        out: folder for the pictures and for what is learned
        port: of 127.0.0.1, where the page is; a free one from 7860 on by default
        dtype: of the weights, as for generate; methods that train the model's own weights need float32
        device: auto, cpu, cuda, cuda:1, mps
    """
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise ImportError("minidiff play needs Gradio, which is not installed: pip install -e '.[play]'") from None
    check_folder(out)
    if port is not None and not 0 < port < 2**16:
        raise ValueError(f"--port {port} is outside 1..65535; leave it out for a free one")
    with served(Studio(load(model, dtype, device), model, out), port) as address:
        print(address, flush=True)
        Event().wait()


@contextmanager
def served(studio: Studio, port: int | None = None) -> Iterator[str]:
    """Serve the page to this machine; give its address. At the end a job that runs is stopped, and temporary files are removed.

    Raises OSError for a port that is taken.
    """
    from gradio.themes import Base

    with TemporaryDirectory(prefix="minidiff-play-") as cache:
        os.environ["GRADIO_TEMP_DIR"] = cache  # Gradio's copies of pictures
        page = make_page(studio)
        theme = Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])  # others come from Google
        try:
            _, address, _ = page.launch(
                server_name=HOST,
                server_port=port,
                share=False,
                ssr_mode=False,
                run_history=False,
                prevent_thread_lock=True,
                quiet=True,
                theme=theme,
                css=CSS,
                footer_links=[],
                allowed_paths=[str(studio.out.resolve())],
            )
            yield address
        finally:
            studio.stop()
            with studio.alone:
                page.close(verbose=False)


def make_page(studio: Studio) -> "Blocks":
    """Put the page together."""
    import gradio as gr

    from minidiff.samplers import SAMPLERS

    methods, (width, height) = studio.methods(), studio.sd.pixel_size(None)
    about = ABOUT.format(model=studio.model, width=width, height=height, out=studio.out)
    alone: dict[str, Any] = dict(concurrency_limit=1, concurrency_id="model")
    image: dict[str, Any] = dict(format="png", interactive=False, elem_classes="pixels", buttons=["download", "fullscreen"])
    asides: dict[str, Any] = dict(show_progress="hidden", trigger_mode="always_last")

    def said(error: Exception, command: str) -> gr.Error:
        return gr.Error(explain(error, command)[0], print_exception=False)

    def names() -> list[tuple[str, str]]:
        return [("nothing", ""), *((name, name) for name in studio.learned)]

    def draw(*asked: Any) -> Iterator[list[Any]]:
        request = Request(*asked)
        try:
            for film in studio.run_alone(studio.draw(request)):
                done = len(film.frames)
                word_row = gr.Radio(choices=[(word, i) for i, (word, _) in enumerate(film.words)], value=None) if done == 1 else gr.skip()
                scrubber = gr.Slider(maximum=max(2, request.steps), value=done, interactive=film.file is not None)
                where = f"saved with its settings: {film.file}" if film.file else f"step {done} of {request.steps}"
                clear = None if done == 1 else gr.skip()
                yield [film, film.picture(done), clear, word_row, scrubber, "\n\n".join([where, *film.notes])]
        except Exception as error:
            raise said(error, "generate") from None

    def show(film: Film | None, word: int | None, step: float) -> list[Any]:
        if film is None or not film.frames:
            return [gr.skip(), gr.skip()]
        step = min(int(step), len(film.frames))
        return [film.picture(step), None if word is None else film.attention(word, step)]

    def replay(film: Film | None, word: int | None) -> Iterator[list[Any]]:
        count = len(film.frames) if film else 0
        for step in range(1, count + 1):
            yield [*show(film, word, step), step]
            sleep(REPLAY / count)

    def recall(file: str) -> list[Any]:
        try:
            request, notes = studio.recall(Path(file))
        except Exception as error:
            raise said(error, "generate") from None
        return [*astuple(request), "\n\n".join(["settings taken from the picture", *notes])]

    def teach(pictures: Sequence[tuple[str, Any]] | None, method: str, token: str, class_word: str, steps: float) -> Iterator[list[Any]]:
        progress = None
        lesson = studio.teach([Path(path) for path, _ in pictures or ()], method, token.strip(), class_word.strip(), int(steps))
        try:
            for progress in studio.run_alone(lesson):
                yield [bar(progress), progress.sheet or gr.skip(), gr.skip(), gr.skip(), gr.skip()]
        except Exception as error:
            raise said(error, "train") from None
        if progress and progress.learned:
            name = progress.learned.name
            yield [gr.skip(), gr.skip(), gr.Dropdown(choices=names(), value=name), 1, progress.learned.prompt]
        else:
            stopped = Progress("stopped: nothing was kept, and the model is as it was", 0)
            yield [bar(stopped), gr.skip(), gr.skip(), gr.skip(), gr.skip()]

    def explain_method(name: str) -> list[Any]:
        method = METHODS[name.removesuffix(LOW_RANK)]
        example = shlex.split(method.example)
        token = example[example.index("--token") + 1] if "--token" in example else ""
        return [method.summary, token, methods[name].phases()[-1].settings.steps]

    with gr.Blocks(title="minidiff play", analytics_enabled=False) as page:
        gr.Markdown(about)
        film = gr.State()
        with gr.Tab("Draw"):
            with gr.Row():
                with gr.Column():
                    prompt = gr.Textbox("a fox on a green background", label="Prompt", lines=2, elem_id="prompt")
                    negative = gr.Textbox(label="Negative prompt")
                    with gr.Row():
                        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED, min_width=80)
                        sampler = gr.Dropdown(list(SAMPLERS), value="ddim", label="Sampler", min_width=120)
                    steps = gr.Slider(1, 100, 30, step=1, label="Steps", elem_id="steps")
                    scale = gr.Slider(1, 30, studio.sd.config.guidance_scale, step=0.1, label="Guidance scale")
                    with gr.Row():
                        learned = gr.Dropdown(names(), value="", label="With what was learned", elem_id="learned", min_width=160)
                        weight = gr.Slider(0, 1.5, 1, step=0.05, label="Its weight", elem_id="weight", min_width=160)
                    with gr.Row():
                        draw_button = gr.Button("Draw", variant="primary", elem_id="draw", min_width=80)
                        stop_button = gr.Button("Stop", min_width=80)
                with gr.Column():
                    with gr.Row():
                        picture = gr.Image(label="x0_hat, the picture", elem_id="picture", **image)
                        attention = gr.Image(label="Attention to the word", elem_id="attention", **image)
                    words = gr.Radio([], label="Click a word to see where it is attended to, step by step", elem_id="words")
                    scrubber = gr.Slider(1, 30, 1, step=1, label="Step", interactive=False, elem_id="scrubber")
                    note = gr.Markdown(elem_id="note")
                    dropped = gr.File(label="Drop a PNG here to take its settings", file_types=[".png"], height=150, elem_id="dropped")
        with gr.Tab("Teach"):
            with gr.Row():
                with gr.Column():
                    gr.Markdown("Drop three to five pictures of one thing that the model does not know.")
                    pictures = gr.Gallery(show_label=False, columns=5, height=180, buttons=[], elem_id="pictures")
                    method = gr.Dropdown(list(methods), value=next(iter(methods)), label="Method", elem_id="method")
                    summary, first_token, first_steps = explain_method(next(iter(methods)))
                    summary = gr.Markdown(summary)
                    with gr.Row():
                        token = gr.Textbox(first_token, label="New name", min_width=120, elem_id="token")
                        class_word = gr.Textbox(label="Kind of thing", placeholder="cat", min_width=120, elem_id="class-word")
                    lesson_steps = gr.Number(first_steps, label="Steps", precision=0, minimum=1, elem_id="lesson-steps")
                    with gr.Row():
                        teach_button = gr.Button("Teach", variant="primary", elem_id="teach", min_width=80)
                        cancel_button = gr.Button("Cancel", elem_id="cancel", min_width=80)
                with gr.Column():
                    progress = gr.HTML(elem_id="progress")
                    sheet = gr.Image(label="Sheet", elem_id="sheet", **image)
                    gr.Markdown("Rows: your pictures, then for each prompt the untouched model and what was learned so far.")
        wish = [prompt, negative, seed, steps, scale, sampler, learned, weight]
        draw_button.click(draw, wish, [film, picture, attention, words, scrubber, note], show_progress_on=note, **alone)
        words.input(replay, [film, words], [picture, attention, scrubber], **asides)
        scrubber.input(show, [film, words, scrubber], [picture, attention], **asides)
        dropped.upload(recall, dropped, [*wish, note], show_progress="hidden")
        method.input(explain_method, method, [summary, token, lesson_steps], show_progress="hidden")
        lesson = [pictures, method, token, class_word, lesson_steps]
        teach_button.click(teach, lesson, [progress, sheet, learned, weight, prompt], show_progress_on=progress, **alone)
        for button in (stop_button, cancel_button):
            button.click(studio.stop, queue=False)
        page.load(lambda: gr.Dropdown(choices=names()), None, learned, show_progress="hidden")
    return page


def bar(progress: Progress) -> str:
    """Return a bar with its text, as HTML."""
    return f'<progress value="{progress.share:.4f}" style="width: 100%"></progress><div>{escape(progress.text)}</div>'
