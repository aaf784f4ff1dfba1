"""`python -m cli` and `python PATH/cli` without an installation."""

import sys
from pathlib import Path

if not __package__:  # run as a folder: its parent is what imports start from
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from cli import app

app()
