"""How long attention takes, at each of its shapes in Stable Diffusion: `minidiff bench attention`.

    shape -> inputs, float64 results -> each contender: errors, three runs, memory -> rounds in turn -> times, sums of a U-Net step

Contenders are attention() as the model calls it, our kernels, PyTorch's fused attention with each of its backends forced, compiled
FlexAttention, and the six lines by hand. A backend that refuses a shape is shown with its reason. Kernel times on a GPU are those of CUDA
graphs of many launches, with the inputs in the cache (warm) and not (cold); calls from Python are timed apart (eager).
Errors come before speed: how our RMS error compares with the best fused kernel's stands beside each time, marked where it is too large.
"""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from time import perf_counter

import torch

from minidiff.bench.attention_cases import KINDS, Case, cases_of, directions
from minidiff.bench.common import Record, check, in_a_line, model_config
from minidiff.bench.contender import Contender, Refused
from minidiff.bench.one_attention import SDPA
from minidiff.bench.ratios import ratio, turns
from minidiff.markdown import format_seconds, table_header, table_row

CONTENDERS = ("minidiff", "triton", *SDPA, "flex", "by hand")
ONE = "minidiff.bench.one_attention"
TOO_LATE = 240  # seconds after which nothing more is compiled by FlexAttention: it takes longer than all others together
SMALL = 1024  # tokens below which it is not tried
ALLOWED = 1.1  # times the best backend's error
FUSED = ("flash", "efficient", "cudnn")  # those that keep no N x L matrix, and so can be no more exact than one pass allows


@dataclass(frozen=True)
class Sum:
    """A U-Net step's worth of some attentions: seconds of each round, of ours and of PyTorch's best backend at every shape."""

    name: str
    ours: tuple[float, ...]
    best: tuple[float, ...]


def bench(
    out: Path | None = None,
    rounds: int = 5,
    models: Sequence[str] = ("sd1", "sd2"),
    sizes: Sequence[int] = (512, 768),
    dtypes: Sequence[str] = ("bfloat16",),
    device: str = "cpu",
    contenders: Sequence[str] = CONTENDERS,
    batch: int = 2,
    cases: Sequence[Case] | None = None,
    kinds: Sequence[str] = KINDS,
) -> Iterator[str]:
    """Measure, and yield the lines of Markdown tables as they are found; `out` is written after each contender's check and each shape.

    models, sizes, dtypes: whose shapes, at how many pixels. batch: 2 is a picture with guidance. cases: others than these.
    Raises ValueError for what is unknown.
    """
    check(rounds, out)
    if unknown := [name for name in contenders if name not in CONTENDERS]:
        raise ValueError(f"contender {unknown[0]!r} unknown; choose {', '.join(CONTENDERS)}")
    if cases is None:
        cases = [
            case for dtype in dtypes for name in models for size in sizes for case in cases_of(name, model_config(name), size, batch, dtype)
        ]
    cases = list(dict.fromkeys(cases))
    settings = {"bench": "attention", "rounds": rounds, "device": device, "contenders": list(contenders), "kinds": list(kinds)}
    settings["cases"] = [asdict(case) for case in cases]
    record = Record(out, settings)
    yield in_a_line(record.values["machine"])
    yield table_header(["attention", "calls", "way", *contenders, "best of PyTorch / minidiff", "error / best"])
    began = perf_counter()
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="minidiff-bench-") as folder:
        running = {name: stack.enter_context(Contender(ONE, {"contender": name, "device": device})) for name in ("reference", *contenders)}
        for case in cases:
            if not record.results.get(str(case), {}).get("done"):
                late = perf_counter() - began > TOO_LATE
                measure(case, running, Path(folder) / "known.pt", rounds, kinds, record, late)
            yield from case_rows(case, record.results[str(case)], contenders)
    ways = [way for result in record.results.values() for way in result["ways"].items()]
    for name, reason in sorted({(name, one["refused"]) for name, one in ways if "refused" in one}):
        yield f"\n{name} refused: {reason}"
    sums = [one for when in ("seconds", "cold") for one in sums_of(cases, record.results, when)]
    yield "\n" + table_header(["attention of a U-Net step", "minidiff", "best of PyTorch at each shape", "times as fast"])
    for one in sums:
        yield table_row([one.name, format_seconds(median(one.ours)), format_seconds(median(one.best)), ratio(one.best, one.ours)])
    record.finish(sums=[asdict(one) | {"ratio": asdict(ratio(one.best, one.ours))} for one in sums])


# ----------------------------------------------------------------------------------------------------------- measuring


def measure(case: Case, running: dict[str, Contender], known: Path, rounds: int, kinds: Sequence[str], record: Record, late: bool) -> None:
    """Every contender's check of the case, then the rounds. One that died is started again for the next case."""
    asked = {"case": asdict(case), "path": str(known)}
    running["reference"].ask(do="make", kinds=list(kinds), **asked)
    ways = {}
    result = {"case": asdict(case), "ways": ways, "done": False}
    for name, contender in running.items():
        if name == "reference":
            continue
        if name == "flex" and (late or case.tokens < SMALL):
            ways[name] = {"refused": "left out of the time that there is" if late else f"not tried below {SMALL} tokens"}
            continue
        try:
            ways[name] = contender.ask(do="check", **asked) | {direction: [] for direction in directions(case)}
        except Refused as reason:
            ways[name] = {"refused": str(reason)}
            contender.revive()
        record.keep(str(case), result)
    for direction in directions(case):
        for _, name in turns([name for name in ways if "refused" not in ways[name]], rounds):
            if "refused" in ways[name]:
                continue
            try:
                ways[name][direction].append(running[name].ask(do="time", direction=direction, least=0.1, case=asdict(case)))
            except Refused as reason:
                ways[name] = {"refused": str(reason)}
                running[name].revive()
    result["done"] = True
    record.keep(str(case), result)


# --------------------------------------------------------------------------------------------------------- the results


def times(result: dict, name: str, direction: str, when: str = "seconds") -> tuple[float, ...] | None:
    """Seconds of each round; None for a contender that refused, and for a cold cache on a CPU."""
    rounds = result["ways"].get(name, {}).get(direction, ())
    return tuple(one[when] for one in rounds) if rounds and when in rounds[0] else None


def best_backend(result: dict, direction: str, when: str = "seconds") -> str | None:
    """PyTorch's fastest for the case."""
    measured = {name: found for name in SDPA if (found := times(result, name, direction, when))}
    return min(measured, key=lambda name: median(measured[name])) if measured else None


def case_rows(case: Case, result: dict, contenders: Sequence[str]) -> Iterator[str]:
    for direction in directions(case):
        best, ours = best_backend(result, direction), times(result, "minidiff", direction)
        found = [times(result, name, direction) for name in contenders]
        compared = f"{ratio(times(result, best, direction), ours)} ({best})" if best and ours else ""
        picks = result["ways"].get("minidiff", {}).get("picks")
        where = f"{case}" + (f" ({picks})" if picks else "")
        wrong = worst_error(case, result)
        yield table_row(
            [
                where,
                case.calls or "",
                direction,
                *(format_seconds(median(one)) if one else "refused" for one in found),
                compared,
                "" if wrong is None else f"{wrong:.2f}" + (" !" if wrong > ALLOWED else "") + unequal(result),
            ]
        )


def unequal(result: dict) -> str:
    """Says so if ours did not give the same three times."""
    return " differs from run to run !" if result["ways"].get("minidiff", {}).get("bit_equal") is False else ""


def worst_error(case: Case, result: dict) -> float | None:
    """Our RMS error over the least of PyTorch's fused kernels', at its worst over the kinds of inputs, output and gradients.

    A hundredth of a rounding error counts as none.
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


def sums_of(cases: Sequence[Case], results: dict[str, dict], when: str) -> Iterator[Sum]:
    """Weighted by calls, for every model, size and dtype: self-attention, cross-attention and both together."""
    names = dict.fromkeys((case.where.rsplit(" ", 1)[0], case.dtype) for case in cases if case.calls)
    for model, dtype in names:
        for kinds in (("self",), ("cross",), ("self", "cross")):
            chosen = [case for case in cases if case.calls and case.dtype == dtype and case.where in [f"{model} {kind}" for kind in kinds]]
            for direction in ("forward", "both"):
                ours = [times(results[str(case)], "minidiff", direction, when) for case in chosen]
                best = [
                    times(results[str(case)], best_backend(results[str(case)], direction, when) or "", direction, when) for case in chosen
                ]
                if chosen and all(ours) and all(best):
                    weighted = [tuple(sum(case.calls * t for case, t in zip(chosen, r)) for r in zip(*side)) for side in (ours, best)]
                    cold = ", cold" if when == "cold" else ""
                    yield Sum(f"{model} {dtype}, {' and '.join(kinds)}, {direction}{cold}", *weighted)
