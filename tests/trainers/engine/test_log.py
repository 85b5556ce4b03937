"""What a run tells: losses that survive a stop, a curve that shows them, how long it will take."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

from minidiff.trainers.engine import log
from minidiff.trainers.engine.log import BLUE, GREY, HEIGHT, MARGIN, WIDTH, Log, Pace, loss_curve, memory_taken, read_rows
from minidiff.trainers.engine.loop import TrainStep

CPU = torch.device("cpu")


def step(i, loss=None, steps=100):
    return TrainStep(i, steps, torch.tensor(1.0 / i if loss is None else loss), 0.5)


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on by a second whenever it is looked at, unless `clock.tick` says otherwise."""

    class Clock:
        now, tick = 100.0, 1.0

        def __call__(self):
            self.now += self.tick
            return self.now

    clock = Clock()
    monkeypatch.setattr(log.time, "monotonic", clock)
    return clock


def test_losses_stand_in_the_file_and_the_curve_is_drawn(tmp_path):
    with Log(tmp_path, "lora", CPU) as one:
        for i in range(1, 4):
            one.add(step(i))
    assert read_rows(tmp_path / "lora.csv") == [(1, 1.0, 0.5), (2, 0.5, 0.5), (3, pytest.approx(1 / 3), 0.5)]
    with Image.open(tmp_path / "lora-loss.png") as picture:
        assert picture.size == (WIDTH, HEIGHT)


def test_a_run_that_is_taken_up_again_writes_on_from_its_step(tmp_path):
    with Log(tmp_path, "lora", CPU) as one:
        for i in range(1, 6):
            one.add(step(i))
    with Log(tmp_path, "lora", CPU):
        pass  # a run that was finished: nothing is added, nothing is lost
    with (tmp_path / "lora.csv").open("a") as file:
        file.write("6,0.1")  # killed while it wrote
    with Log(tmp_path, "lora", CPU) as again:
        again.add(step(4, loss=7.0))  # its last save was that of step 3
        again.add(step(5, loss=8.0))
    rows = read_rows(tmp_path / "lora.csv")
    assert [(i, loss) for i, loss, _ in rows] == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3)), (4, 7.0), (5, 8.0)]


def test_the_text_tells_loss_memory_and_time_left(tmp_path, clock):
    one = Log(tmp_path, "lora", CPU)
    assert one.text() == ""
    for i in range(1, 21):
        one.add(step(i, loss=2.0 if i > 10 else 50.0))
    text = one.text()
    assert text.startswith("loss 2.0000, ") and f"{memory_taken(CPU) / 1e9:.1f} GB" in text and text.endswith(" min left")


def test_the_loss_is_looked_at_once_a_second_only(tmp_path, clock, monkeypatch):
    """Each look at a loss on a GPU waits for the step."""
    clock.tick = 0.001
    one, looked = Log(tmp_path, "lora", CPU), []
    look = one._look
    monkeypatch.setattr(one, "_look", lambda: looked.append(len(one.waiting)) or look())
    one.written = clock.now  # no files yet
    for i in range(1, 101):
        one.add(step(i))
    assert looked == [1]  # the first
    one.__exit__()
    assert looked == [1, 99]


def test_the_other_processes_are_silent(tmp_path, monkeypatch):
    monkeypatch.setattr(log.distributed, "rank", lambda: 1)
    with Log(tmp_path, "lora", CPU) as one:
        one.add(step(1))
        assert one.text() == ""
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_is_written_where_it_is_installed(tmp_path, monkeypatch):
    written = []

    class SummaryWriter:
        def __init__(self, folder):
            written.append(folder)

        def add_scalar(self, name, value, i):
            written.append((name, value, i))

        def close(self):
            written.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    with Log(tmp_path, "lora", CPU) as one:
        one.add(step(2))
    assert written == [str(tmp_path / "tensorboard" / "lora"), ("loss", 0.5, 2), ("learning rate", 0.5, 2), "closed"]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # as where it is not
    assert log.tensorboard(tmp_path) is None


def test_pace_leaves_the_first_step_out_and_says_how_long_the_rest_takes(clock):
    pace = Pace()
    assert pace.left() is None and pace.forecast() is None
    clock.tick = 30.0
    pace.add(step(11))
    assert pace.left() is None
    clock.tick = 2.0
    pace.add(step(12))
    pace.add(step(13))
    assert pace.seconds() == 2.0 and pace.left() == 2.0 * 87
    assert pace.forecast() == "87 steps of 2 s: about 3 min"


def test_memory_taken_is_at_least_what_is_held():
    before = memory_taken(CPU)
    held = np.ones(25_000_000)
    assert memory_taken(CPU) >= max(before, held.nbytes)


def rows_of(image, colour):
    """For each column, the middle height of the pixels of one colour, as a share of the plot from its floor."""
    same = (np.asarray(image) == colour).all(axis=2)
    columns = [np.flatnonzero(column) for column in same.T]
    return [1 - (np.mean(c) - MARGIN) / (HEIGHT - 2 * MARGIN) if len(c) else None for c in columns]


def test_the_curve_falls_where_the_losses_fall():
    heights = rows_of(loss_curve([2.0 - i / 100 for i in range(100)]), BLUE)
    for share in (0.25, 0.5, 0.75):
        # the blue line is 3 pixels wide and lags half its window of 2 steps
        assert heights[round(MARGIN + share * (WIDTH - 2 * MARGIN))] == pytest.approx(1 - share, abs=0.03)
    assert heights[MARGIN - 5] is None and heights[WIDTH - MARGIN + 5] is None


def test_a_few_wild_or_broken_losses_do_not_flatten_the_curve():
    losses = [1.0 + (i % 2) for i in range(1000)]
    losses[500], losses[600], losses[700] = 1e9, float("nan"), float("inf")
    heights = [h for h in rows_of(loss_curve(losses), BLUE) if h is not None]
    assert np.median(heights) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("losses", [[3.0], [1.0, 1.0], [float("nan")]])
def test_short_and_odd_curves_are_drawn(losses):
    image = loss_curve(losses, first=7)
    assert image.size == (WIDTH, HEIGHT)
    assert GREY != BLUE and np.asarray(image).min() < 128  # the axes at least
