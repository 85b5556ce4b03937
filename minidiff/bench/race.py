"""Contenders take turns: each is checked, then come rounds in which every one runs once in a random order, then the table.

All are started at once, each in its own process (contender.py), so that their imports overlap; after that only one works at a time.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from minidiff.bench.budget import Budget
from minidiff.bench.common import BenchRecord
from minidiff.bench.contender import TIMEOUT, Contender, Refused
from minidiff.bench.pipelines import model_folder
from minidiff.bench.ratios import ratio, turns
from minidiff.config import ModelConfig
from minidiff.machine import format_machine
from minidiff.markdown import format_seconds, table_header, table_row

TURN = 1.0  # seconds that a turn takes at least, in as many repeats as that needs
MAX_REPEATS = 100
GRACE = 20.0  # seconds by which a turn that has begun may outlast the budget


@dataclass(frozen=True)
class RaceRules:
    """Who takes part in a race, on which weights, and how long it may take.

    Args:
        contenders: Names; empty for all. Jobs that are not timed, which serve to measure errors, always take part.
        folder: Holds the model of random weights already, for several races; None writes one for this race.
        budget: When it ends, contenders that have not been checked are left out, and the rounds that all have finished count.
    """

    contenders: tuple[str, ...] = ()
    folder: Path | None = None
    budget: Budget = Budget()

    def choose(self, jobs: dict[str, dict]) -> dict[str, dict]:
        """Return the jobs that take part. Raises ValueError for a contender that there is not."""
        if unknown := [name for name in self.contenders if name not in jobs]:
            raise ValueError(f"contender {unknown[0]!r} unknown; choose {', '.join(jobs)}")
        return {name: job for name, job in jobs.items() if not self.contenders or name in self.contenders or job["untimed"]}


def race_models(
    module: str,
    parts: Sequence[tuple[str, str, dict[str, dict]]],
    config: ModelConfig,
    write_inputs: Callable[[Path], None],
    record: BenchRecord,
    rules: RaceRules = RaceRules(),
) -> Iterator[str]:
    """Race on one model of random weights, and yield the machine, then the title and the table of each part.

    Args:
        module: What the contenders run.
        parts: Each a title, a prefix of the names in the record, and the jobs by name; they are told the folder of the model.
        config: Of the model.
        write_inputs: Writes what else the contenders read into that folder.
        record: Where numbers are kept as they come in; its settings have the rounds.
        rules: Who takes part, on which weights, how long.
    """
    yield format_machine(record.values["machine"])
    with nullcontext(rules.folder) if rules.folder else model_folder(config) as folder:
        write_inputs(folder)
        for title, prefix, jobs in parts:
            yield title
            jobs = {name: job | {"folder": str(folder)} for name, job in rules.choose(jobs).items()}
            yield from race(module, jobs, record.values["settings"]["rounds"], record, prefix, rules.budget)
    record.finish()


def race(
    module: str, jobs: dict[str, dict], rounds: int, record: BenchRecord, part: str = "", budget: Budget = RaceRules.budget
) -> Iterator[str]:
    """Check every contender, time rounds of those that passed, and yield lines of Markdown.

    Errors are root mean squares of the difference to the first float32 job that ran, relative to that of its result. A check may take at
    most half of the time that is left, so that the contenders behind it, and the rounds, have some.

    Args:
        module: What the contenders run.
        jobs: By name; the first is the one to compare with. A job's folder is temporary and not recorded.
        rounds: Of all contenders.
        record: Where numbers are kept as they come in.
        part: A prefix of the names in the record.
        budget: The time that it may take.
    """
    found, given = {}, {}
    with tempfile.TemporaryDirectory(prefix="minidiff-bench-") as folder, ExitStack() as stack:
        path = Path(folder) / "result.npy"
        contenders = {name: stack.enter_context(Contender(module, job)) for name, job in jobs.items()}
        for name, job in jobs.items():
            told = {key: value for key, value in job.items() if key != "folder"}
            try:
                found[name] = ask_in_time(contenders[name], budget, result=str(path)) | {"job": told, "rounds": []}
                given[name] = torch.from_numpy(np.load(path))
            except Refused as reason:
                contenders.pop(name).close()
                found[name] = {"job": told, "refused": str(reason)}
            record.keep(part + name, found[name])
        exact = next((name for name in given if jobs[name]["dtype"] == "float32"), None)
        for name in given if exact else ():
            found[name]["error"] = relative_error(given[name], given[exact])
        for name in [name for name in contenders if jobs[name]["untimed"]]:
            contenders.pop(name).close()
        for _, name in turns(list(contenders), rounds):
            if not budget.left:
                break
            if "refused" not in found[name]:
                take_turn(contenders[name], found[name], budget)
                record.write()
        keep_whole_rounds([found[name]["rounds"] for name in contenders if "refused" not in found[name]])
        record.write()
    yield from format_table(found, next(iter(jobs)))


def ask_in_time(contender: Contender, budget: Budget, **request: object) -> dict:
    """Ask for a check within half of the time that is left. Raises Refused, also if there is no time."""
    if not budget.left:
        raise Refused("no time was left")
    return contender.ask(limit=min(TIMEOUT, budget.left / 2), do="check", **request)


def keep_whole_rounds(rounds: Sequence[list]) -> None:
    """Drop what some contenders have of a round that others have not finished: ratios compare the same rounds."""
    least = min(map(len, rounds), default=0)
    for own in rounds:
        del own[least:]


def take_turn(contender: Contender, result: dict, budget: Budget) -> None:
    """Add the seconds of a contender's turn. One that fails now is out of the race."""
    repeats = min(MAX_REPEATS, max(1, round(TURN / result["seconds"]))) if "seconds" in result else 1
    try:
        answer = contender.ask(limit=min(TIMEOUT, budget.left + GRACE), do="time", repeats=repeats)
        result["rounds"].append(answer["seconds"])
    except Refused as reason:
        result["refused"] = str(reason)


def relative_error(result: Float[Tensor, "*shape"], exact: Float[Tensor, "*other"]) -> float:
    """Return the RMS of the difference over that of the exact result. Raises ValueError for different shapes."""
    if result.shape != exact.shape:
        raise ValueError(f"results of shape {tuple(result.shape)} and {tuple(exact.shape)}: the contenders did not do the same")
    return float((result.double() - exact.double()).square().mean().sqrt() / exact.double().square().mean().sqrt())


def format_table(results: dict[str, dict], first: str) -> Iterator[str]:
    """Yield one line per contender: time, how many times as fast as the first, peak memory and its share of the first's, error."""
    yield table_header(["", "time", f"times as fast as {first}", "peak memory", "share", "error", "three runs"])
    base = results[first]
    for name, result in results.items():
        if "refused" in result:
            yield table_row([name, f"refused: {result['refused']}", "", "", "", "", ""])
            continue
        compared = result["rounds"] and len(result["rounds"]) == len(base.get("rounds", ()))
        memory, whole = result.get("memory"), base.get("memory")
        yield table_row(
            [
                name,
                format_seconds(median(result["rounds"])) if result["rounds"] else "",
                ratio(base["rounds"], result["rounds"]) if compared else "",
                f"{memory / 1e9:.2f} GB" if memory else "",
                f"{memory / whole:.2f}" if memory and whole else "",
                f"{result['error']:.1e}" if "error" in result else "",
                {True: "equal", False: "differ", None: ""}[result.get("bit_equal")],
            ]
        )
