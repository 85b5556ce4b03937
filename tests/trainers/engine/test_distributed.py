"""Several processes: what they average, and that one alone does nothing."""

import os
import subprocess
import sys
import time
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
    assert distributed.data_parallel([p]) is None and distributed.mean(loss) is loss
    for last in (False, True):
        distributed.backward(3 * p.sum(), None, last)
    assert p.grad is not None and p.grad.tolist() == [6, 6]
    distributed.barrier()
    distributed.destroy_distributed()


@pytest.mark.forks
def test_gradients_and_losses_become_their_means(tmp_path):
    def run():
        mine = distributed.rank() + 1.0
        both, early, late, none = params = [nn.Parameter(torch.ones(2) * mine) for _ in range(4)]
        ddp = distributed.data_parallel(params)
        assert distributed.world_size() == 2 and all(p.tolist() == [1, 1] for p in params)  # those of rank 0
        for _ in range(2):  # DDP arranges its buckets anew after the first step
            for p in params:
                p.grad = None
            first, second = (both @ torch.tensor([mine, 10 * mine]), 2 * both.sum())
            if mine == 2:
                first, second = first + early @ torch.tensor([4.0, 6.0]), second + late @ torch.tensor([1.0, 3.0])
            distributed.backward(first, ddp, last=False)
            assert both.grad is not None and both.grad.tolist() == [mine, 10 * mine]
            distributed.backward(second, ddp, last=True)
        given = torch.tensor(mine)
        loss = distributed.mean(given)
        assert given.item() == mine
        assert not distributed.all_equal(int(mine), CPU) and distributed.all_equal(5, CPU)
        distributed.barrier()
        torch.save([loss, both.grad, early.grad, late.grad, none.grad], tmp_path / f"{distributed.rank()}.pt")

    assert together(2, run) == [0, 0]
    for number in (0, 1):
        loss, both, early, late, none = torch.load(tmp_path / f"{number}.pt")
        assert loss.item() == 1.5 and both.tolist() == [3.5, 17.0] and none is None
        assert early.tolist() == [2.0, 3.0] and late.tolist() == [0.5, 1.5]


@pytest.mark.forks
@pytest.mark.parametrize("accumulation", [1, 4])
def test_a_step_sends_its_gradients_once_and_in_buckets(accumulation, tmp_path):
    def run():
        training = Training(SmallTask(), small_settings(batch=1, gradient_accumulation=accumulation, steps=3), CPU)
        list(training.run())  # DDP arranges its buckets anew after the first step
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            training._gradients()
        sent = [event.name for event in profile.events() if event.name.startswith("c10d::")]
        torch.save((len(training.weights), sent), tmp_path / f"{distributed.rank()}.pt")

    assert together(2, run) == [0, 0]
    for number in (0, 1):
        weights, sent = torch.load(tmp_path / f"{number}.pt")
        # one bucket, as all weights together are smaller than 25 MB; which of them were used; the loss
        assert weights == 4 and sent == ["c10d::allreduce_"] * 3


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
def test_a_process_that_has_lost_another_says_so_in_one_line(tmp_path):
    def die(step, samples):
        if step == 4 and samples.start >= 4:  # of the second process, between two micro-batches
            os._exit(7)

    def run():
        training = Training(SmallTask(at=die), small_settings(batch=2, gradient_accumulation=2), CPU, tmp_path / "state.pt")
        begun = time.monotonic()
        with pytest.raises(ConnectionError, match="process 0 of 2 has lost another one, which has ended; start all again") as error:
            list(training.run())
        assert "\n" not in str(error.value) and training.done == 4 and time.monotonic() - begun < 60
        distributed.destroy_distributed()

    assert together(2, run) == [0, 7]
    alone = Training(SmallTask(), small_settings(batch=8), CPU, tmp_path / "state.pt")
    assert [step.done for step in alone.run()] == list(range(4, 11))  # from the last state, of step 3


@pytest.mark.forks
def test_a_fault_of_ones_own_is_no_lost_process():
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, *grads):
            raise RuntimeError("out of luck")

    def run():
        p = nn.Parameter(torch.ones(2))
        ddp = distributed.data_parallel([p])
        with pytest.raises(RuntimeError, match="^out of luck"):
            distributed.backward(Broken.apply(p.sum()), ddp, last=True)

    assert together(2, run) == [0, 0]


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
