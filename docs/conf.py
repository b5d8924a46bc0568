"""Sphinx builds these pages: make docs."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import lbs  # noqa: E402  the paths come first

project = "lbs"
author = "the lbs developers"
version = release = lbs.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "docstrings"]
highlight_language = "text"  # of blocks that do not say
html_theme = "furo"
html_title = f"lbs {release}"
html_show_copyright = False
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True  # as they are written, not as this machine prints them
python_maximum_signature_line_length = 100
nitpicky = False  # types of torch have no pages here
