"""The part of open_clip that benchmarks need where it is not installed: tokenizer.py."""
