"""`python -m lbs` is `lbs`."""

from __future__ import annotations

import os
import sys

# `python -m` looks for every module in the working folder first, and that may be a stranger's, downloaded with what is
# in it: nothing is imported from there but this package itself, where it is a checkout.
try:
    _here = os.path.realpath(os.getcwd())
except FileNotFoundError:  # it was deleted, and nothing can be imported from there
    _here = ""
if _here and _here != os.path.dirname(os.path.dirname(os.path.realpath(__file__))):
    sys.path[:] = [place for place in sys.path if os.path.realpath(place or ".") != _here]

from lbs.cli.main import main

sys.exit(main())
