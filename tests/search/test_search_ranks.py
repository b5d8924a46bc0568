"""Two processes, each with its half of the batch: the same statistics, gates and scores on both."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lbs.train.distributed import reduce_mean

_WORKER = """
import sys, torch
import torch.distributed as dist
import lbs, lbs.models
from lbs.search.budget import Budget
from safetensors.torch import save_file
torch.set_num_threads(1)
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
x = torch.rand(8, 1, 8, 8)
model = lbs.prepare(lbs.models.create("digits_resnet8"), x, lbs.SearchConfig(importance="activation"))
lbs.calibrate(model, [x]).train()
budget = Budget(model, bops=0.02)
for steps in (0, 1):
    budget.steps = steps
    budget._assign_sides()
    model(x[4 * rank : 4 * rank + 4])
seen = [gate.statistic for _, gate, _ in budget.bit_gates()] + [gate.score for gate in budget.prune_gates()]
save_file({"seen": torch.cat([values.detach() for values in seen])}, sys.argv[3])
dist.destroy_process_group()
"""


def test_one_process_needs_no_agreement() -> None:
    value = torch.rand(3)
    assert reduce_mean(value) is value


@pytest.mark.slow
def test_gates_are_decided_on_the_whole_batch(tmp_path: Path) -> None:
    files = [tmp_path / f"rank{rank}.safetensors" for rank in range(2)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORKER, str(rank), str(tmp_path / "meeting"), str(files[rank])], env=environment
        )
        for rank in range(2)
    ]
    assert [worker.wait(timeout=300) for worker in workers] == [0, 0]
    first, second = (load_file(file)["seen"] for file in files)
    assert torch.equal(first, second)
    assert first.isfinite().all()
