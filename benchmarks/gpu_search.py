"""What searching costs on a GPU: bench_search.py on a small and a large network, each in a process of its own."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.gpu_checks import call

SCRIPT = Path(__file__).with_name("bench_search.py")
# Steps of the first are launches and little else, those of the second convolutions.
NETWORKS = {"cifar_resnet20": 128, "resnet18": 128}
OVER = "the time was up"
TAIL = 3000  # characters kept of what it printed


ROW, SCHEDULE = "cifar100-resnet20", "30+200"


def row(out: Path, data: str, seconds: float) -> dict[str, Any]:
    """One whole row of the results, in DIR/row: search, fine-tuning, packing and verification, recorded in the body."""
    if not data:
        return {"passed": False, "reason": "there is no CIFAR-100: name it by --data, as lbs reproduce takes it"}
    record = out / "row_record.json"
    record.unlink(missing_ok=True)
    command = [sys.executable, "-m", "lbs", "reproduce", ROW, "--schedule", SCHEDULE, "--data", data]
    command += ["--out", str(out / "row"), "--record", str(record), "--device", "cuda", "--amp", "bf16"]
    code, text = call(command, seconds)
    found = json.loads(record.read_text()) if record.exists() else {}
    return {
        "passed": code == 0,
        "ended": OVER if code is None else f"exit code {code}",
        "record": found,
        "tail": text[-TAIL:],
    }


def measure(out: Path, seconds: float) -> dict[str, Any]:
    """DIR/search_<network>.json of every network, as bench_search.py writes them, and how far it came."""
    found: dict[str, Any] = {}
    for place, (network, batch) in enumerate(NETWORKS.items()):
        path, begin = out / f"search_{network}.json", time.monotonic()
        path.unlink(missing_ok=True)  # of another run
        command = [sys.executable, str(SCRIPT), "--model", network, "--batch", str(batch), "--amp", "bf16"]
        code, text = call([*command, "--device", "cuda", "--output", str(path)], seconds / (len(NETWORKS) - place))
        seconds -= time.monotonic() - begin
        found[network] = {
            "batch": batch,
            "rows": json.loads(path.read_text())["rows"] if path.exists() else [],
            "ended": OVER if code is None else f"exit code {code}",
            "tail": text[-TAIL:],
        }
    return {"passed": all(one["ended"] in (OVER, "exit code 0") for one in found.values()), "networks": found}
