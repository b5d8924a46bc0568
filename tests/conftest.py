"""What holds for every test."""

from __future__ import annotations

import os

# One processor for each of several test processes, before torch is imported: threads that wait for one another on
# processors that are taken make milliseconds of the microseconds of a small operation.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
