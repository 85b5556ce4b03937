"""Load and save the judge of the bundled scenes (minidiff/bundled/judge.py).

The file holds our own names, and in its metadata the config with all labels and the vocabulary: it needs nothing else.
"""

import json
from dataclasses import asdict
from pathlib import Path

import torch

from minidiff.bundled.judge import Judge, JudgeConfig
from minidiff.files import parse_json
from weights_loader.metadata import build
from weights_loader.read import read
from weights_loader.write import write_safetensors

KEY = "minidiff.judge"
BUNDLED = Path(__file__).parent / "bundled" / "judge.safetensors"


def load_judge(path: str | Path = BUNDLED, *, device: torch.device | str = "cpu") -> Judge:
    """Load the judge that ships with minidiff, or another one, in float32 and eval mode.

    Raises FileNotFoundError for what is not there, and ValueError for a file that holds something else, or a judge in part.
    """
    checkpoint = read(path)
    if KEY not in checkpoint.metadata:
        raise ValueError(f"{path}: no judge: its metadata have no {KEY}; a judge is a file that save_judge wrote")
    values = parse_json(checkpoint.metadata[KEY], f"{path}: metadata {KEY}", "; the file is damaged")
    try:
        judge = Judge(build(JudgeConfig, values, KEY))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    own = judge.state_dict()
    wrong = [f"'{name}' is missing" for name in own if name not in checkpoint.tensors]
    wrong += [f"'{name}' is unknown" for name in checkpoint.tensors if name not in own]
    wrong += [
        f"'{name}' has shape {tuple(tensor.shape)}, expected {tuple(own[name].shape)}"
        for name, tensor in checkpoint.tensors.items()
        if name in own and tensor.shape != own[name].shape
    ]
    if wrong:
        raise ValueError(f"{path}: not the weights of the judge that its metadata describe: {'; '.join(wrong[:3])} ({len(wrong)} in all)")
    judge.load_state_dict(checkpoint.tensors)  # copies, and makes float32 of float16
    return judge.to(device).eval().requires_grad_(False)


def save_judge(judge: Judge, path: str | Path):
    """Write a judge in float16, with its config."""
    tensors = {name: tensor.half() for name, tensor in judge.state_dict().items()}
    write_safetensors(path, tensors, {KEY: json.dumps(asdict(judge.config), ensure_ascii=False, separators=(",", ":"))})
