"""Commands that make a model: data, train, evaluate, bundle."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from arimg import models, tokenizers
from arimg.cli.command import add_command
from arimg.data.images import Images, load_images
from arimg.generators import VAR
from arimg.tokenizers import VQVAE
from arimg.train import loop
from arimg.train.loop import RunConfig, fit
from arimg.train.tokenizer import TokenizerSettings, TokenizerTask
from arimg.train.var import VarSettings, VarTask, cached_tokens, class_weights


def add_commands(commands: Any) -> None:
    data = commands.add_parser("data", help="make a data set").add_subparsers(
        dest="data", required=True, metavar="SET"
    )
    emoji = add_command(
        data, "emoji", run_emoji, "emoji drawings in five styles (needs npm and arimg[train])"
    )
    emoji.add_argument("--out", type=Path, required=True, help="folder for the tar")
    emoji.add_argument("--size", type=int, default=64, help="pixels (default 64)")
    emoji.add_argument("--packages", type=Path, help="folder that keeps the npm packages")

    train = commands.add_parser("train", help="train a part").add_subparsers(
        dest="part", required=True, metavar="PART"
    )
    tokenizer = add_command(
        train, "tokenizer", run_tokenizer, "train a VQ tokenizer on a folder or tar of images"
    )
    _add_run(tokenizer, RunConfig(Path()))
    _add_tokenizer(tokenizer)
    var = add_command(train, "var", run_var, "train a VAR generator on the tokens of a tokenizer")
    _add_run(var, RunConfig(Path()))
    _add_var(var)

    evaluate = add_command(commands, "evaluate", run_evaluate, "KID-EffLite0 and PSNR on held-out images")
    _add_data(evaluate)
    evaluate.add_argument("--model", default=models.DEFAULT, metavar="PATH")
    evaluate.add_argument("--limit", type=int, help="held-out images to use (default: all)")
    evaluate.add_argument("--seed", type=int, default=0)


def _add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, help="folder or tar of images; folders are classes")
    parser.add_argument(
        "--held-out", type=float, default=0.1, help="fraction of names kept aside (default 0.1)"
    )


def _add_run(parser: argparse.ArgumentParser, defaults: RunConfig) -> None:
    _add_data(parser)
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the run; a run found there is continued"
    )
    for name, text in {
        "steps": "optimizer steps in all",
        "batch_size": "images per step",
        "seed": "of everything random",
        "warmup": "steps of rising rate",
        "decay": "last fraction of the steps, with a falling rate",
        "ema": "decay of the weights' average",
        "save_every": "steps between checkpoints",
        "grid_every": "steps between sample grids",
    }.items():
        value = getattr(defaults, name)
        flag = "--" + name.replace("_", "-")
        parser.add_argument(flag, type=type(value), default=value, help=f"{text} (default {value})")


def _add_settings(parser: argparse.ArgumentParser, defaults: Any, skip: Sequence[str] = ()) -> None:
    """One option per field of a settings dataclass."""
    for name, value in asdict(defaults).items():
        if name in skip:
            continue
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(flag, type=type(value), default=value, help=f"(default {value})")


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=int, default=64, help="image side in pixels (default 64)")
    parser.add_argument("--vocab", type=int, default=1024, help="codes (default 1024)")
    parser.add_argument("--z-channels", type=int, default=16, help="code width (default 16)")
    parser.add_argument("--ch", type=int, default=32, help="channels at full size (default 32)")
    parser.add_argument(
        "--ch-mult", type=_numbers, default=(1, 1, 2, 4), help="widths per level (default 1,1,2,4)"
    )
    parser.add_argument("--blocks", type=int, default=1, help="residual blocks per level (default 1)")
    parser.add_argument(
        "--scales", type=_numbers, default=(1, 2, 3, 4, 6, 8), help="token maps (default 1,2,3,4,6,8)"
    )
    parser.add_argument("--init", type=Path, help="start from this tokenizer; its sizes hold")
    _add_settings(parser, TokenizerSettings())


def _add_var(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer.safetensors")
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--heads", type=int, default=3)
    parser.add_argument("--weight", type=_weight, action="append", default=[], metavar="PATTERN=FACTOR",
                        help="sample matching classes that much more often; may be repeated")  # fmt: skip
    parser.add_argument(
        "--show", action="append", default=[], metavar="CLASS", help="class shown in the grids"
    )
    parser.add_argument(
        "--sampling", type=json.loads, default={}, help="JSON stored with the model: cfg, top_k, top_p"
    )
    _add_settings(parser, VarSettings(), skip=("seed",))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers like 1,2,4, got {text!r}") from None


def _weight(text: str) -> tuple[str, float]:
    pattern, _, factor = text.rpartition("=")
    try:
        return pattern, float(factor)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected PATTERN=FACTOR, got {text!r}") from None


def _run_config(args: argparse.Namespace) -> RunConfig:
    names = RunConfig.__dataclass_fields__
    return RunConfig(**{name: getattr(args, name) for name in names})


def _settings(kind: Any, args: argparse.Namespace) -> Any:
    return kind(**{name: getattr(args, name) for name in kind.__dataclass_fields__})


def _recorded(args: argparse.Namespace) -> dict[str, Any]:
    return {
        k: v if isinstance(v, int | float | str | tuple | list) else str(v)
        for k, v in vars(args).items()
        if k != "run"
    }


def run_emoji(args: argparse.Namespace) -> None:
    from arimg.data import emoji

    drawings, classes = emoji.build(args.out, args.size, args.packages)
    print(f"{args.out / f'emoji{args.size}.tar'}: {drawings} drawings, {classes} classes")


def _new_tokenizer(args: argparse.Namespace) -> VQVAE:
    factor = 2 ** (len(args.ch_mult) - 1)
    if args.scales[-1] * factor != args.size:
        wanted = f"{args.size / factor:g}"
        raise ValueError(f"expected a last scale of size / {factor} = {wanted}, got {args.scales[-1]}")
    return VQVAE(args.vocab, args.z_channels, args.ch, args.ch_mult, args.scales, blocks=args.blocks)


def run_tokenizer(args: argparse.Namespace) -> None:
    torch.manual_seed(args.seed)
    model = tokenizers.load(args.init).train() if args.init else _new_tokenizer(args)
    train, _ = load_images(args.data, model.image_size[0]).split(args.held_out)
    task = TokenizerTask(model, train, _settings(TokenizerSettings, args))
    ema = fit(task, _run_config(args), _recorded(args))
    assert isinstance(ema, VQVAE)
    if loop.is_first_process():
        tokenizers.save(ema, args.out / models.TOKENIZER_FILE)
        print(f"{args.out / models.TOKENIZER_FILE}: {args.steps} steps")


def run_var(args: argparse.Namespace) -> None:
    tokenizer = tokenizers.load(args.tokenizer)
    images = load_images(args.data, tokenizer.image_size[0])
    train, _ = images.split(args.held_out)
    settings = _settings(VarSettings, args)
    torch.manual_seed(args.seed)
    model = VAR(tokenizer, len(images.classes), args.depth, args.width, args.heads, shared_adaln=True)
    bundle = models.Bundle(tokenizer, model, images.classes, args.sampling)
    shown = torch.tensor([bundle.label(name) for name in args.show for _ in range(8)]) if args.show else None
    with loop.first_process_first():
        tokens = cached_tokens(args.out / "tokens.pt", tokenizer, train, settings)
    weights = class_weights(tokens.labels, images.classes, dict(args.weight))
    ema = fit(VarTask(model, tokens, settings, weights, shown), _run_config(args), _recorded(args))
    assert isinstance(ema, VAR)
    if loop.is_first_process():
        models.save(models.Bundle(tokenizer, ema, images.classes, args.sampling), args.out / "model")
        print(f"{args.out / 'model'}: {args.steps} steps")


def run_evaluate(args: argparse.Namespace) -> None:
    from arimg.evaluate.report import evaluate

    bundle = models.load(args.model)
    images = load_images(args.data, bundle.tokenizer.image_size[0], bundle.classes or None)
    train, held_out = images.split(args.held_out)
    chosen: Images = held_out
    if args.limit is not None and args.limit < len(held_out):
        order = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(args.seed))
        chosen = held_out.subset(order[: args.limit].numpy())
    print(evaluate(bundle.tokenizer, bundle.var, train, chosen, args.seed, **bundle.sampling))
