"""Measure how long attention takes at each of its shapes in Stable Diffusion: `minidiff bench attention`.

    shape -> inputs, float64 results -> each contender: errors, three runs, memory -> rounds in turn -> times, sums of a U-Net step

Contenders are attention() as the model calls it, our kernels, PyTorch's fused attention with each of its backends forced, compiled
FlexAttention, and the six lines by hand. A backend that refuses a shape is shown with its reason. On a GPU, kernels are timed in CUDA
graphs of many launches, with the inputs in the cache (warm) and not (cold); calls from Python are timed separately (eager). Errors come
before speed: each time stands next to our RMS error relative to the best fused kernel's, marked if that is too large.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from itertools import product
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from minidiff.bench.attention_cases import KINDS, AttentionCase, directions, list_cases
from minidiff.bench.attention_worker import SDPA
from minidiff.bench.budget import Budget
from minidiff.bench.common import BenchRecord, check_arguments, model_config
from minidiff.bench.contender import TIMEOUT, Contender, Refused
from minidiff.bench.race import GRACE, ask_in_time, keep_whole_rounds
from minidiff.bench.ratios import Ratio, ratio, turns
from minidiff.machine import format_machine
from minidiff.markdown import format_seconds, table_header, table_row

CONTENDERS = ("minidiff", "triton", *SDPA, "flex", "by hand")
WORKER = "minidiff.bench.attention_worker"
FLEX_TIME_LIMIT = 240  # seconds after which nothing more is compiled by FlexAttention: it takes longer than all others together
SMALL = 1024  # tokens below which it is not tried
ERROR_TOLERANCE = 1.1  # times the best backend's error
FUSED = ("flash", "efficient", "cudnn")  # those that keep no N x L matrix, and so can be no more exact than one pass allows


def bench_attention(
    out: Path | None = None,
    rounds: int = 5,
    models: Sequence[str] = ("sd1", "sd2"),
    sizes: Sequence[int] = (512, 768),
    dtypes: Sequence[str] = ("bfloat16",),
    device: str = "cpu",
    contenders: Sequence[str] = CONTENDERS,
    batch: int = 2,
    cases: Sequence[AttentionCase] | None = None,
    kinds: Sequence[str] = KINDS,
    budget: Budget = Budget(),
) -> Iterator[str]:
    """Measure, and yield the lines of Markdown tables as they come. Raises ValueError for unknown names.

    Args:
        out: A .json file, written after each contender's check and each shape.
        rounds: Of all contenders at each shape.
        models: Names of `model_config`.
        sizes: Pixels a side.
        dtypes: Of the inputs.
        device: Of all contenders.
        contenders: Of CONTENDERS.
        batch: 2 is one picture with guidance.
        cases: In place of those of models, sizes and dtypes.
        kinds: Of inputs, for the errors.
        budget: The time that it may take; shapes that are left when it ends are named.
    """
    check_arguments(rounds, out)
    if unknown := [name for name in contenders if name not in CONTENDERS]:
        raise ValueError(f"contender {unknown[0]!r} unknown; choose {', '.join(CONTENDERS)}")
    listed = (
        case for dtype in dtypes for name in models for size in sizes for case in list_cases(name, model_config(name), size, batch, dtype)
    )
    cases = list(dict.fromkeys(listed if cases is None else cases))
    settings = {
        "bench": "attention",
        "rounds": rounds,
        "device": device,
        "contenders": list(contenders),
        "kinds": list(kinds),
        "cases": [asdict(case) for case in cases],
    }
    record = BenchRecord(out, settings)
    yield format_machine(record.values["machine"])
    yield table_header(["attention", "calls", "way", *contenders, "best of PyTorch / minidiff", "error / best"])
    began = perf_counter()
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="minidiff-bench-") as folder:
        running = {
            name: stack.enter_context(Contender(WORKER, {"contender": name, "device": device})) for name in ("reference", *contenders)
        }
        for case in cases:
            if not record.results.get(str(case), {}).get("done"):
                if not budget.left:
                    break
                late = perf_counter() - began > FLEX_TIME_LIMIT
                measure(case, running, Path(folder) / "known.pt", rounds, kinds, record, late, budget)
            yield from case_rows(case, record.results[str(case)], contenders)
    for case in [case for case in cases if str(case) not in record.results]:
        yield f"\nnot measured, the time was over: {case}"
    ways = [way for result in record.results.values() for way in result["ways"].items()]
    for name, reason in sorted({(name, one["refused"]) for name, one in ways if "refused" in one}):
        yield f"\n{name} refused: {reason}"
    whole = cases if all(str(case) in record.results for case in cases) else []
    sums = [one for when in ("seconds", "cold") for one in sum_steps(whole, record.results, when)]
    yield "\n" + table_header(["attention of a U-Net step", "minidiff", "best of PyTorch at each shape", "times as fast"])
    for one in sums:
        yield table_row([one["name"], format_seconds(median(one["ours"])), format_seconds(median(one["best"])), Ratio(**one["ratio"])])
    record.finish(sums=sums)


# ----------------------------------------------------------------------------------------------------------- measuring


def measure(
    case: AttentionCase,
    running: dict[str, Contender],
    known: Path,
    rounds: int,
    kinds: Sequence[str],
    record: BenchRecord,
    late: bool,
    budget: Budget,
) -> None:
    """Check every contender on the case, then time the rounds. One that died is started again for the next case.

    Args:
        case: The shape.
        running: The reference, then the contenders.
        known: The file of inputs and exact results.
        rounds: Of all contenders.
        kinds: Of inputs.
        record: Where results are kept.
        late: Leave out FlexAttention, which takes longest to compile.
        budget: The time that it may take.
    """
    asked = {"case": asdict(case), "path": str(known)}
    running["reference"].ask(do="make", kinds=list(kinds), **asked)
    ways = {}
    result = {"case": asdict(case), "ways": ways, "done": False}
    for name, contender in list(running.items())[1:]:
        if name == "flex" and (late or case.tokens < SMALL):
            ways[name] = {"refused": "left out of the time that there is" if late else f"not tried below {SMALL} tokens"}
            continue
        try:
            ways[name] = ask_in_time(contender, budget, **asked) | {direction: [] for direction in directions(case)}
        except Refused as reason:
            ways[name] = {"refused": str(reason)}
            contender.restart_if_dead()
        record.keep(str(case), result)
    for direction in directions(case):
        for _, name in turns([name for name in ways if "refused" not in ways[name]], rounds):
            if "refused" in ways[name] or not budget.left:
                continue
            asked = {"do": "time", "direction": direction, "least": 0.1, "case": asdict(case)}
            try:
                ways[name][direction].append(running[name].ask(limit=min(TIMEOUT, budget.left + GRACE), **asked))
            except Refused as reason:
                ways[name] = {"refused": str(reason)}
                running[name].restart_if_dead()
        keep_whole_rounds([way[direction] for way in ways.values() if "refused" not in way])
    result["done"] = True
    record.keep(str(case), result)


# --------------------------------------------------------------------------------------------------------- the results


def round_times(result: dict, name: str, direction: str, when: str = "seconds") -> tuple[float, ...] | None:
    """Return the seconds of each round; None for a contender that refused, and for a cold cache on a CPU.

    Args:
        result: Of a case.
        name: Of the contender.
        direction: "forward" or "both".
        when: "seconds", or "cold".
    """
    rounds = result["ways"].get(name, {}).get(direction, ())
    return tuple(one[when] for one in rounds) if rounds and when in rounds[0] else None


def best_backend(result: dict, direction: str, when: str = "seconds") -> str | None:
    """Return the name of PyTorch's fastest backend for the case."""
    measured = {name: found for name in SDPA if (found := round_times(result, name, direction, when))}
    return min(measured, key=lambda name: median(measured[name])) if measured else None


def case_rows(case: AttentionCase, result: dict, contenders: Sequence[str]) -> Iterator[str]:
    """Yield the table's rows of a case, one per direction."""
    for direction in directions(case):
        best, ours = best_backend(result, direction), round_times(result, "minidiff", direction)
        found = [round_times(result, name, direction) for name in contenders]
        theirs = round_times(result, best, direction) if best else None
        compared = f"{ratio(theirs, ours)} ({best})" if theirs and ours else ""
        picks = result["ways"].get("minidiff", {}).get("picks")
        wrong = worst_error(case, result)
        unequal = " differs from run to run !" if result["ways"].get("minidiff", {}).get("bit_equal") is False else ""
        yield table_row(
            [
                f"{case} ({picks})" if picks else case,
                case.calls or "",
                direction,
                *(format_seconds(median(one)) if one else "refused" for one in found),
                compared,
                "" if wrong is None else f"{wrong:.2f}" + (" !" if wrong > ERROR_TOLERANCE else "") + unequal,
            ]
        )


def worst_error(case: AttentionCase, result: dict) -> float | None:
    """Return the largest ratio of our RMS error to that of PyTorch's best fused kernel, over inputs, output and gradients.

    Errors below a hundredth of a rounding error count as none.
    """
    ours = result["ways"].get("minidiff", {})
    theirs = [one for name in FUSED if "errors" in (one := result["ways"].get(name, {}))]
    if "errors" not in ours or not theirs:
        return None
    worst = 0.0
    for kind, errors in ours["errors"].items():
        for name, error in errors.items():
            rounding = 0.01 * torch.finfo(getattr(torch, case.dtype)).eps * max(ours["scales"][one][name] for one in (kind, "normal"))
            worst = max(worst, (error + rounding) / (min(one["errors"][kind][name] for one in theirs) + rounding))
    return worst


def sum_steps(cases: Sequence[AttentionCase], results: dict[str, dict], when: str) -> Iterator[dict]:
    """Sum the times by calls, for every model, size and dtype: self-attention, cross-attention and both together.

    Each sum has a name, seconds per round of ours and of PyTorch's best backend at every shape, and their ratio.
    """
    groups = dict.fromkeys((case.where.rsplit(" ", 1)[0], case.dtype) for case in cases if case.calls)
    for (model, dtype), kinds, direction in product(groups, (("self",), ("cross",), ("self", "cross")), ("forward", "both")):
        places = [f"{model} {kind}" for kind in kinds]
        chosen = [case for case in cases if case.calls and case.dtype == dtype and case.where in places]
        found = [results[str(case)] for case in chosen]
        ours = [times for result in found if (times := round_times(result, "minidiff", direction, when))]
        best = [times for result in found if (times := round_times(result, best_backend(result, direction, when) or "", direction, when))]
        if chosen and len(ours) == len(best) == len(chosen):
            name = f"{model} {dtype}, {' and '.join(kinds)}, {direction}{', cold' if when == 'cold' else ''}"
            total, least = weighted_sums(chosen, ours), weighted_sums(chosen, best)
            yield {"name": name, "ours": total, "best": least, "ratio": asdict(ratio(least, total))}


def weighted_sums(cases: Sequence[AttentionCase], times: Sequence[tuple[float, ...]]) -> tuple[float, ...]:
    """Sum the cases' seconds in each round, each times its calls."""
    return tuple(sum(case.calls * seconds for case, seconds in zip(cases, of_round)) for of_round in zip(*times))
