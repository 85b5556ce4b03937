"""The machine in numbers and in a line."""

import torch

from minidiff.machine import format_device, format_machine, read_machine


def test_the_machine_is_told_in_a_line():
    shown = format_machine({"gpu": "H", "processor": "P", "usable": 1, "cores": 2, "versions": "torch 2"})
    assert shown == "H, P, 1 of 2 cores; torch 2\n"
    assert f"torch {torch.__version__.partition('+')[0]}" in format_machine(read_machine())


def test_a_cpu_is_told_by_its_threads():
    assert format_device(torch.device("cpu")).startswith(f"CPU, {torch.get_num_threads()} thread")
