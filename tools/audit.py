"""Asks for known vulnerabilities of everything in locks/ that is installed here: `make audit`.

    0    none is known                      1    some are, each is named
    3    it could not be asked: nothing is said about them

pip-audit asks PyPI, and then OSV. A mirror of PyPI that does not tell vulnerabilities answers that it knows no such
package, which pip-audit takes for an answer; here it is none.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SERVICES = ("pypi", "osv")
COULD_NOT = 3


def main() -> int:
    """Audit every lock."""
    locks = sorted((ROOT / "locks").glob("*.txt"))
    reasons = []
    for service in SERVICES:
        answers = [asked(lock, service) for lock in locks]
        reasons += [f"{service}: {answer}" for answer in answers if isinstance(answer, str)]
        rows = [row for answer in answers if not isinstance(answer, str) for row in answer]
        skipped = [row for row in rows if "skip_reason" in row]
        if len(rows) > len(skipped):
            return told(service, rows, skipped)
        reasons += [f"{service}: {row['skip_reason']}" for row in skipped[:1]]
    print("no audit of dependencies could be made, nothing is said about them:")
    print("\n".join(dict.fromkeys(reasons)))
    return COULD_NOT


def asked(lock: Path, service: str) -> list[dict[str, Any]] | str:
    """Rows of pip-audit on a lock, or why there are none."""
    command = [sys.executable, "-m", "pip_audit", "--require-hashes", "--disable-pip", "--format", "json"]
    command += ["--progress-spinner", "off", "--timeout", "15", "--vulnerability-service", service, "-r", str(lock)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        rows: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except ValueError:
        return (done.stderr.strip() or f"pip-audit ended with {done.returncode}").splitlines()[-1]
    return rows


def told(service: str, rows: list[dict[str, Any]], skipped: list[dict[str, Any]]) -> int:
    """Print what was answered; whether something is vulnerable."""
    found = [(row["name"], row["version"], vuln) for row in rows for vuln in row.get("vulns", ())]
    for name, version, vuln in found:
        fixed = ", ".join(vuln["fix_versions"]) or "no release"
        print(f"{name} {version}: {vuln['id']}, mended in {fixed}")
    for row in skipped:
        print(f"not audited: {row['name']}: {row['skip_reason']}")
    print(f"{len(rows) - len(skipped)} packages audited by {service}, {len(found)} vulnerabilities known")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
