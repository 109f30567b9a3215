"""The parts of `launch/benchmark.py`."""
