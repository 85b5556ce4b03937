"""What is read from nvidia-smi, which a script stands in for."""

import time
from types import SimpleNamespace

import pytest
import torch

from minidiff.bench import clocks
from minidiff.bench.clocks import ClockWatch, highest_clock, query

SCRIPT = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/asked"
case "$*" in
    *driver_version*) echo 580.159 ;;
    *clocks.max.sm*) echo 1980 ;;
    *loop-ms*) echo "345, 3201, 30, 75.5"; echo "1980, 3201, [N/A], 690"; echo "17"; exec sleep 60 ;;
    *) exit 1 ;;
esac
"""
GPU = torch.device("cuda", 0)


@pytest.fixture
def smi(tmp_path, monkeypatch):
    script = tmp_path / "nvidia-smi"
    script.write_text(SCRIPT)
    script.chmod(0o755)
    monkeypatch.setattr(clocks.shutil, "which", lambda name: str(script))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234"))
    return tmp_path / "asked"


def test_driver_and_highest_clock_are_asked_of_this_gpu(smi):
    assert query(GPU, "driver_version") == "580.159" and highest_clock(GPU) == 1980.0 and query(GPU, "nonsense") is None
    assert "--id=GPU-1234" in smi.read_text()


def test_a_watch_keeps_lowest_and_highest_of_what_it_saw(smi):
    with ClockWatch(GPU) as watch:
        while not smi.exists():
            time.sleep(0.01)
        time.sleep(0.3)
    assert watch.process.poll() is not None
    found = watch.read()
    assert found["clocks.sm"] == {"lowest": 345.0, "highest": 1980.0} and found["temperature.gpu"] == {"lowest": 30.0, "highest": 30.0}
    assert found["power.draw"]["highest"] == 690.0


def test_on_a_cpu_and_without_nvidia_smi_nothing_is_said(smi, monkeypatch):
    assert query(torch.device("cpu"), "driver_version") is None
    monkeypatch.setattr(clocks.shutil, "which", lambda name: None)
    with ClockWatch(GPU) as watch:
        pass
    assert watch.read() is None and highest_clock(GPU) is None
