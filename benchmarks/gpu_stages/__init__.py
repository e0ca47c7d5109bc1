"""The stages of `benchmarks/gpu.py`, one a module: `run(log)` does it, and returns why it was skipped, if it was."""
