"""A state file is whole or not there at all, and belongs to one run."""

import os
import resource
import signal

import pytest
import torch

from minidiff.trainers.engine.loop import train
from minidiff.trainers.engine.state import read_state, write_state
from tests.small_task import CPU, SmallTask, forked, small_settings


@pytest.fixture
def disk_of():
    """Lets no file grow past so many bytes: to who writes, that is a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "state.pt"
    write_state(path, {"i": 3, "weights": {"a": torch.arange(4.0)}, "groups": [{"lr": 0.5}]})
    state = read_state(path)
    assert state["i"] == 3 and torch.equal(state["weights"]["a"], torch.arange(4.0)) and state["groups"] == [{"lr": 0.5}]
    assert os.listdir(tmp_path) == ["state.pt"]


@pytest.mark.parametrize("size", [0, 1000, 150_000])
def test_a_full_disk_is_one_clear_line_and_the_last_state_is_kept(tmp_path, disk_of, size):
    path = tmp_path / "state.pt"
    write_state(path, {"i": 1})
    disk_of(size)
    with pytest.raises(OSError, match=r"state.pt could not be written \(.+\); the state before it is kept: make room") as error:
        write_state(path, {"i": 2, "weights": torch.zeros(100_000)})
    assert len(str(error.value).splitlines()) == 1
    assert read_state(path) == {"i": 1} and os.listdir(tmp_path) == ["state.pt"]


def test_a_run_stops_cleanly_on_a_full_disk_and_goes_on_later(tmp_path, disk_of):
    path = tmp_path / "state.pt"
    walk = train(SmallTask(), small_settings(), CPU, path)
    for _ in range(4):
        next(walk)
    disk_of(500)
    with pytest.raises(OSError, match="could not be written"):
        list(walk)
    assert read_state(path)["i"] == 3
    disk_of(resource.RLIM_INFINITY)
    assert [step.done for step in train(SmallTask(), small_settings(), CPU, path)] == list(range(4, 11))


@pytest.mark.forks
def test_a_process_killed_while_it_writes_leaves_the_last_state(tmp_path):
    path = tmp_path / "state.pt"
    write_state(path, {"i": 1})

    def killed(state, file):
        file.write(b"half")
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

    def run():
        torch.save = killed
        write_state(path, {"i": 2})

    assert forked(run) == -signal.SIGKILL
    assert read_state(path) == {"i": 1}
    write_state(path, {"i": 3})
    assert read_state(path) == {"i": 3} and os.listdir(tmp_path) == ["state.pt"]


@pytest.mark.parametrize("content", [b"", b"half a file", b"PK\x03\x04 and nothing more"])
def test_a_file_that_is_no_state_is_said_to_be_none(tmp_path, content):
    path = tmp_path / "state.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="state.pt is not the state of a run"):
        read_state(path)
