"""Measured times: the tables that keep them, the stopwatch, and calls recorded as CUDA graphs."""
