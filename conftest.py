"""What pytest leaves alone where an extra is not installed, and what of this machine's user tests do not touch."""

from __future__ import annotations

import importlib.util
import os
import tempfile

import pytest

# Modules that cannot be imported without it.
collect_ignore_glob = [] if importlib.util.find_spec("onnx") else ["lbs/onnx/*.py"]


def pytest_configure(config: pytest.Config) -> None:
    """Tables of measured times are neither read nor written where the user's lie; workers share those of their run."""
    if "LBS_TUNING_DIR" not in os.environ:
        folder = tempfile.TemporaryDirectory(prefix="lbs-tests-tuning-")
        os.environ["LBS_TUNING_DIR"] = folder.name
        config.add_cleanup(folder.cleanup)
