"""The count of instructions: its loops, its rows, and the table that is made of them."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed; install it: pip install triton")

from benchmarks import gpu_instructions, readme_tables
from lbs_kernels import extension

ROOT = Path(__file__).resolve().parents[2]
KERNELS = str(ROOT / "tests" / "kernels")


@dataclass(frozen=True)
class Code:
    """Machine code as the disassembler prints it."""

    sass: str


def code(*texts: str) -> Code:
    return Code("\n".join(f"/*{16 * at:04x}*/ {text} ;" for at, text in enumerate(texts)))


def test_the_loop_is_parted_where_branches_jump_over_its_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(KERNELS)
    rest = ["FADD R1, R1, R1"] * 40
    # 2 outside; always 1 + 1 behind the branches; 40 + 1 if the first is not taken, 40 more if the second is not.
    jump, end = f"@P0 BRA 0x{16 * 84:x}", 84
    texts = ["MOV R1, 0", "FADD R1, R1, R1", jump, *rest[:-1], rest[0], jump, *rest, "FMUL R2, R2, R2"]
    assert len(texts) == end + 1
    found = gpu_instructions.loop_parts(code(*texts, "@P1 BRA 0x10", "EXIT"))
    assert found == (2, [4, 41, 40])
    assert gpu_instructions.loop_parts(code("MOV R1, 0", "EXIT")) == (2, [])


@pytest.mark.skipif(extension.cuda is None, reason=f"CUDA module missing: {extension.cuda_reason}")
def test_layers_are_counted_and_kept_beside_other_states(tmp_path: Path) -> None:
    """In a process of its own: the command imports the kernels of the tree it is given."""
    file = tmp_path / "instructions.json"
    earlier = {"commit": "0123456", "triton": "3.6.0", "rows": []}
    file.write_text(json.dumps({"level": "instructions", "states": {"before": earlier}}))
    layer = "1x1 64->256 at 56"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_instructions.py"), "--layer", layer, "--save", str(file)]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    body = json.loads(file.read_text())
    assert body["states"]["before"] == earlier
    rows = body["states"]["now"]["rows"]
    assert [(row["layer"], row["bits"]) for row in rows] == [(layer, "8/8"), (layer, "4/4")]
    for row in rows:
        assert row["spill_bytes"] == 0
        assert 0 < row["registers"] <= 255
        assert "GMMA" in row["instruction"]
        assert row["per_product"] > 1
    title, _, heads, _, *lines = readme_tables.instructions_table("file.json", body)
    assert "not timed" in title
    assert len(lines) == 2
    assert all(line.count("|") == heads.count("|") for line in lines)
    assert layer in lines[0]


def test_rows_of_two_states_stand_side_by_side() -> None:
    row = {"layer": "a", "bits": "8/8", "kernel": "triton:x", "registers": 300, "spill_bytes": 8, "shared_bytes": 2048}
    row |= {"instruction": "IGMMA", "per_product": 2.0, "memory": {"STS": 1, "IDP": 2, "BAR": 3}}
    state = {"commit": "0", "triton": "3", "rows": [row]}
    body = {"target": "sm_90", "batch": 128, "states": {"before": state, "now": state}}
    *_, before, now = readme_tables.instructions_table("file.json", body)
    assert before.startswith("| a | 8/8 | before |")
    assert now.startswith("|  |  | now |")
    assert "300 (spills 8 B) | 2 | 1, 2, 3 |" in now
