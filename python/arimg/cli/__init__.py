"""The command line `arimg`. Errors are one sentence on stderr and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from arimg.cli import bench, pictures, systems, training

__all__ = ["main"]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="arimg", description="Autoregressive image models: generate, train, measure."
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    pictures.add_commands(commands)
    training.add_commands(commands)
    systems.add_commands(commands)
    bench.add_commands(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code (0; 2 for a user's mistake; 130 when interrupted)."""
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (ValueError, TypeError, OSError) as error:
        message = " ".join(str(error).split())
        print(f"arimg: error: {message or type(error).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("arimg: interrupted", file=sys.stderr)
        return 130
    return 0
