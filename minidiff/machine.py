"""The machine that numbers were measured on."""

import importlib.metadata
import importlib.util
import os
import platform
from collections.abc import Mapping
from pathlib import Path

import torch

PACKAGES = ("torch", "triton", "numpy", "safetensors", "diffusers", "transformers", "accelerate", "peft")  # whose versions matter


def read_machine() -> dict[str, object]:
    """Return what measured times depend on: processor, cores, threads, GPU, system and versions."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return {
        "processor": next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine()),
        "cores": os.cpu_count(),
        "usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES if importlib.util.find_spec(name)),
    }


def format_machine(machine: Mapping[str, object]) -> str:
    """Format a machine as the line above a table."""
    gpu = f"{machine['gpu']}, " if machine["gpu"] else ""
    return gpu + "{processor}, {usable} of {cores} cores; {versions}\n".format_map(machine)


def format_device(device: torch.device) -> str:
    """Format a device as "NVIDIA H200" or "CPU, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type.upper()}, {torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
