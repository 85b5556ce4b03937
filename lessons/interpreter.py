"""Turns on Triton's interpreter where there is no GPU: kernels then run as Python, on NumPy arrays.

Triton reads the variable when a kernel is defined, so this has to be imported before minidiff, whose attention defines some.
"""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
