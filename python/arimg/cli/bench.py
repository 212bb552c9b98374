"""Commands that measure: bench models."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from arimg import benchmark
from arimg.cli.command import add_command

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def add_commands(commands: Any) -> None:
    bench = commands.add_parser("bench", help="measure this machine").add_subparsers(
        dest="bench", required=True, metavar="WHAT"
    )
    text = "seconds a picture, beside the released loop in plain PyTorch"
    models = add_command(bench, "models", run_models, text)
    models.add_argument("--model", default="var-d16", help=", ".join(benchmark.MODELS))
    models.add_argument(
        "--peer",
        default="eager",
        metavar="PEERS",
        help="peers with commas between: eager, and compile for it under torch.compile (default eager)",
    )
    models.add_argument("--dtype", choices=DTYPES, default="float32", help="of the transformer's weights")
    models.add_argument("--batch", type=int, default=1, help="pictures at once (default 1)")
    models.add_argument("--tokens", type=int, help="of a LlamaGen's picture (default: all)")
    models.add_argument("--repeat", type=int, default=3, help="timed runs of each (default 3)")
    models.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    models.add_argument("--seed", type=int, default=0)
    models.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="writes the result here, too; after Ctrl-C what there is of it",
    )
    models.add_argument("--plot", type=Path, metavar="FILE", help="draws a bar chart (needs matplotlib)")


def run_models(args: argparse.Namespace) -> None:
    settings = benchmark.Settings(
        args.model, benchmark.chosen(args.peer.split(",")), DTYPES[args.dtype], args.batch, args.tokens,
        args.repeat, args.threads, args.seed,
    )  # fmt: skip
    if args.plot is not None:
        benchmark.require_matplotlib()
    result = benchmark.measure(settings, progress=True)
    if args.json is not None:
        args.json.write_text(json.dumps(result, indent=2) + "\n")
    print(benchmark.table(result))
    if args.plot is not None:
        benchmark.plot(result, args.plot)
    if result["interrupted"]:  # said by exit code, too
        raise KeyboardInterrupt
