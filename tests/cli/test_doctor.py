"""`minidiff doctor`: ten lines, also where the system tells little and on a GPU."""

import sys

import torch

from minidiff.cli import doctor
from minidiff.cli.doctor import fits, report
from minidiff.kernels import tiles
from tests.command import runner


def test_ten_lines_name_versions_devices_memory_and_what_would_run(monkeypatch, tmp_path, capsys):
    code, out, err = runner(monkeypatch, tmp_path, capsys)("doctor")
    lines = out.splitlines()
    assert (code, err) == (0, "") and len(lines) == 10
    assert f"torch {torch.__version__.partition('+')[0]}" in out and sys.version.split()[0] in out
    assert [line.split("  ")[0] for line in lines][:5] == ["minidiff", "system", "packages", "processor", "memory"]


def test_what_the_system_does_not_tell_is_unknown(monkeypatch):
    monkeypatch.setattr(doctor, "main_memory", lambda: (None, None))
    monkeypatch.setattr(tiles, "triton", None)
    lines = list(report())
    assert "memory       unknown, unknown free" in lines and "Triton       not installed; PyTorch's own attention is used" in lines
    assert list(fits(None, "cpu"))[0] == "SD 1.x not known"


def test_what_fits_is_weights_and_a_third_more():
    assert list(fits(6_000_000_000, "cpu")) == ["SD 1.x in float32 or bfloat16", "SD 2.x in bfloat16", "SDXL not"]
    assert list(fits(3_000_000_000, "cuda")) == ["SD 1.x in float16", "SD 2.x by --offload", "SDXL by --offload"]


def test_a_gpu_is_named_with_its_memory(monkeypatch):
    cuda = torch.cuda
    for name, value in {"is_available": True, "device_count": 1}.items():
        monkeypatch.setattr(cuda, name, lambda value=value: value)
    monkeypatch.setattr(cuda, "mem_get_info", lambda device: (30_000_000_000, 80_000_000_000))
    monkeypatch.setattr(cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(cuda, "get_device_capability", lambda device: (9, 0))
    assert doctor.gpu(torch).startswith("a GPU, 80.0 GB, 30.0 GB free, compute capability 9.0; CUDA")
