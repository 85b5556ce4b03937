"""Prove and measure everything on one GPU in a few minutes: `minidiff bench gpu --minutes 8 --out DIR`.

    ceilings      what a matrix product and a copy reach here: the floors of all that follows
    kernels       every kernel against float64, three times          |
    gpu tests     the tests that need a GPU                          |  correctness.py
    whole model   text encoder, U-Net and decoder against the CPU    |
    attention     Stable Diffusion 1 at 512 pixels, each way
    step, image, lora, bundled       a U-Net step, a picture, a training step of a LoRA and of the bundled model

Each stage may take its share of the time that is left; what it does not need goes to those behind it, and one that the time does not reach
is skipped by name. Every number is on the disk as soon as it is known: gpu.json has the stages, the others a file each; gpu.md is made
from these files. All models are of random weights, written once into one folder.

On a CPU all of it runs in miniature, as a rehearsal: the kernels in Triton's interpreter, the bundled model's shapes, a round each. It
needs nothing but PyTorch and what minidiff imports for a model: `python -m minidiff.bench.gpu` also runs where tyro, open_clip or diffusers
are missing, and leaves out by name what needs them.
"""

import argparse
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import monotonic

import torch

import minidiff
from minidiff.bench.attention import CONTENDERS, bench_attention
from minidiff.bench.attention_cases import list_cases
from minidiff.bench.budget import Budget
from minidiff.bench.bundled_rate import rate_jobs
from minidiff.bench.clocks import ClockWatch, highest_clock, query
from minidiff.bench.common import BenchRecord, model_config
from minidiff.bench.contender import TIMEOUT, Contender, Refused, format_error
from minidiff.bench.floors import count_decoder, count_unet, floor_seconds, measure_ceilings
from minidiff.bench.gpu_report import format_report
from minidiff.bench.image import bench_image
from minidiff.bench.pipelines import make_model_jobs, make_step_jobs, model_folder
from minidiff.bench.race import RaceRules, race
from minidiff.bench.step import bench_step
from minidiff.bench.train import bench_train, make_train_jobs
from minidiff.config import ModelConfig
from minidiff.files import write_text

# The tests that need a GPU and take seconds each.
GPU_TESTS = (
    "tests/kernels/test_self_attention.py",
    "tests/kernels/test_cross_attention.py",
    "tests/bench/test_attention_worker.py",
    "tests/test_cuda_graph.py",
    "tests/trainers/engine/test_prefetch.py",
    "tests/weights_loader/test_load.py",
)
RESULT = re.compile(r"^(\S+::.*?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")  # a line of pytest -v
ON_GPU = ("minidiff", "cudnn", "flash", "efficient", "flex")  # at attention
ON_CPU = ("minidiff", "math")
NONE_CHOSEN = "none of the chosen contenders takes part"


@dataclass(frozen=True)
class Plan:
    """What is measured, and how often.

    model: a name for the cases of attention. config: its shapes. size: pixels a side. steps: of a picture. rounds: of all contenders.
    batch: of the bundled model's training; None is the recipe's. side: of the matrices that are multiplied. copied: bytes.
    """

    model: str
    config: ModelConfig
    size: int
    steps: int
    rounds: int
    batch: int | None
    side: int
    copied: int


def plan_for(device: torch.device) -> Plan:
    """Return Stable Diffusion 1 at 512 pixels for a GPU, the bundled model for a CPU's rehearsal."""
    if device.type == "cuda":
        return Plan("sd1", model_config("sd1"), size=512, steps=50, rounds=10, batch=None, side=8192, copied=2**31)
    config = model_config("bundled")
    return Plan("bundled", config, size=config.image_size, steps=2, rounds=1, batch=4, side=512, copied=2**24)


class GpuRun(AbstractContextManager):
    """A run of all stages: its plan, its folder, and the folder of weights that all contenders read, written when it is first needed."""

    def __init__(self, plan: Plan, device: torch.device, out: Path, contenders: Sequence[str]):
        self.plan, self.device, self.out, self.contenders = plan, device, out, tuple(contenders)
        settings = {"bench": "gpu", "model": str(plan.config), "size": plan.size, "device": str(device), "contenders": list(contenders)}
        self.record = BenchRecord(out / "gpu.json", settings)
        self.record.results.clear()  # every run begins with its first stage
        self.record.values["driver"] = query(device, "driver_version")
        self.stack, self.weights = ExitStack(), None

    def __exit__(self, *error) -> None:
        self.stack.close()

    def folder(self) -> Path:
        """Return the folder with the model of random weights."""
        if self.weights is None:
            self.weights = self.stack.enter_context(model_folder(self.plan.config))
        return self.weights

    def choose(self, jobs: Sequence[str]) -> tuple[str, ...]:
        """Return those of a stage's contenders that were asked for; all if none was named. Raises Refused if there is none."""
        chosen = tuple(name for name in jobs if not self.contenders or name in self.contenders)
        if not chosen:
            raise Refused(NONE_CHOSEN)
        return chosen

    def rules(self, jobs: dict[str, dict], budget: Budget) -> RaceRules:
        """Return the rules of a race among those of the jobs that were asked for."""
        chosen = self.choose([name for name, job in jobs.items() if not job["untimed"]])
        return RaceRules(chosen if self.contenders else (), self.folder(), budget)

    def keep(self, stage: str, **values: object) -> None:
        """Add to what is known of a stage, and write it."""
        self.record.keep(stage, self.record.results.get(stage, {}) | values)

    def keep_floor(self, stage: str, operations: float) -> None:
        """Keep the floor of a stage's work, if the ceilings are known."""
        if "products" in (ceilings := self.record.results.get("ceilings", {})):
            seconds, bound = floor_seconds(ceilings, operations)
            self.keep(stage, operations=operations, floor=seconds, bound=bound)


def bench_gpu(
    out: Path, minutes: float = 8.0, device: str = "cuda", contenders: Sequence[str] = (), plan: Plan | None = None
) -> Iterator[str]:
    """Run all stages within the time, and yield lines as they come; the last is the report, which is also in gpu.md.

    A stage that fails is recorded with its reason and stops no other. Raises ValueError for what cannot be run.

    Args:
        out: A folder, made if need be.
        minutes: For everything.
        device: A GPU, or "cpu" for the rehearsal.
        contenders: Only these, of any stage; all by default.
        plan: None is `plan_for` the device.
    """
    where = torch.device(device)
    if not minutes > 0:
        raise ValueError(f"minutes {minutes:g}: give more than 0")
    if where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {device}: PyTorch sees no GPU here; --device cpu runs the rehearsal")
    if unknown := [name for name in contenders if name not in (known := all_contenders(where))]:
        raise ValueError(f"contender {unknown[0]!r} unknown; choose {', '.join(known)}")
    total = Budget(60 * minutes)
    out.mkdir(parents=True, exist_ok=True)
    with GpuRun(plan or plan_for(where), where, out, contenders) as run:
        for i, (name, (_, stage)) in enumerate(STAGES.items()):
            shares = [share for share, _ in list(STAGES.values())[i:]]
            if total.left:
                yield f"\n## {name}\n"
                yield from run_stage(run, name, stage, total.part(shares[0] / sum(shares)))
            else:
                run.keep(name, status="skipped: the time was over")
                yield f"\nskipped, the time was over: {name}"
            write_text(out / "gpu.md", format_report(out) + "\n")
        run.record.finish()
    yield "\n" + format_report(out)


def run_stage(run: GpuRun, name: str, stage: "Stage", budget: Budget) -> Iterator[str]:
    """Run a stage and keep how it ended, how long it took, and the GPU's clocks meanwhile.

    Args:
        run: Of all stages.
        name, stage: A line of STAGES.
        budget: Its share of the time.
    """
    began = monotonic()
    run.keep(name, status="begun")
    with ClockWatch(run.device) as watch:
        try:
            yield from stage(run, budget)
            status = "done" if budget.left else "cut short: its time was over"
        except Refused as reason:
            status = f"left out: {reason}"
        except Exception as error:  # whatever it is, the stages behind it can still be measured
            status = f"failed: {format_error(error)}"
    run.keep(name, status=status, seconds=monotonic() - began, clocks=watch.read())
    yield f"\n{name}: {status}"


def all_contenders(device: torch.device) -> list[str]:
    """Return the names of all contenders of all stages."""
    jobs = [
        make_step_jobs(str(device), True),
        make_model_jobs(str(device), True),
        make_train_jobs(str(device), True),
        rate_jobs(str(device)),
    ]
    return list(dict.fromkeys([*(name for one in jobs for name in one), *CONTENDERS]))


# -------------------------------------------------------------------------------------------------------------- stages


def ceilings(run: GpuRun, budget: Budget) -> Iterator[str]:
    """Measure what this device reaches at best."""
    found = measure_ceilings(run.device, torch.bfloat16, run.plan.side, run.plan.copied, highest_clock(run.device))
    run.keep("ceilings", **found)
    yield f"matrix product {found['products'] or 0:.3g} operations/s, copy {found['bytes'] or 0:.3g} bytes/s"


def kernels(run: GpuRun, budget: Budget) -> Iterator[str]:
    """Check every kernel against float64; on a CPU in Triton's interpreter."""
    job = {"what": "kernels", "miniature": run.device.type == "cpu", "library": "minidiff", "device": str(run.device), "dtype": "float32"}
    yield from take_checks(run, "kernels", job, budget)


def whole_model(run: GpuRun, budget: Budget) -> Iterator[str]:
    """Check the parts of the model against the CPU."""
    job = {"what": "model", "size": run.plan.size, "folder": str(run.folder())}
    yield from take_checks(run, "whole model", job | {"library": "minidiff", "device": str(run.device), "dtype": "float32"}, budget)


def take_checks(run: GpuRun, stage: str, job: dict, budget: Budget) -> Iterator[str]:
    """Ask for one check after the other, and keep each. Those that the time does not reach are named.

    Args:
        run, budget: As of a stage.
        stage: Its name.
        job: Of correctness.py.
    """
    checks: dict[str, dict] = {}
    environment = {"TRITON_INTERPRET": "1"} if run.device.type == "cpu" else {}
    with Contender("minidiff.bench.correctness", job, environment) as worker:
        names: list[str] = worker.ask(limit=min(TIMEOUT, budget.left), do="list")["names"]
        for name in names:
            if not budget.left:
                break
            try:
                checks[name] = worker.ask(limit=min(TIMEOUT, budget.left), do="check", name=name)
            except Refused as reason:
                checks[name] = {"refused": str(reason)}
                worker.restart_if_dead()
            run.keep(stage, checks=checks, count=len(names))
    passed = sum(check.get("ok", False) for check in checks.values())
    yield f"{passed} of {len(names)} checks passed"
    yield from (f"not passed: {name}: {check.get('refused') or check}" for name, check in checks.items() if not check.get("ok"))
    yield from (f"not reached: {name}" for name in names if name not in checks)


def gpu_tests(run: GpuRun, budget: Budget) -> Iterator[str]:
    """Run the tests that need a GPU, without the type checks of the test suite; on a CPU all of them are skipped."""
    root = Path(minidiff.__file__).parents[1]
    if not is_installed("pytest"):
        raise Refused("pytest is not installed")
    if missing := [path for path in GPU_TESTS if not (root / path).exists()]:
        raise Refused(f"{missing[0]} is not here; run it from a checkout")
    options = ["-v", "-m", "gpu", "-o", "addopts=", "-p", "no:cacheprovider", "--color=no", "--tb=line"]
    command = [sys.executable, "-m", "pytest", *options, *GPU_TESTS]
    with tempfile.TemporaryFile("w+") as output:
        paths = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
        try:
            subprocess.run(command, cwd=root, stdout=output, stderr=output, timeout=budget.left, check=False, env=environment)
        except subprocess.TimeoutExpired:
            yield "cut short: its time was over"
        output.seek(0)
        lines = output.read().splitlines()
    tests = {found[1]: found[2].lower() for line in lines if (found := RESULT.match(line))}
    failed = [name for name, result in tests.items() if result in ("failed", "error")]
    ended = [] if tests and not failed else [line for line in lines if line.strip()][-20:]
    run.keep("gpu tests", tests=tests, **({"output": ended} if ended else {}))
    counts = {result: list(tests.values()).count(result) for result in tests.values()}
    yield ", ".join(f"{count} {result}" for result, count in counts.items()) or "no test ran"
    yield from (f"failed: {name}" for name in failed)


def attention(run: GpuRun, budget: Budget) -> Iterator[str]:
    """Measure attention at every shape of the model."""
    contenders = run.choose(CONTENDERS if run.contenders else ON_GPU if run.device.type == "cuda" else ON_CPU)
    cases = list_cases(run.plan.model, run.plan.config, run.plan.size, 2, "bfloat16")
    rounds, out = min(5, run.plan.rounds), run.out / "attention.json"
    yield from bench_attention(out, rounds, device=str(run.device), contenders=contenders, cases=cases, kinds=("normal",), budget=budget)


def step(run: GpuRun, budget: Budget) -> Iterator[str]:
    """Measure a U-Net step of one picture with guidance."""
    against = yield from rivals(run, "step", make_step_jobs)
    rules = run.rules(make_step_jobs(str(run.device), against), budget)
    run.keep_floor("step", count_unet(run.plan.config, run.plan.size, 2))
    plan = run.plan
    yield from bench_step(against, run.out / "step.json", plan.rounds, plan.config, plan.size, str(run.device), rules=rules)


def image(run: GpuRun, budget: Budget) -> Iterator[str]:
    """Measure a whole picture."""
    against = yield from rivals(run, "image", make_model_jobs)
    rules = run.rules(make_model_jobs(str(run.device), against), budget)
    plan, size = run.plan, run.plan.size
    run.keep_floor("image", plan.steps * count_unet(plan.config, size, 2) + count_decoder(plan.config, size))
    rounds = max(1, plan.rounds // 2)
    yield from bench_image(against, run.out / "image.json", rounds, plan.config, size, plan.steps, str(run.device), rules=rules)


def lora(run: GpuRun, budget: Budget) -> Iterator[str]:
    """Measure a training step of a LoRA."""
    against = yield from rivals(run, "lora", make_train_jobs, ("diffusers", "peft"))
    rules = run.rules(make_train_jobs(str(run.device), against), budget)
    run.keep_floor("lora", count_unet(run.plan.config, run.plan.size, 1, backward=True))
    plan = run.plan
    yield from bench_train(against, run.out / "lora.json", plan.rounds, plan.config, plan.size, ("lora",), str(run.device), rules=rules)


def bundled(run: GpuRun, budget: Budget) -> Iterator[str]:
    """Measure training steps of the bundled model."""
    jobs = rate_jobs(str(run.device), run.plan.batch)
    chosen = run.choose(list(jobs))
    record = BenchRecord(run.out / "bundled.json", {"bench": "bundled", "rounds": run.plan.rounds, "device": str(run.device)})
    samples = next(iter(jobs.values()))["batch"]
    config = model_config("bundled")
    run.keep_floor("bundled", count_unet(config, config.image_size, samples, backward=True, weights=True))
    run.keep("bundled", samples=samples)
    yield from race("minidiff.bench.bundled_rate", {name: jobs[name] for name in chosen}, run.plan.rounds, record, budget=budget)
    record.finish()


def rivals(run: GpuRun, stage: str, jobs: Callable[[str, bool], dict[str, dict]], needed: Sequence[str] = ("diffusers",)) -> Iterator[str]:
    """Say which contenders are left out since their packages are missing. The generator's return value is whether rivals take part.

    Args:
        run: As of a stage.
        stage: Its name.
        jobs: Returns those of a device, with and without rivals.
        needed: Packages of the rivals.
    """
    missing = [package for package in needed if not is_installed(package)]
    if not missing:
        return True
    device = str(run.device)
    names = [name for name in jobs(device, True) if name not in jobs(device, False)]
    run.keep(stage, left_out=dict.fromkeys(names, f"{missing[0]} is not installed"))
    yield f"left out, {missing[0]} is not installed: {', '.join(names)}"
    return False


def is_installed(package: str) -> bool:
    """Say whether a package can be imported, without importing it."""
    return importlib.util.find_spec(package) is not None


Stage = Callable[[GpuRun, Budget], Iterator[str]]
# In their order, each with its weight when the time that is left is shared out.
STAGES: dict[str, tuple[float, Stage]] = {
    "ceilings": (5, ceilings),
    "kernels": (50, kernels),
    "gpu tests": (50, gpu_tests),
    "whole model": (35, whole_model),
    "attention": (100, attention),
    "step": (80, step),
    "image": (80, image),
    "lora": (60, lora),
    "bundled": (30, bundled),
}


def main(args: Sequence[str] | None = None) -> None:
    """Run from the command line without what the whole `minidiff` command needs."""
    parser = argparse.ArgumentParser(prog="python -m minidiff.bench.gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="for everything")
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--device", default="cuda", help='a GPU, or "cpu" for the rehearsal')
    parser.add_argument("--contender", nargs="+", default=(), help="only these")
    asked = parser.parse_args(args)
    try:
        for line in bench_gpu(asked.out, asked.minutes, asked.device, asked.contender):
            print(line, flush=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
