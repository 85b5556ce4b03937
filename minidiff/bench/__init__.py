"""Benchmarks against diffusers and PyTorch: speed, memory and errors, measured side by side. See README.md."""
