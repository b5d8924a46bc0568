"""What is installed beside torch, numpy and safetensors is asked for where it is needed, and nowhere else."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from lbs.extras import EXTRAS

ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> subprocess.CompletedProcess[str]:
    """`code` in a fresh interpreter where none of the packages can be imported."""
    without = f"import sys\nfor name in {list(EXTRAS)!r}: sys.modules[name] = None\n"
    command = [sys.executable, "-c", without + textwrap.dedent(code)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_shipped_network_is_timed_without_them() -> None:
    words = ["bench", "--zoo", "cifar100-resnet20", "--batches", "1", "--rounds", "3", "--baselines", "float32"]
    done = run(f"from lbs.cli.main import main; sys.exit(main({words!r}))")
    assert done.returncode == 0, done.stderr
    assert "float32" in done.stdout


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("lbs.report('run')", "lbs.report needs (jinja2|matplotlib), .*: pip install jinja2 matplotlib"),
        ("lbs.data.digits()", "the data set digits needs scikit-learn, .*: pip install pillow scikit-learn tqdm"),
        (
            "from lbs.data.decode import read_rgb; read_rgb('x.png', 8)",
            "reading image files needs pillow, .*: pip install pillow scikit-learn tqdm",
        ),
    ],
)
def test_what_needs_one_says_what_installs_it(code: str, words: str) -> None:
    done = run(f"""
        import lbs, lbs.data
        try:
            {code}
        except lbs.errors.LbsError as error:
            print(error)
    """)
    assert re.fullmatch(words, done.stdout.strip()), done.stdout + done.stderr


def test_a_command_that_needs_one_says_so_in_one_line() -> None:
    done = run("from lbs.cli.main import main; sys.exit(main(['report', 'run']))")
    assert (done.returncode, done.stdout) == (2, "")
    expected = r"lbs report: lbs report needs matplotlib, which is not installed: pip install jinja2 matplotlib"
    assert re.fullmatch(expected, done.stderr.strip())


def test_doctor_is_content_without_them() -> None:
    done = run("from lbs.cli import main; sys.exit(main.main(['doctor']))")
    assert "absent   pillow: " in done.stdout
    assert "fix: pip install pillow\n" in done.stdout
    assert "needed and missing" not in done.stdout


def test_every_extra_is_one_of_the_project() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for package, extra in EXTRAS.values():
        line = next(line for line in text.splitlines() if line.startswith(f"{extra} = ["))
        assert f'"{package}"' in line
    required = next(line for line in text.splitlines() if line.startswith("dependencies = "))
    assert re.findall(r'"([a-z]+)', required) == ["torch", "numpy", "safetensors"]


# `lbs` of an index is another project's package; paths, such as dist/lbs-*.whl, are ours.
FROM_AN_INDEX = re.compile(r"pip3? install [^`;&#\n]*?(?<![\w./-])lbs(?![\w./-])")


def told_to_take_a_stranger(text: str) -> bool:
    return FROM_AN_INDEX.search(text) is not None


@pytest.mark.parametrize("words", ["lbs", "'lbs[onnx]'", "--no-deps lbs", "numpy lbs==0.1", "-U lbs>=1"])
def test_a_line_that_installs_lbs_from_an_index_is_seen(words: str) -> None:
    assert told_to_take_a_stranger(f"first: pip install {words}")


@pytest.mark.parametrize("words", ["-e .", "'.[onnx]'", "dist/lbs-*.whl", "timm; lbs doctor", "-e .` before `lbs`"])
def test_a_line_that_installs_something_else_is_not(words: str) -> None:
    assert not told_to_take_a_stranger(f"install lbs: pip install {words}")


def test_nothing_tells_to_install_lbs_from_an_index() -> None:
    folders = ("lbs", "lbs_kernels", "csrc", "docs", "examples", "benchmarks", "tools", "tests")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*")]
    files += [*ROOT.glob("*.md"), *ROOT.glob("*.toml"), ROOT / "setup.py", ROOT / "Makefile"]
    texts = [path for path in files if path.suffix in (".py", ".md", ".rst", ".html", ".sh", ".toml", ".h", "")]
    texts = [path for path in texts if path.is_file()]
    assert len(texts) > 300
    assert [str(path.relative_to(ROOT)) for path in texts if told_to_take_a_stranger(path.read_text("utf-8"))] == []
