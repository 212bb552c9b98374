"""Commands that use a trained model: generate, reconstruct, classes, info."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from arimg import models, pipelined, show_config
from arimg.cli.command import add_command
from arimg.data.images import open_image, to_tensor
from arimg.train.grid import make_grid, save_png


def add_commands(commands: Any) -> None:
    generate = add_command(commands, "generate", run_generate, "make pictures of a class")
    generate.add_argument(
        "--class", dest="classes", action="append", metavar="NAME", help="class; may be repeated"
    )
    generate.add_argument("--n", type=_positive, default=16, help="pictures per class (default 16)")
    generate.add_argument("--batch", type=_positive, default=16, help="pictures at once (default 16)")
    generate.add_argument(
        "--overlap", action="store_true",
        help="draw a batch while the one before is decoded: faster where torch leaves cores idle",
    )  # fmt: skip
    generate.add_argument("--seed", type=int, default=0, help="picture i is drawn with seed + i (default 0)")
    generate.add_argument(
        "-o", "--out", type=Path, default=Path("out.png"), help="PNG to write (default out.png)"
    )
    generate.add_argument(
        "--steps-grid", action="store_true", help="one row per picture: its previews, scale by scale"
    )
    generate.add_argument("--columns", type=_positive, help="pictures per row (default: about square)")
    generate.add_argument("--cfg", type=float, help="guidance strength (default: the model's)")
    generate.add_argument("--top-k", type=int, help="draw among the k likeliest tokens; 0: all")
    generate.add_argument(
        "--top-p", type=float, help="draw among the likeliest tokens of this total probability"
    )
    generate.add_argument("--more-smooth", action="store_true", help="mix codes instead of drawing one")
    _add_model(generate)

    reconstruct = add_command(
        commands, "reconstruct", run_reconstruct, "pass a picture through the tokenizer"
    )
    reconstruct.add_argument("image", type=Path)
    reconstruct.add_argument("-o", "--out", type=Path, help="PNG: original beside reconstruction")
    _add_model(reconstruct)

    _add_model(add_command(commands, "classes", run_classes, "list a model's classes"))
    add_command(
        commands, "info", lambda _: print(show_config()), "versions, what was built, what could not load"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    text = "a bundled model, a folder with tokenizer.safetensors and var.safetensors, or a generator's file"
    parser.add_argument(
        "--model", default=models.DEFAULT, metavar="PATH", help=f"{text} (default {models.DEFAULT})"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="PATH", help="the tokenizer's file, with a generator's file"
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def run_generate(args: argparse.Namespace) -> None:
    bundle = models.load(args.model, args.tokenizer)
    if not args.classes:
        raise ValueError("give a class with --class NAME; `arimg classes` lists them")
    labels = torch.tensor([bundle.label(name) for name in args.classes for _ in range(args.n)])
    started = time.perf_counter()
    done, interrupted = _in_batches(bundle, labels, args)
    if args.steps_grid:
        picture = make_grid(done.flatten(0, 1), done.shape[1])
    else:
        picture = make_grid(done[:, -1], args.columns or _square_columns(len(done)))
    save_png(picture, args.out)
    made = f"{len(done)} of {len(labels)}" if interrupted else str(len(done))
    print(f"{args.out}: {made} pictures in {time.perf_counter() - started:.1f} s")
    if interrupted:  # said by exit code, too
        raise KeyboardInterrupt


def _in_batches(bundle: models.Bundle, labels: Tensor, args: argparse.Namespace) -> tuple[Tensor, bool]:
    """Pictures [B, 1, 3, H, W], or with previews [B, steps, 3, H, W], and whether Ctrl-C ended them.

    Before the first batch is over the interrupt passes.
    """
    chosen = {"cfg": args.cfg, "top_k": args.top_k, "top_p": args.top_p}
    sampling = {**bundle.sampling, **{k: v for k, v in chosen.items() if v is not None}}

    def make(first: int) -> list[Tensor]:
        part = labels[first : first + args.batch]
        steps = bundle.var.stream(part, seed=args.seed + first, more_smooth=args.more_smooth, **sampling)
        maps = [step.f_hat for step in steps]
        return maps if args.steps_grid else maps[-1:]

    def finish(maps: list[Tensor]) -> Tensor:
        return torch.stack([bundle.tokenizer.decode_features(f_hat) for f_hat in maps], 1)

    batches = range(0, len(labels), args.batch)
    results = pipelined(make, finish, batches) if args.overlap else (finish(make(b)) for b in batches)
    done: list[Tensor] = []
    with tqdm(total=len(labels), unit="picture", disable=None, leave=False) as bar:  # on terminals
        try:
            for pictures in results:
                done.append(pictures)
                bar.update(len(pictures))
        except KeyboardInterrupt:
            if not done:
                raise
            return torch.cat(done), True
    return torch.cat(done), False


def _square_columns(count: int) -> int:
    return int(count**0.5 + 0.999)


def run_reconstruct(args: argparse.Namespace) -> None:
    bundle = models.load(args.model, args.tokenizer)
    if not args.image.exists():
        raise FileNotFoundError(f"no such image: {args.image}")
    height, width = bundle.tokenizer.image_size
    if height != width:
        raise ValueError(f"expected a tokenizer of square images, got {height} x {width}")
    image = to_tensor(open_image(args.image, height))[None]
    tokens = bundle.tokenizer.encode(image)
    again = bundle.tokenizer.decode(tokens)
    out = args.out or args.image.with_name(f"{args.image.stem}-reconstructed.png")
    save_png(make_grid(torch.cat((image, again)), 2), out)
    print(f"{out}: {sum(t.numel() for t in tokens)} tokens, PSNR {_psnr(image, again):.2f} dB")


def _psnr(a: Tensor, b: Tensor) -> float:
    return float(-10 * (a - b).square().mean().clamp_min(1e-10).log10())


def run_classes(args: argparse.Namespace) -> None:
    bundle = models.load(args.model, args.tokenizer)
    print("\n".join(bundle.classes) if bundle.classes else f"{bundle.var.num_classes} classes without names")
