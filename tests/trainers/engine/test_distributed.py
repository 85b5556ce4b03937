"""Several processes: what they average, and that one alone does nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from minidiff.trainers.engine import distributed
from minidiff.trainers.engine.loop import Training
from tests.small_task import CPU, SmallTask, small_settings, together


def test_one_process_alone_does_nothing(monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    assert distributed.init_distributed(CPU) == CPU and not torch.distributed.is_initialized()
    assert (distributed.rank(), distributed.world_size()) == (0, 1) and distributed.all_equal(3, CPU)
    p, loss = nn.Parameter(torch.ones(2)), torch.tensor(3.0)
    p.grad = torch.ones(2)
    assert distributed.average_gradients([p], loss) is loss and torch.equal(p.grad, torch.ones(2))
    distributed.barrier()
    distributed.destroy_distributed()


@pytest.mark.forks
def test_gradients_and_losses_become_their_means(tmp_path):
    def run():
        mine = distributed.rank() + 1.0
        both, one, none = (nn.Parameter(torch.ones(2)) for _ in range(3))
        both.grad = torch.tensor([mine, 10 * mine])
        if mine == 2:
            one.grad = torch.tensor([4.0, 6.0])
        given = torch.tensor(mine)
        loss = distributed.average_gradients([both, one, none], given)
        assert distributed.world_size() == 2 and given.item() == mine
        assert not distributed.all_equal(int(mine), CPU) and distributed.all_equal(5, CPU)
        distributed.barrier()
        torch.save([loss, both.grad, one.grad, none.grad], tmp_path / f"{distributed.rank()}.pt")

    assert together(2, run) == [0, 0]
    for number in (0, 1):
        loss, both, one, none = torch.load(tmp_path / f"{number}.pt")
        assert loss.item() == 1.5 and both.tolist() == [1.5, 15.0] and one.tolist() == [2.0, 3.0] and none is None


@pytest.mark.forks
def test_processes_that_begin_at_different_steps_are_refused(tmp_path):
    walk = Training(SmallTask(), small_settings(gradient_accumulation=2), CPU, tmp_path / "0.pt").run()
    next(walk)
    walk.close()

    def run():
        with pytest.raises(ValueError, match="the processes begin at different steps"):
            Training(SmallTask(), small_settings(), CPU, tmp_path / f"{distributed.rank()}.pt")

    assert together(2, run) == [0, 0]


@pytest.mark.forks
def test_a_process_that_has_lost_another_says_so_in_one_line():
    def run():
        if distributed.rank() == 1:
            os._exit(7)
        p = nn.Parameter(torch.ones(2))
        p.grad = torch.ones(2)
        with pytest.raises(ConnectionError, match="process 0 of 2 has lost another one, which has ended; start all again") as error:
            for _ in range(3):
                distributed.average_gradients([p], torch.tensor(1.0))
        assert "\n" not in str(error.value)
        distributed.destroy_distributed()

    assert together(2, run) == [0, 7]


@pytest.mark.slow
def test_torchrun_starts_them(tmp_path):
    """Slow: three interpreters import PyTorch."""
    script = tmp_path / "train.py"
    script.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from minidiff.trainers.engine import distributed\n"
        "from minidiff.trainers.engine.loop import train\n"
        "from tests.small_task import CPU, SmallTask, small_settings\n"
        "device = distributed.init_distributed(CPU)\n"
        "steps = list(train(SmallTask(), small_settings(batch=2), device, Path(sys.argv[1])))\n"
        "assert len(steps) == 10 and distributed.world_size() == 2\n"
        "distributed.destroy_distributed()\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", script, tmp_path / "state.pt"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[3], env={**__import__("os").environ, "PYTHONPATH": "."})
    assert Training(SmallTask(), small_settings(batch=4), CPU, tmp_path / "state.pt").done == 10
