"""The tables of `minidiff bench gpu`, made from the JSON files in its folder and from nothing else."""

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import median

from minidiff.bench.attention import round_times
from minidiff.bench.attention_cases import AttentionCase, directions
from minidiff.bench.floors import count_attention, floor_seconds
from minidiff.bench.race import format_table
from minidiff.bench.ratios import ratio
from minidiff.machine import format_machine
from minidiff.markdown import format_seconds, markdown_table

# The stages that race on a model: their titles, and what stands before the contenders' names in their files.
RACES = {
    "step": ("A U-Net step of one picture with guidance", ""),
    "image": ("A picture, from the prompt to pixels", ""),
    "lora": ("A training step of a LoRA", "lora: "),
    "bundled": ("A training step of the bundled model", ""),
}


def format_report(folder: Path) -> str:
    """Return the Markdown of a run, as far as it has come."""
    record = json.loads((folder / "gpu.json").read_text())
    stages = record["results"]
    parts = [f"# {record['machine']['gpu'] or record['machine']['processor']}", format_machine(record["machine"]).strip()]
    if record.get("driver"):
        parts.append(f"Driver {record['driver']}.")
    parts.append(markdown_table(["stage", "", "seconds", "SM clock, MHz", "power, W"], map(stage_row, stages.items())))
    ceilings = stages.get("ceilings", {})
    if "products" in ceilings:
        parts.append(
            f"Measured here: a matrix product {ceilings['products'] / 1e12:.4g} TFLOP/s, a copy {ceilings['bytes'] / 1e12:.3g} TB/s. "
            "A floor is what the work would take at these rates; see floors.py."
        )
    parts += format_checks(stages)
    if (folder / "attention.json").exists() and "attention" in stages:
        parts += format_attention(json.loads((folder / "attention.json").read_text())["results"], ceilings)
    for stage, (title, prefix) in RACES.items():
        path = folder / f"{stage}.json"
        if stage in stages and path.exists() and (results := json.loads(path.read_text())["results"]):
            parts += [f"## {title}", *format_race({name.removeprefix(prefix): one for name, one in results.items()}, stages[stage])]
    return "\n\n".join(parts)


def stage_row(stage: tuple[str, dict]) -> list[object]:
    """Return the row of a stage: how it ended, its seconds, the GPU's clock and power meanwhile."""
    name, found = stage
    clocks = found.get("clocks") or {}
    spans = [f"{span['lowest']:g} to {span['highest']:g}" if (span := clocks.get(field)) else "" for field in ("clocks.sm", "power.draw")]
    return [name, found["status"], f"{found['seconds']:.0f}" if "seconds" in found else "", *spans]


def format_checks(stages: dict[str, dict]) -> Iterator[str]:
    """Yield the tables of correctness: kernels together by kind, each part of the model, the tests."""
    groups: dict[str, list[dict]] = {}
    for stage in ("kernels", "whole model"):
        for name, check in stages.get(stage, {}).get("checks", {}).items():
            groups.setdefault(name.partition(",")[0] if stage == "kernels" else name, []).append(check)
    if groups:
        yield "## Correctness"
        head = ["", "checks", "passed", "three runs equal", "largest error / allowed"]
        yield markdown_table(head, ([name, *check_cells(checks)] for name, checks in groups.items()))
        bad = [
            f"- {name}: {check.get('refused') or 'not within what is allowed' if check.get('bit_equal', True) else 'runs differ'}"
            for stage in ("kernels", "whole model")
            for name, check in stages.get(stage, {}).get("checks", {}).items()
            if not check.get("ok")
        ]
        if bad:
            yield "\n".join(["Not passed:", *bad])
    if tests := stages.get("gpu tests", {}).get("tests"):
        results = list(tests.values())
        yield "Tests: " + ", ".join(f"{results.count(one)} {one}" for one in dict.fromkeys(results)) + "."
        if failed := [f"- {name}" for name, one in tests.items() if one in ("failed", "error")]:
            yield "\n".join(["Failed:", *failed])


def check_cells(checks: list[dict]) -> list[object]:
    """Return how many checks there are, passed and were equal, and the largest error as a share of what is allowed."""
    ran = [check for check in checks if "errors" in check]
    shares = [check["errors"][name] / check["allowed"][name] for check in ran for name in check["errors"]]
    passed, equal = (sum(check.get(name, False) for check in checks) for name in ("ok", "bit_equal"))
    return [len(checks), passed, equal, f"{max(shares):.2f}" if shares else ""]


def format_attention(results: dict[str, dict], ceilings: dict) -> Iterator[str]:
    """Yield the table of attention: the floor, our time, and the best of the others."""
    rows, refused = [], {}
    for result in results.values():
        case = AttentionCase(**result["case"])
        refused |= {f"- {name}: {way['refused']}": None for name, way in result["ways"].items() if "refused" in way}
        rows += [attention_row(case, result, direction, ceilings) for direction in directions(case)]
    yield "## Attention"
    yield markdown_table(["attention", "way", "floor", "minidiff", "times the floor", "best other", "its time / minidiff's"], rows)
    if refused:
        yield "\n".join(["Refused:", *refused])


def attention_row(case: AttentionCase, result: dict, direction: str, ceilings: dict) -> list[object]:
    """Return the row of a shape and direction.

    Args:
        case: The shape.
        result: Of `bench attention` for it.
        direction: "forward" or "both".
        ceilings: Of `measure_ceilings`; empty if they were not measured.
    """
    times = {name: found for name in result["ways"] if (found := round_times(result, name, direction))}
    ours = times.pop("minidiff", None)
    floor = floor_seconds(ceilings, *count_attention(case, direction)) if "products" in ceilings else None
    best = min(times, key=lambda name: median(times[name]), default=None)
    return [
        case,
        direction,
        f"{format_seconds(floor[0])} ({floor[1]})" if floor else "",
        format_seconds(median(ours)) if ours else "",
        f"{median(ours) / floor[0]:.2f}" if ours and floor else "",
        f"{best}, {format_seconds(median(times[best]))}" if best else "",
        ratio(times[best], ours) if best and ours else "",
    ]


def format_race(results: dict[str, dict], stage: dict) -> Iterator[str]:
    """Yield the table of a race, its floor, and who was left out."""
    yield "\n".join(format_table(results, next(iter(results))))
    timed = {name: median(result["rounds"]) for name, result in results.items() if result.get("rounds")}
    if "floor" in stage:
        shares = ", ".join(f"{name} {seconds / stage['floor']:.2f}" for name, seconds in timed.items())
        yield f"Floor: {format_seconds(stage['floor'])} for {stage['operations']:.4g} operations. Times the floor: {shares or 'none'}."
    if "samples" in stage and timed:
        rates = ", ".join(f"{name} {1 / seconds:.3g} steps/s" for name, seconds in timed.items())
        yield f"Training: {rates}, {stage['samples']} samples a step."
    for name, reason in stage.get("left_out", {}).items():
        yield f"Left out: {name}; {reason}."
