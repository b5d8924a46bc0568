"""What pytest leaves alone where an extra is not installed: modules that cannot be imported without it."""

from __future__ import annotations

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("onnx") else ["lbs/onnx/*.py"]
