"""A plugin of pytest: after LBS_STOP_AT (time.time()) no test begins, and the run ends in order.

A compute-sanitizer that is killed says nothing of what it saw.
"""

from __future__ import annotations

import os
import time

import pytest


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """The test that ends was the last one."""
    if time.time() >= float(os.environ["LBS_STOP_AT"]):
        item.session.shouldstop = "the time was up"
