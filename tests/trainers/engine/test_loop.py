"""The training loop: stopped in any way and taken up again it ends with the very same weights; a batch is the same however it is made."""

import os
import signal
import warnings

import pytest
import torch
from torch import nn

from minidiff.trainers.engine import loop
from minidiff.trainers.engine.loop import LossWatch, Training, compute_loss, half_precision, randn_per_sample, rng_for, train, with_compile
from minidiff.trainers.engine.optimizer import learning_rate
from tests.small_task import CPU, SmallTask, forked, small_settings, together


def flat(state, name=""):
    """A nested state as (name, value) pairs."""
    if isinstance(state, dict | list):
        for key, value in state.items() if isinstance(state, dict) else enumerate(state):
            yield from flat(value, f"{name}.{key}")
    else:
        yield name, state


def assert_same_state(a, b):
    a, b = (dict(flat(state)) for state in (a, b))
    assert a.keys() == b.keys()
    for name, value in a.items():
        same = torch.equal(value, b[name]) if isinstance(value, torch.Tensor) else value == b[name]
        assert same, name


def finished(settings, path=None, **task) -> Training:
    training = Training(SmallTask(**task), settings, CPU, path)
    list(training.run())
    return training


def weights(training):
    return torch.cat([p.detach().flatten() for p in training.weights.values()])


def test_it_learns_and_tells_each_step():
    settings = small_settings(steps=150, batch=16)
    steps = list(train(SmallTask(), settings, CPU))
    assert [step.done for step in steps] == list(range(1, 151)) and all(step.steps == 150 for step in steps)
    assert [step.lr for step in steps] == [learning_rate(i, settings) for i in range(150)]
    assert sum(step.loss for step in steps[-10:]) < 0.3 * sum(step.loss for step in steps[:10])


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_a_run_that_is_left_and_taken_up_again_is_bit_identical(tmp_path, k, precision):
    settings, path = small_settings(precision=precision), tmp_path / "state.pt"
    whole = finished(settings, dropout=0.3)
    walk = train(SmallTask(dropout=0.3), settings, CPU, path)
    for _ in range(k):
        next(walk)
    walk.close()
    torch.manual_seed(k)  # what the global generator holds is nobody's business
    resumed = Training(SmallTask(dropout=0.3), settings, CPU, path)
    assert [step.done for step in resumed.run()] == list(range(k + 1, 11))
    assert_same_state(resumed.state_dict(), whole.state_dict())


def test_ctrl_c_in_a_step_saves_the_last_whole_step(tmp_path):
    def interrupt(step, samples):
        if step == 4 and samples.start == 4:  # half of the batch is done
            raise KeyboardInterrupt

    settings, path = small_settings(gradient_accumulation=2), tmp_path / "state.pt"
    with pytest.raises(KeyboardInterrupt):
        finished(settings, path, at=interrupt)
    assert torch.load(path, weights_only=True)["i"] == 4
    assert_same_state(finished(settings, path).state_dict(), finished(settings).state_dict())


def test_ctrl_c_while_weights_move_waits_until_they_have_moved(tmp_path, monkeypatch):
    settings, path = small_settings(), tmp_path / "state.pt"
    training = Training(SmallTask(), settings, CPU, path)
    step = training.optimizers[0].step

    def interrupted_step():
        if training.done == 5:
            signal.raise_signal(signal.SIGINT)
        step()

    monkeypatch.setattr(training.optimizers[0], "step", interrupted_step)
    with pytest.raises(KeyboardInterrupt):
        list(training.run())
    assert torch.load(path, weights_only=True)["i"] == 6
    assert_same_state(finished(settings, path).state_dict(), finished(settings).state_dict())


@pytest.mark.forks
@pytest.mark.parametrize("where", ["in a step", "while it writes its state"])
def test_a_run_that_is_killed_goes_on_from_its_last_save(tmp_path, monkeypatch, where):
    settings, path = small_settings(), tmp_path / "state.pt"

    def kill(step, samples):
        if step == 8 and where == "in a step":
            os.kill(os.getpid(), signal.SIGKILL)

    def run():
        write, written = torch.save, []

        def killed(state, file):
            written.append(state)
            if len(written) == 3 and where != "in a step":
                file.write(b"half")
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
            write(state, file)

        torch.save = killed
        finished(settings, path, at=kill)

    assert forked(run) == -signal.SIGKILL
    assert torch.load(path, weights_only=True)["i"] == 6
    assert_same_state(finished(settings, path).state_dict(), finished(settings).state_dict())


def test_a_finished_run_takes_no_step_and_has_its_averages(tmp_path):
    path = tmp_path / "state.pt"
    first = finished(small_settings(), path)
    again = Training(SmallTask(), small_settings(), CPU, path)
    assert list(again.run()) == []
    assert_same_state(again.state_dict(), first.state_dict())
    assert not torch.equal(again.ema["net"].mean["0.weight"], again.weights["net.0.weight"])


@pytest.mark.parametrize(("batch", "gradient_accumulation"), [(4, 2), (2, 4), (1, 8)])
def test_accumulation_is_one_batch(batch, gradient_accumulation):
    seen = []
    parts = finished(
        small_settings(batch=batch, gradient_accumulation=gradient_accumulation), at=lambda step, samples: seen.append((step, *samples))
    )
    assert [number for step, *numbers in seen if step == 3 for number in numbers] == list(range(8))
    # ten AdamW steps of float32 rounding; a step moves a weight by up to 0.03
    torch.testing.assert_close(weights(parts), weights(finished(small_settings(batch=8))), rtol=1e-4, atol=1e-5)


@pytest.mark.forks
def test_two_processes_are_one_with_the_doubled_batch(tmp_path):
    settings, path = small_settings(batch=2, gradient_accumulation=2), tmp_path / "state.pt"

    def run():
        training = Training(SmallTask(), settings, CPU, path)
        losses = [step.loss.item() for step in training.run()]
        torch.save((weights(training), losses), tmp_path / f"{loop.distributed.rank()}.pt")

    assert together(2, run) == [0, 0]
    alone = Training(SmallTask(), small_settings(batch=8), CPU)
    losses = [step.loss.item() for step in alone.run()]
    for number in (0, 1):
        moved, told = torch.load(tmp_path / f"{number}.pt")
        torch.testing.assert_close(moved, weights(alone), rtol=1e-4, atol=1e-5)  # float32 rounding, as above
        assert told == pytest.approx(losses, rel=1e-4)
    # and what they saved is the run of one process with that batch
    assert Training(SmallTask(), small_settings(batch=8), CPU, path).done == 10


@pytest.mark.forks
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_goes_on_with_another_number_of_processes(tmp_path, before, after):
    path = tmp_path / "state.pt"

    def run(count):
        settings = small_settings(batch=2, gradient_accumulation=4 // count, save_every=5)

        def part():
            training = Training(SmallTask(), settings, CPU, path)
            for step in training.run():
                if step.done == 5 and count == before:
                    break
            torch.save(weights(training), tmp_path / f"{count}.{loop.distributed.rank()}.pt")

        return together(count, part)

    assert run(before) == [0] * before and torch.load(path, weights_only=True)["i"] == 5
    assert run(after) == [0] * after and torch.load(path, weights_only=True)["i"] == 10
    whole = finished(small_settings(batch=8, save_every=5))
    for rank in range(after):
        moved = torch.load(tmp_path / f"{after}.{rank}.pt")
        torch.testing.assert_close(moved, weights(whole), rtol=1e-4, atol=1e-5)  # float32 rounding, as above
    ema = torch.load(path, weights_only=True)["ema"]["net"]["mean"]
    for name, mean in whole.ema["net"].mean.items():
        torch.testing.assert_close(ema[name], mean, rtol=1e-4, atol=1e-5)


def test_the_state_of_another_run_is_refused_and_the_difference_named(tmp_path):
    path = tmp_path / "state.pt"
    finished(small_settings(), path)
    before = path.read_bytes()

    def refused(said, settings=small_settings(), task=None):
        with pytest.raises(ValueError, match=said):
            Training(task or SmallTask(), settings, CPU, path)

    refused(r"learning_rate 0.03, now 0.5\); choose another place", small_settings(learning_rate=0.5))
    refused("steps 10, now 20; schedule 'cosine', now 'linear'", small_settings(steps=20, schedule="linear"))
    refused("samples a step 4, now 8", small_settings(gradient_accumulation=2))
    refused("net.0.weight '8x3', now '9x3'", task=SmallTask(width=9))
    other = SmallTask()
    other.about = {"method": "large"}
    refused("method 'small', now 'large'", task=other)
    assert path.read_bytes() == before


def test_how_a_batch_is_made_and_how_often_saved_may_change_between(tmp_path):
    path = tmp_path / "state.pt"
    walk = train(SmallTask(), small_settings(), CPU, path)
    next(walk)
    walk.close()
    assert Training(SmallTask(), small_settings(batch=2, gradient_accumulation=2, save_every=7, checkpointing=True), CPU, path).done == 1


def test_weights_that_are_not_finite_do_not_replace_a_good_state(tmp_path):
    path, task = tmp_path / "state.pt", SmallTask()
    training = Training(task, small_settings(), CPU, path)
    walk = training.run()
    for _ in range(5):
        next(walk)
    training.optimizers[0].state[task.net[0].weight]["exp_avg"].fill_(torch.nan)  # the loss of the next step is finite, its weights are not
    with pytest.raises(ValueError, match="is not finite after step 6, the state of step 3 is kept: lower the learning rate"):
        list(walk)
    assert torch.load(path, weights_only=True)["i"] == 3


def test_what_cannot_be_trained_is_refused():
    task = SmallTask()
    task.net[0].half()
    with pytest.raises(ValueError, match="net.0.weight is torch.float16: what is trained must be float32"):
        Training(task, small_settings(), CPU)
    task.net.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing in net requires a gradient"):
        Training(task, small_settings(), CPU)


def test_frozen_weights_stay_and_stand_in_no_state():
    task = SmallTask()
    task.net[0].requires_grad_(False).half().float()
    before = task.net[0].weight.clone()
    training = Training(task, small_settings(), CPU)
    list(training.run())
    assert torch.equal(task.net[0].weight, before)
    assert training.state_dict()["weights"].keys() == {"net.3.weight", "net.3.bias"}
    assert training.ema["net"].mean.keys() == {"3.weight", "3.bias"}


def test_precision_is_autocast_and_trained_weights_stay_float32():
    seen = {}
    for precision in ("auto", "float32", "bfloat16", "float16"):
        training = finished(small_settings(precision=precision, steps=2), at=lambda *_: seen.setdefault(precision, enabled()))
        assert all(p.dtype == torch.float32 and p.grad.dtype == torch.float32 for p in training.weights.values())
    assert seen == {"auto": None, "float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}  # auto: on a CPU


def enabled():
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None


@pytest.mark.parametrize(("native", "expected"), [(True, torch.bfloat16), (False, torch.float16)])
def test_auto_is_bfloat16_on_gpus_that_compute_in_it_and_float16_on_those_that_emulate_it(monkeypatch, native, expected):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native or including_emulation)
    assert half_precision("auto", torch.device("cuda")) == expected
    assert half_precision("auto", CPU) is None


def test_with_float16_a_step_that_overflows_is_left_out_and_the_scale_is_halved():
    class Steep(SmallTask):
        def loss(self, step, samples):
            return super().loss(step, samples) * (1e30 if step == 0 else 1)

    training = Training(Steep(), small_settings(precision="float16", ema_decay=None), CPU)
    walk, before = training.run(), weights(training)
    next(walk)
    assert torch.equal(weights(training), before) and training.scaler.get_scale() == 2**15
    next(walk)
    assert not torch.equal(weights(training), before)
    assert training.state_dict()["scaler"]["scale"] == 2**15


@pytest.mark.parametrize("clip", [1e-3, 1e3, None])
def test_the_whole_gradient_is_clipped_to_its_norm(clip):
    class Plain(SmallTask):
        def optimizers(self, settings):
            return (torch.optim.SGD(self.net.parameters(), settings.learning_rate),)

    settings = small_settings(max_grad_norm=clip, learning_rate=1.0, warmup_steps=0, schedule="constant")
    training = Training(Plain(), settings, CPU)
    before = weights(training)
    loss = loop.compute_loss(training.task, 0, range(4), settings, CPU)
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(training.weights.values()))]).norm().item()
    next(training.run())
    assert (weights(training) - before).norm().item() == pytest.approx(min(norm, clip or norm), rel=1e-3)  # clip_grad_norm_ adds 1e-6


def test_a_group_with_a_scale_learns_at_that_share_of_the_rate():
    training = Training(SmallTask(), small_settings(), CPU)
    step = next(training.run())
    assert [group["lr"] for group in training.optimizers[0].param_groups] == [0.5 * step.lr, step.lr]


def test_the_global_generators_are_left_as_they_were():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    finished(small_settings(), dropout=0.5)
    assert torch.equal(torch.get_rng_state(), before)


def test_of_several_gpus_a_step_keeps_the_random_state_of_its_own_alone(monkeypatch):
    kept, restored, gpu, task = [], [], torch.device("cuda", 1), SmallTask(dropout=0.5)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda device: kept.append(device) or device)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, device: restored.append((state, device)))
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch's, where it copies the states of several
        compute_loss(task, 0, range(2), small_settings(precision="float32"), gpu)
        assert kept == [gpu] and restored == [(gpu, gpu)]
        with loop.with_seed(0):
            pass
    assert kept == [gpu]


def test_every_step_and_sample_has_draws_of_its_own():
    drawn = {rng_for(*key).random() for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}
    assert len(drawn) == 4
    first, second = randn_per_sample([rng_for(0, 0, 3), rng_for(0, 0, 4)], (2, 5))
    assert torch.equal(first, randn_per_sample([rng_for(0, 0, 3)], (2, 5))[0]) and not torch.equal(first, second)


def test_checkpointing_and_compile_mean_the_tasks_networks(monkeypatch):
    task, given = SmallTask(), []
    task.networks = (nn.Linear(1, 1),)
    with_checkpointing = loop.with_checkpointing
    monkeypatch.setattr(loop, "with_checkpointing", lambda networks, on: given.append((networks, on)) or with_checkpointing(networks, on))
    next(train(task, small_settings(checkpointing=True), CPU))
    assert given == [(task.networks, True)]


@pytest.mark.parametrize(
    ("device", "accumulation", "mode"), [("cuda", 1, "reduce-overhead"), ("cuda", 2, "default"), ("cpu", 1, "default")]
)
def test_compiled_networks_are_cuda_graphs_on_a_gpu_unless_gradients_accumulate(monkeypatch, device, accumulation, mode):
    modes = []
    monkeypatch.setattr(nn.Module, "compile", lambda module, *, mode, dynamic: modes.append(mode))
    with with_compile([nn.Linear(1, 1)], torch.device(device), small_settings(compile=True, gradient_accumulation=accumulation)):
        assert modes == [mode]


@pytest.mark.slow
@pytest.mark.forks
def test_compiled_networks_learn_the_same_in_two_processes(tmp_path):
    """Slow: a C++ compiler is at work."""

    def run():
        training = finished(small_settings(batch=2, gradient_accumulation=2, compile=True))
        torch.save(weights(training), tmp_path / f"{loop.distributed.rank()}.pt")

    assert together(2, run) == [0, 0]
    alone = weights(finished(small_settings(batch=8)))
    for number in (0, 1):
        torch.testing.assert_close(
            torch.load(tmp_path / f"{number}.pt"), alone, rtol=1e-3, atol=1e-4
        )  # ten AdamW steps after other rounding


@pytest.mark.slow
def test_compiled_networks_learn_the_same():
    """Slow: a C++ compiler is at work."""
    a, b = finished(small_settings(compile=True)), finished(small_settings())
    torch.testing.assert_close(weights(a), weights(b), rtol=1e-3, atol=1e-4)  # ten AdamW steps after other rounding
    assert a.task.net._compiled_call_impl is None


# --- a loss that is not finite, and more steps ------------------------------------------------------------------------


class Diverging(SmallTask):
    """Its loss is NaN, or infinite, from a step on."""

    def __init__(self, step, factor=float("nan")):
        super().__init__()
        self.step, self.factor = step, factor

    def loss(self, step, samples):
        return super().loss(step, samples) * (self.factor if step >= self.step else 1)


@pytest.mark.parametrize("factor", [float("nan"), float("inf")])
def test_a_run_stops_at_the_first_loss_that_is_not_finite(tmp_path, factor):
    training = Training(Diverging(4, factor), small_settings(), CPU, tmp_path / "state.pt")
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step 5: .*lower the learning rate \(0\.0\d+\)"):
        list(training.run())
    assert training.done == 4 and all(p.isfinite().all() for p in training.weights.values())
    assert torch.load(tmp_path / "state.pt", weights_only=True)["i"] == 3  # what was saved before stays


def test_a_loss_that_a_gpu_gives_later_is_looked_at_later_without_waiting():
    class Event:
        ready = False

        def query(self):
            return self.ready

        def synchronize(self):
            self.ready = True

    watch, event = LossWatch(), Event()
    watch.waiting.append((3, 0.1, torch.tensor(float("nan")), event))
    watch.check()  # the GPU is still at it
    watch.add(4, torch.tensor(1.0), 0.1)
    assert len(watch.waiting) == 2
    with pytest.raises(ValueError, match="at step 3"):
        watch.check(wait=True)
    assert event.ready and not watch.waiting


def test_a_finished_run_may_be_given_more_steps_and_ends_as_a_longer_one(tmp_path):
    constant = {"schedule": "constant", "save_every": 100}
    finished(small_settings(steps=6, **constant), tmp_path / "state.pt")
    longer = Training(SmallTask(), small_settings(steps=9, **constant), CPU, tmp_path / "state.pt")
    assert longer.extended and [step.done for step in longer.run()] == [7, 8, 9]
    assert_same_state(longer.state_dict(), finished(small_settings(steps=9, **constant)).state_dict())
    with pytest.raises(ValueError, match=r"holds another run \(steps 9, now 5"):
        Training(SmallTask(), small_settings(steps=5, **constant), CPU, tmp_path / "state.pt")


def test_an_unfinished_run_keeps_its_number_of_steps_and_a_schedule_that_depends_on_it_is_said(tmp_path):
    walk = train(SmallTask(), small_settings(steps=6), CPU, tmp_path / "state.pt")
    next(walk)
    walk.close()
    with pytest.raises(ValueError, match=r"holds another run \(steps 6, now 9"):
        Training(SmallTask(), small_settings(steps=9), CPU, tmp_path / "state.pt")
    finished(small_settings(steps=6), tmp_path / "state.pt")
    with pytest.warns(UserWarning, match="the learning rate goes on as in a run of 9 steps"):
        Training(SmallTask(), small_settings(steps=9), CPU, tmp_path / "state.pt")
