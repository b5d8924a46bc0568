"""`python -m lbs` is `lbs`."""

from __future__ import annotations

import sys

from lbs.cli.main import main

sys.exit(main())
