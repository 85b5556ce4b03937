"""Measure how long a full-size Stable Diffusion 1.x takes to load, and how much memory: `minidiff bench load`.

    random weights -> a .safetensors or .ckpt file, or a diffusers folder -> minidiff, diffusers, minidiff, ...  -> medians, ratios
                                                                              in turn, each in a new process (load_worker.py)

Names, shapes and sizes are the real ones. The clock starts after the imports, which are timed separately, and stops when every weight has
been summed once: a memory-mapped file that nobody has read is not loaded yet. The files are in the page cache. Memory is the peak of the
process above the level before the call, as Linux counts it: resident, or only anonymous, which no file backs. If the file has the requested
dtype its pages are the weights, and resident memory counts; if it is converted, the file's pages can be given back at any time, and
anonymous memory counts.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch

import weights_loader
from minidiff.bench.common import check_arguments, random_model, read_command
from minidiff.bench.load_worker import Measurement
from minidiff.config import SD1, ModelConfig
from minidiff.files import write_text
from minidiff.machine import format_machine, read_machine
from minidiff.markdown import table_header, table_row
from minidiff.pipeline import StableDiffusion
from weights_loader.folder import write_folder_config
from weights_loader.metadata import config_to_json
from weights_loader.save import tensors_of
from weights_loader.write import write_safetensors

CONTENDERS = ("minidiff", "diffusers")
GOAL_TIME = 0.5  # of diffusers' time, at most
GOAL_MEMORY = 1.15  # of the model's bytes, at most


@dataclass(frozen=True)
class FileCase:
    """A kind of file, the dtype of the weights in it, and the dtype asked for."""

    kind: str
    stored: str = "float32"
    asked: str = "float32"

    def __str__(self) -> str:
        return f"{self.kind}, {self.stored}" + (f" as {self.asked}" if self.asked != self.stored else "")


CASES = (FileCase(".safetensors"), FileCase(".ckpt"), FileCase("diffusers folder"), FileCase(".safetensors", "float16"))


def bench_load(
    against: bool = True, out: Path | None = None, rounds: int = 3, config: ModelConfig = SD1, cases: Sequence[FileCase] = CASES
) -> Iterator[str]:
    """Measure, and yield the lines of a Markdown table as they come. Takes up to 4.3 GB of disk at a time, in a temporary folder.

    Raises ValueError if memory cannot be measured or diffusers is missing, RuntimeError if a contender fails.

    Args:
        against: Measure diffusers as well.
        out: A .json file for every number.
        rounds: How often each contender loads each file; the median time and the highest memory count.
        config: Of the model.
        cases: Kinds of files and dtypes.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise ValueError(f"bench load reads the memory of a process from /proc, which {platform.system()} does not have; run it on Linux")
    check_arguments(rounds, out, against)
    record = {"command": read_command(), "machine": read_machine(), "rounds": rounds, "cases": []}
    missed = []
    yield format_machine(record["machine"])
    yield table_header(
        [
            "file",
            *("minidiff", "diffusers", "ratio"),
            *("with imports", "", "ratio"),
            *("memory", "minidiff", "diffusers", "of the model's size"),
        ]
    )
    for case in cases:
        found = measure_case(case, config, CONTENDERS if against else CONTENDERS[:1], rounds)
        summary = summarize(case, found)
        record["cases"].append(
            {"case": asdict(case)} | summary | {"runs": {name: [asdict(run) for run in runs] for name, runs in found.items()}}
        )
        missed += [f"missed: {case}: {goal}" for goal in find_missed_goals(summary)]
        yield case_row(case, summary)
    if out:
        write_text(out, json.dumps(record, indent=2) + "\n")
    yield "\n" + "\n".join(missed or [f"goals met: {GOAL_TIME} of diffusers' time, memory {GOAL_MEMORY} of the model's size"])


# ------------------------------------------------------------------------------------------------------- the results


def summarize(case: FileCase, found: dict[str, list[Measurement]]) -> dict[str, object]:
    """Return the median times and the highest memory of each contender, and the model's bytes in the requested dtype."""
    memory = "resident" if case.stored == case.asked else "anonymous"
    return {
        "model_bytes": found["minidiff"][0].count * getattr(torch, case.asked).itemsize,
        "seconds": {name: median(run.seconds for run in runs) for name, runs in found.items()},
        "cpu_seconds": {name: median(run.cpu_seconds for run in runs) for name, runs in found.items()},
        "with_imports": {name: median(run.import_seconds + run.seconds for run in runs) for name, runs in found.items()},
        "memory_counted": memory,
        "memory": {name: max(getattr(run, f"{memory}_peak") for run in runs) for name, runs in found.items()},
    }


def find_missed_goals(summary: dict) -> list[str]:
    """In words. The goal for the time needs diffusers' time."""
    seconds, missed = summary["seconds"], []
    if "diffusers" in seconds and seconds["minidiff"] > GOAL_TIME * seconds["diffusers"]:
        missed.append(f"{seconds['minidiff'] / seconds['diffusers']:.2f} of diffusers' time, the goal is {GOAL_TIME}")
    share = summary["memory"]["minidiff"] / summary["model_bytes"]
    if share > GOAL_MEMORY:
        missed.append(f"memory {share:.2f} of the model's size, the goal is {GOAL_MEMORY}")
    return missed


def case_row(case: FileCase, summary: dict) -> str:
    """Format the table's row of a case."""

    def pair(values: dict[str, float]) -> list[str]:
        if "diffusers" not in values:
            return [f"{values['minidiff']:.2f} s", "", ""]
        return [*(f"{values[name]:.2f} s" for name in CONTENDERS), f"{values['minidiff'] / values['diffusers']:.2f}"]

    memory = [f"{summary['memory'][name] / 1e9:.2f} GB" if name in summary["memory"] else "" for name in CONTENDERS]
    share = summary["memory"]["minidiff"] / summary["model_bytes"]
    cells = [str(case), *pair(summary["seconds"]), *pair(summary["with_imports"]), summary["memory_counted"], *memory, f"{share:.2f}"]
    return table_row(cells)


# --------------------------------------------------------------------------------------------------------- the files


def measure_case(case: FileCase, config: ModelConfig, contenders: Sequence[str], rounds: int) -> dict[str, list[Measurement]]:
    """Write the file, put it into the page cache, and measure the contenders in turn. They have to agree on its contents.

    Args:
        case: The kind of file and its dtypes.
        config: Of the model, whose weights are random.
        contenders: Some of CONTENDERS.
        rounds: How often each contender loads the file.
    """
    found = {name: [] for name in contenders}
    with tempfile.TemporaryDirectory(prefix="minidiff-bench-") as folder:
        path = write_case(random_model(config, getattr(torch, case.stored)), case, Path(folder))
        os.sync()  # what is still on its way to the disk would take time from the first round
        fill_page_cache(path)
        for _ in range(rounds):
            for name in contenders:
                found[name].append(run_in_new_process(name, path, Path(folder) / "settings", case.asked, config))
    runs = [run for runs in found.values() for run in runs]
    # Sums of a billion numbers in float32, in another order.
    same = all(run.count == runs[0].count and abs(run.total - runs[0].total) <= 1e-4 * abs(runs[0].total) for run in runs)
    assert same, f"{case}: not the same weights: {[(run.count, run.total) for run in runs]}"
    return found


def write_case(sd: StableDiffusion, case: FileCase, folder: Path) -> Path:
    """Write the model as a file of this kind, without a config like the public ones. diffusers finds its settings in "settings"."""
    if case.kind == "diffusers folder":
        weights_loader.save(sd, folder / "settings", layout="diffusers")
        return folder / "settings"
    (folder / "settings").mkdir()
    write_folder_config(folder / "settings", sd.config, sd.text.tokenizers)
    tensors = tensors_of(sd, "ldm")
    path = folder / f"model{case.kind}"
    if case.kind == ".ckpt":  # torch writes memory that tensors share once; here each has its own
        torch.save({"state_dict": {name: tensor.clone() for name, tensor in tensors.items()}}, path)
    else:
        write_safetensors(path, tensors)
    return path


def fill_page_cache(path: Path):
    """Read everything once, into the page cache."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb", buffering=0) as stream:
                while stream.read(1 << 24):
                    pass


def run_in_new_process(contender: str, path: Path, settings: Path, asked: str, config: ModelConfig) -> Measurement:
    """Call load_worker.measure in a new interpreter, offline. Raises RuntimeError with its last lines if it fails.

    Args:
        contender: "minidiff" or "diffusers".
        path: The file or folder.
        settings: A diffusers folder with at least the JSON files.
        asked: The dtype of the loaded weights.
        config: Of the model.
    """
    known = None if config == SD1 else config_to_json(config)
    job = {"contender": contender, "path": str(path), "settings": str(settings), "asked": asked, "config": known}
    command = [sys.executable, "-m", "minidiff.bench.load_worker", json.dumps(job)]
    process = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"{contender} could not load {path.name}:\n{process.stderr[-3000:]}")
    return Measurement(**json.loads(process.stdout.splitlines()[-1]))
