"""The parts of `benchmarks/gpu.py`, one file for each; every one runs in a process of its own."""
