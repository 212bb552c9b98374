"""Commands of the published systems: list, train, sample."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from arimg.cli.command import add_command
from arimg.data.images import load_images
from arimg.train import loop
from arimg.train.grid import make_grid, save_png
from arimg.train.loop import RunConfig, fit
from arimg.train.system import SystemSettings, SystemTask, examples_of


def add_commands(commands: Any) -> None:
    inner = commands.add_parser("systems", help="the published systems: list, train, sample").add_subparsers(
        dest="systems", required=True, metavar="ACTION"
    )
    listing = add_command(inner, "list", run_list, "all systems, with what was measured of them")
    listing.add_argument("--markdown", action="store_true", help="as docs/systems.md")

    bench = add_command(
        inner, "bench", run_bench, "passes and milliseconds a picture, beside the plain method"
    )
    bench.add_argument("names", nargs="*", metavar="NAME", help="systems (default: all that are trained)")
    bench.add_argument("--runs", type=Path, default=Path("runs"), help="folder of the runs (default runs)")
    bench.add_argument("--n", type=int, default=4, help="pictures each (default 4)")
    bench.add_argument("--json", type=Path, help="file to write; what it holds of other systems is kept")
    bench.add_argument("--about", default="", help="machine and date in words (default: the file's)")

    train = add_command(inner, "train", run_train, "train the small version of a system on your pictures")
    train.add_argument("name", metavar="NAME")
    train.add_argument(
        "--data", type=Path, required=True, help="folder or tar of images; folders are classes"
    )
    train.add_argument("--out", type=Path, help="folder of the run, continued (default runs/NAME)")
    train.add_argument("--steps", type=int, help="optimizer steps (default: the system's)")
    train.add_argument("--batch-size", type=int, help="pictures per step (default: the system's)")
    train.add_argument("--lr", type=float, help="rate of AdamW (default: the system's)")
    train.add_argument("--limit", type=int, default=4000, help="pictures at most (default 4000)")
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--bf16", action="store_true", help="matrix products in bfloat16")

    sample = add_command(inner, "sample", run_sample, "pictures of a trained system, as a grid")
    sample.add_argument("name", metavar="NAME")
    sample.add_argument("--run", dest="folder", type=Path, help="folder of the training (default runs/NAME)")
    sample.add_argument("--class", dest="classes", action="append", metavar="CLASS", help="may be repeated")
    sample.add_argument("--n", type=int, default=4, help="pictures per class (default 4)")
    sample.add_argument("--seed", type=int, default=0)
    sample.add_argument(
        "--previews", action="store_true", help="a row per picture: after 1, 2, 4, ... tokens"
    )
    sample.add_argument("-o", "--out", type=Path, default=Path("grid.png"))


def run_list(args: argparse.Namespace) -> None:
    from arimg.systems import table

    print(table.markdown() if args.markdown else table.text(), end="" if args.markdown else "\n")


def run_bench(args: argparse.Namespace) -> None:
    from arimg.systems import find, measure, registry, systems

    names = args.names or [n for n in systems() if (args.runs / n / registry.MODEL_FILE).exists()]
    if not names:
        raise ValueError(f"expected trained systems in {args.runs}, found none: `arimg systems train NAME`")
    found = {}
    for name in names:
        trained = registry.load(args.runs / find(name).name)
        found[name] = measure.measure(trained, args.n)
        for way, w in found[name].ways.items():
            print(f"{name:18} {way:28} {w.passes:7g} passes {w.ms:9.1f} ms", flush=True)
    if args.json:
        measure.write(found, args.about, args.json)


def run_train(args: argparse.Namespace) -> None:
    from arimg.systems import find, registry

    system = find(args.name)
    out: Path = args.out or Path("runs") / system.name
    out.mkdir(parents=True, exist_ok=True)
    images, _ = load_images(args.data, system.image_size).split(0.1)
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(args.seed))[: args.limit]
    images = images.subset(chosen.numpy())
    tokenizer = system.tokenizer(images, out)
    torch.manual_seed(args.seed)
    model = system.make(tokenizer, len(images.classes))
    examples = examples_of(model.eval(), images, out / "examples.pt")
    settings = SystemSettings(lr=args.lr or system.lr, bf16=args.bf16)
    steps = args.steps or system.steps
    config = RunConfig(
        out, steps=steps, batch_size=args.batch_size or system.batch_size, seed=args.seed, warmup=50,
        ema=0.99, grid_every=steps,
    )  # fmt: skip
    shown = [i % len(images.classes) for i in range(32)]
    task = SystemTask(model.train(), examples, torch.from_numpy(images.labels), settings, shown)
    ema = fit(task, config, {"system": system.name, "steps": steps})
    if loop.is_first_process():
        registry.save(registry.Trained(system, ema, images.classes), out)  # type: ignore[arg-type]
        print(f"{out}: {system.title}, {steps} steps")


def run_sample(args: argparse.Namespace) -> None:
    from arimg.systems import find, registry

    system = find(args.name)
    trained = registry.load(args.folder or Path("runs") / system.name)
    if trained.system.name != system.name:
        raise ValueError(f"expected a run of {system.name}, got one of {trained.system.name}")
    names = args.classes or trained.classes[:8]
    unknown = [name for name in names if name not in trained.classes]
    if unknown:
        raise ValueError(f"unknown class {unknown[0]!r}; expected one of {', '.join(trained.classes)}")
    labels = torch.tensor([trained.classes.index(name) for name in names for _ in range(args.n)])
    if args.previews:
        shown = trained.model.previews(labels, seed=args.seed)
        save_png(make_grid(shown.flatten(0, 1), shown.shape[1]), args.out)
    else:
        save_png(make_grid(trained.model.pictures(labels, seed=args.seed), max(args.n, 4)), args.out)
    print(f"{args.out}: {len(labels)} pictures of {system.title}")
