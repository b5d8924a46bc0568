#!/bin/sh
# Creates the virtual environment $1 with the first Python >= 3.10 that can. Keeps one that works.
set -eu
venv=$1

if [ -x "$venv/bin/python" ] && "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    exit 0
fi

found=""
for python in ${PYTHON3:-} python3 python3.14 python3.13 python3.12 python3.11 python3.10; do
    command -v "$python" >/dev/null 2>&1 || continue
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || continue
    found=$python
    # Debian splits ensurepip from python3; venv fails half-way without it.
    "$python" -c 'import ensurepip, venv' 2>/dev/null || continue
    echo "creating $venv with $("$python" --version) ($(command -v "$python"))"
    exec "$python" -m venv --clear "$venv"
done

if [ -n "$found" ]; then
    echo "error: $("$found" --version) is here, but it cannot create virtual environments (no ensurepip)." >&2
    echo "       On Debian or Ubuntu: sudo apt-get install python3-venv      then run make again." >&2
else
    echo "error: no Python 3.10 or newer was found." >&2
    echo "       On Debian or Ubuntu: sudo apt-get install python3 python3-venv python3-dev g++" >&2
    echo "       Or name one: PYTHON3=/path/to/python3 make ..." >&2
fi
exit 1
