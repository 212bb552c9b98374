"""What the groups of commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def add_command(commands: Any, name: str, run: Callable[[Any], None], text: str) -> argparse.ArgumentParser:
    """The parser of a command that calls `run` with its arguments."""
    parser: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser
