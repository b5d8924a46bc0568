"""Files that were changed at random: refused or run, nothing else; see file_mutants.py."""

from __future__ import annotations

import os
from pathlib import Path

import file_mutants
import pytest

SEED = int(os.environ.get("LBS_FUZZ_SEED", "0"))  # a run by night may give another one each time


@pytest.mark.filterwarnings("ignore")
def test_mutated_files_are_refused_or_run(tmp_path: Path) -> None:
    outcome = file_mutants.attack(tmp_path, SEED, 200)
    assert not outcome.failures
    assert outcome.verdicts["refused"] > 50
    assert outcome.verdicts["loaded and run"] > 10, outcome  # else nothing is said about what is accepted


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_many_mutated_files(tmp_path: Path) -> None:
    outcome = file_mutants.attack(tmp_path, SEED + 1, 20_000)
    print(outcome)
    assert not outcome.failures
