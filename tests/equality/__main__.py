"""Compare what another revision computes with what this working tree computes, bit for bit, on the CPU with one thread.

    python -m tests.equality a861b28                                everything; exit code 1 if something differs
    python -m tests.equality a861b28 --only draw train              some parts of draw, adapters, train, files, parity
    python -m tests.equality a861b28 --reference runs/reference     keep the revision's results in this folder, and use them next time

    REV -> git worktree -> probe.py --- PART.safetensors --.
                                                            compare -> a line per item: equal, or the largest difference
    this working tree ---> probe.py --- PART.safetensors --'

The probe (probe.py) runs in processes of its own, with this environment and this Python; each imports the tree that it is started in. What
depends on names is in api.py: after a renaming, change the side `New` there. A difference that is meant goes into EXPECTED.

With --reference, results are used again only if they come from the same commit, the same probe and side `Old`, the same machine and the
same versions of the libraries, and no item failed; otherwise they are made again and replaced.
"""

import argparse
import ast
import hashlib
import inspect
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from tests.equality import api, probe

# {pattern of an item: the reason why it may differ}
EXPECTED: dict[str, str] = {
    "draw/default savings": "keys and values and the table of times are gone: the table moved x_t by 5e-6 of rounding",
    "draw/vae bfloat16": "the VAE's attention shares one contiguous copy of its input: in bfloat16 the product adds in another order",
    "files/model diffusers": "the same settings in config files, in alphabetical order; the U-Net's spells more of diffusers' defaults",
    "parity/ControlNet*": "came later",
    "parity/*SDXL*": "came later",
    "parity/*StableDiffusionXLPipeline*": "came later",
    "parity/VAE *float64": "the VAE's attention shares one contiguous copy of its input: the product adds in another order",
    "parity/prompt to picture, diffusers StableDiffusionPipeline*": "the VAE's attention as above, and no table of times",
    "parity/text encoder, penultimate layer, open_clip, float32": "the reference's projection has another width, and so draws other weights",
    "train/class images, generated": "drawn without the table of times, whose rounding moved one of 12,288 8-bit values in two pictures",
}

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LIBRARIES = ("torch", "numpy", "pillow", "safetensors", "diffusers", "transformers", "open_clip_torch", "peft")
ENVIRONMENT = {
    **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "PYTHONWARNINGS": "ignore",
}
Results = tuple[dict[str, dict[str, Tensor]], dict[str, str]]  # {item: {tensor's name: tensor}}, {item: the error that it ended with}


def main() -> int:
    """Return the exit code: 0 if all items are equal or expected to differ."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.equality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("rev", help="commit, tag or branch to compare with")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=probe.PARTS, default=list(probe.PARTS))
    parser.add_argument("--reference", type=Path, help="folder that keeps the revision's results")
    args = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", f"{args.rev}^{{commit}}"], cwd=ROOT, check=True, text=True, capture_output=True
    ).stdout.strip()
    counts: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as scratch:
        theirs = run_there(commit, args.only, args.reference or Path(scratch, "there"), Path(scratch, "tree"))
        for part, there in zip(args.only, theirs, strict=True):
            here = Path(scratch, f"{part}.safetensors")
            run_probe(ROOT, part, here)
            for verdict, line in compare(read_results(there), read_results(here)):
                counts[verdict] = counts.get(verdict, 0) + 1
                print(f"{verdict:9} {line}", flush=True)
    print(f"{sum(counts.values())} items: " + ", ".join(f"{n} {verdict}" for verdict, n in sorted(counts.items())))
    return int(not counts or any(verdict not in ("equal", "expected") for verdict in counts))


def run_there(commit: str, parts: list[str], folder: Path, tree: Path) -> list[Path]:
    """Return the files with the commit's results, one per part; those that are in the folder already are not made again."""
    folder.mkdir(parents=True, exist_ok=True)
    stamp_path, stamp = folder / "made-by.json", made_by(commit)
    if not stamp_path.exists() or json.loads(stamp_path.read_text()) != stamp:
        for path in folder.glob("*.safetensors"):
            path.unlink()
        stamp_path.write_text(json.dumps(stamp, indent=1))
    files = {part: folder / f"{part}.safetensors" for part in parts}
    if missing := [part for part, path in files.items() if read_results(path)[1]]:
        with worktree(commit, tree):
            for part in missing:
                run_probe(tree, part, files[part])
    return list(files.values())


def made_by(commit: str) -> dict[str, str]:
    """Return everything that the results of a commit depend on."""
    cpu = Path("/proc/cpuinfo")
    models = (
        {line.split(":")[1].strip() for line in cpu.read_text().splitlines() if line.startswith("model name")} if cpu.exists() else set()
    )
    code = "".join(ast.dump(ast.parse(inspect.getsource(part))) for part in (probe, api.Old))  # comments and layout do not count
    machine = f"{platform.node()}, {', '.join(sorted(models)) or platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "commit": commit,
        "probe": hashlib.sha256(code.encode()).hexdigest(),
        "machine": machine,
        "python": platform.python_version(),
    } | {name: version(name) for name in LIBRARIES}


@contextmanager
def worktree(commit: str, tree: Path) -> Iterator[None]:
    """Check the commit out in a folder for the time of the block."""
    subprocess.run(["git", "worktree", "add", "--quiet", "--detach", str(tree), commit], cwd=ROOT, check=True)
    try:
        yield
    finally:
        shutil.rmtree(tree, ignore_errors=True)
        subprocess.run(["git", "worktree", "prune"], cwd=ROOT, check=False)


def run_probe(tree: Path, part: str, path: Path) -> None:
    """Write a part's results in a tree to a file; none is there if the probe dies."""
    # -P and PYTHONPATH: the tree's own modules come first, wherever minidiff may be installed from.
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join((str(tree), str(HERE)))}
    command = [sys.executable, "-P", str(HERE / "probe.py"), part, str(path.resolve())]
    done = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL)
    if done.returncode:
        print(f"the probe of {part} in {tree} ended with exit code {done.returncode}", file=sys.stderr)


def read_results(path: Path) -> Results:
    """Return what a probe wrote; nothing if it wrote nothing."""
    items: dict[str, dict[str, Tensor]] = {}
    if not path.exists():
        return items, {path.stem: "the probe died"}
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            item, _, tensor = name.partition(":")
            items.setdefault(item, {})[tensor] = file.get_tensor(name)
        return items, json.loads(file.metadata()["errors"])


def compare(there: Results, here: Results) -> Iterator[tuple[str, str]]:
    """Yield a verdict and a line for each item: equal, expected, differs, missing, failed."""
    for item in sorted({*there[0], *there[1], *here[0], *here[1]}):
        verdict, text = judge(item, there, here)
        reason = next((reason for pattern, reason in EXPECTED.items() if fnmatch(item, pattern)), None)
        if verdict != "equal" and reason is not None:
            verdict, text = "expected", f"{text}; {reason}"
        yield verdict, f"{item}: {text}"


def judge(item: str, there: Results, here: Results) -> tuple[str, str]:
    """Return the verdict on one item, and why."""
    if errors := [f"{side}: {errors[item]}" for side, (_, errors) in (("there", there), ("here", here)) if item in errors]:
        return "failed", "; ".join(errors)
    a, b = there[0].get(item), here[0].get(item)
    if a is None or b is None:
        return "missing", "only " + ("here" if a is None else "there")
    complaints = [f"{name} only {'here' if name in b else 'there'}" for name in sorted(a.keys() ^ b.keys())]
    complaints += [text for name in sorted(a.keys() & b.keys()) if (text := difference(name, a[name], b[name]))]
    if not complaints:
        return "equal", f"{len(a)} tensor{'s' * (len(a) > 1)}, {sum(x.numel() for x in a.values())} numbers"
    return "differs", f"{len(complaints)} of {len(a.keys() | b.keys())} tensors: {'; '.join(complaints[:3])}" + "; ..." * (
        len(complaints) > 3
    )


def difference(name: str, a: Tensor, b: Tensor) -> str:
    """Return what differs between two tensors, "" if nothing does; not-a-number equals itself, -0 is not 0."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{name} {str(a.dtype)[6:]} {list(a.shape)} there, {str(b.dtype)[6:]} {list(b.shape)} here"
    if torch.equal(a.contiguous().flatten().view(torch.uint8), b.contiguous().flatten().view(torch.uint8)):
        return ""
    error = (a.double() - b.double()).abs()
    return f"{name} by up to {error.max():.2e} (values up to {a.double().abs().max():.2e}; {int((a != b).sum())} of {a.numel()} differ)"


if __name__ == "__main__":
    sys.exit(main())
