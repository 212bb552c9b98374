"""How long a picture takes, beside the released loop in plain PyTorch: what `arimg bench models` runs.

Models have the released sizes and random weights, scaled so that the logits have a spread and a sampler has
something to choose from. All runs are in turn, so that what disturbs the machine disturbs each of them; how
much other programs did meanwhile stands in the result.
"""

from __future__ import annotations

import datetime
import importlib.util
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from arimg import _library, ops
from arimg.generators import VAR, LlamaGen
from arimg.nn.checkpoint import without_weights
from arimg.reference import plain_llamagen, plain_var
from arimg.tokenizers import VQVAE
from arimg.tokenizers.vqvae import SCALES_256, SCALES_512

OURS = "arimg"
PEERS = ("eager", "compile")


@dataclass(frozen=True)
class _Var:
    """A VAR and its tokenizer."""

    depth: int
    scales: tuple[int, ...] = SCALES_256
    shared_adaln: bool = False
    ch: int = 160
    ch_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    vocab: int = 4096


@dataclass(frozen=True)
class _Llama:
    depth: int
    width: int
    heads: int
    vocab: int = 16384
    grid: int = 16


MODELS: dict[str, _Var | _Llama] = {
    **{f"var-d{d}": _Var(d) for d in (16, 20, 24, 30)},
    "var-d36": _Var(36, SCALES_512, shared_adaln=True),
    "llamagen-b": _Llama(12, 768, 12),
    "llamagen-l": _Llama(24, 1024, 16),
    "llamagen-xl": _Llama(36, 1280, 20),
    "llamagen-xxl": _Llama(48, 1536, 24),
    "var-tiny": _Var(2, (1, 2, 4), ch=32, ch_mult=(1, 2), vocab=64),
    "llamagen-tiny": _Llama(2, 64, 2, vocab=128, grid=4),
}


@dataclass(frozen=True)
class Settings:
    """What to measure. tokens: of a LlamaGen's picture; None: all. compiler: a backend of torch.compile."""

    model: str = "var-d16"
    peers: tuple[str, ...] = ("eager",)
    dtype: torch.dtype = torch.float32
    batch: int = 1
    tokens: int | None = None
    repeat: int = 3
    threads: int = 1
    seed: int = 0
    compiler: str = "inductor"

    def __post_init__(self) -> None:
        if self.model not in MODELS:
            raise ValueError(f"expected a model of {', '.join(MODELS)}, got {self.model!r}")
        unknown = [p for p in self.peers if p not in PEERS]
        if unknown:
            raise ValueError(f"expected peers of {', '.join(PEERS)}, got {unknown[0]!r}")
        size = MODELS[self.model]
        if self.tokens is not None:
            if isinstance(size, _Var):
                raise ValueError("expected a number of tokens for a LlamaGen alone; a VAR draws whole scales")
            if not 0 < self.tokens <= size.grid**2:
                raise ValueError(f"expected tokens from 1 to {size.grid**2}, got {self.tokens}")
        for name in ("batch", "repeat", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"expected {name} >= 1, got {getattr(self, name)}")

    def part(self) -> bool:
        """Whether a run makes only a part of a picture."""
        size = MODELS[self.model]
        return isinstance(size, _Llama) and self.tokens is not None and self.tokens < size.grid**2


@dataclass(frozen=True)
class Case:
    """Functions that make the same pictures, and the least that a picture costs."""

    run: dict[str, Callable[[], Any]]  # a peer's gives its trace
    difference: Callable[[Any], float]  # of our logits for the tokens of a trace, in standard deviations
    steps: int
    bytes_and_flops: list[tuple[float, float]]  # of each step's products; the decoder's last, in float32


def measure(settings: Settings, progress: bool = False) -> dict[str, Any]:
    """Runs everything in turn: {"machine", "settings", "ceilings", "rows", "skipped", ...}, as JSON values.

    Interrupted by Ctrl-C, it gives what was measured until then with "interrupted" true; before the first
    timed run the interrupt passes.
    """
    total = (settings.repeat + 1) * (1 + len(settings.peers))
    bar = tqdm(total=total, disable=not progress, desc=settings.model, unit="run", smoothing=0)
    with _threads(settings.threads), bar:
        bar.set_postfix_str("weights")
        case = _build(settings)
        bar.set_postfix_str("ceilings")
        limits = ceilings(settings.dtype)
        first, differences, skipped = _warm_up(case, settings.dtype, bar)
        times, interrupted, others = _in_turn({n: case.run[n] for n in first}, settings.repeat, bar)
    floor = _floor(case, limits, settings.dtype)
    ours = statistics.median(times[OURS])
    pictures = None if settings.part() else settings.batch
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "machine": machine(settings.threads) | {"other_programs": others},
        "settings": {
            "model": settings.model, "peers": list(settings.peers), "batch": settings.batch,
            "dtype": str(settings.dtype).removeprefix("torch."), "tokens": settings.tokens,
            "repeat": settings.repeat, "seed": settings.seed,
        },
        "interrupted": interrupted,
        "ceilings": limits,
        "floor_s": floor,
        "logits_differ_by_std": differences,
        "rows": [_row(n, t, first[n], pictures, case.steps, ours, floor) for n, t in times.items()],
        "skipped": skipped,
    }  # fmt: skip


def _warm_up(
    case: Case, dtype: torch.dtype, bar: Any
) -> tuple[dict[str, float], dict[str, float], dict[str, str]]:
    """The first run of each: its seconds, by how much a peer's logits differ, and why a peer cannot run.

    A compiler may be missing; then its peer is left out. What disagrees is not timed at all.
    """
    first: dict[str, float] = {}
    differences: dict[str, float] = {}
    skipped: dict[str, str] = {}
    for name, function in case.run.items():
        bar.set_postfix_str(f"{name}, first run")
        start = time.perf_counter()
        try:
            trace = function()
        except Exception as error:
            if name != "compile":
                raise
            skipped[name] = _cause(error)
            bar.total -= bar.total // len(case.run)
            continue
        first[name] = time.perf_counter() - start
        bar.update()
        if name != OURS:
            bar.set_postfix_str(f"{name}, logits")
            differences[name] = _agreed(name, case.difference(trace), dtype)
    return first, differences, skipped


def _cause(error: BaseException) -> str:
    """What a compiler said at the bottom of its wrappers, in a line."""
    while (inner := error.__cause__ or getattr(error, "inner_exception", None)) is not None:
        error = inner
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)}"[:200].rstrip(": ")


def _in_turn(
    run: dict[str, Callable[[], Any]], repeat: int, bar: Any
) -> tuple[dict[str, list[float]], bool, float | None]:
    """Seconds of each run, whether Ctrl-C ended them, and how many processors other programs used."""
    times: dict[str, list[float]] = {}
    load = _OtherPrograms()
    try:
        for _ in range(repeat):
            for name, function in run.items():
                bar.set_postfix_str(name)
                start = time.perf_counter()
                function()
                times.setdefault(name, []).append(time.perf_counter() - start)
                bar.update()
    except KeyboardInterrupt:
        if not times:  # ours is the first
            raise
        return times, True, load.processors()
    return times, False, load.processors()


class _OtherPrograms:
    """How many processors were busy with other programs since this was made, where the system tells."""

    def __init__(self) -> None:
        self.start = self._now()

    def processors(self) -> float | None:
        now = self._now()
        if self.start is None or now is None:
            return None
        wall, busy, own = (b - a for a, b in zip(self.start, now))
        return round(max(0.0, (busy - own) / max(wall, 1e-9)), 2)

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            line = Path("/proc/stat").read_text().splitlines()[0]
        except OSError:
            return None
        user, nice, system, _, _, interrupt, soft, steal = map(int, line.split()[1:9])
        busy = (user + nice + system + interrupt + soft + steal) / os.sysconf("SC_CLK_TCK")
        return time.perf_counter(), busy, time.process_time()


def _row(
    name: str, t: list[float], first: float, pictures: int | None, steps: int, ours: float, floor: float
) -> dict[str, Any]:
    t, median = sorted(t), statistics.median(t)
    return {
        "name": name,
        "median_s": median,
        "p10_s": t[len(t) // 10],
        "p90_s": t[(len(t) * 9) // 10],
        "first_s": first,
        "runs": len(t),
        "images_per_s": None if pictures is None else pictures / median,
        "ms_per_step": 1e3 * median / steps,
        "ratio": median / ours,
        "percent_of_ceiling": 100 * floor / median,
    }


def table(result: dict[str, Any]) -> str:
    """The result as lines of text."""
    machine = result["machine"]
    limits = ", ".join(f"{value:.1f} {name}" for name, value in result["ceilings"].items())
    lines = [
        f"{_what(result)}, random weights; "
        f"torch {machine['torch']}, SIMD {machine['simd']}, {_threads_text(machine['threads'])}",
        f"ceilings: {limits}; the products and reads of a run take {result['floor_s']:.3g} s at them",
        f"  {'':10}{'median s':>10}{'p10':>10}{'p90':>10}{'first run':>11}{'images/s':>10}{'ms/step':>10}"
        f"{'ratio':>8}{'% ceiling':>11}",
    ]
    for row in result["rows"]:
        images = "-" if row["images_per_s"] is None else f"{row['images_per_s']:.4g}"
        lines.append(
            f"  {row['name']:10}{row['median_s']:10.4g}{row['p10_s']:10.4g}{row['p90_s']:10.4g}"
            f"{row['first_s']:11.4g}{images:>10}{row['ms_per_step']:10.4g}{row['ratio']:7.2f}x"
            f"{row['percent_of_ceiling']:11.0f}"
        )
    lines += [f"  {name:10}skipped: {reason}" for name, reason in result["skipped"].items()]
    if (machine["other_programs"] or 0) >= 0.05:
        lines.append(f"other programs kept {machine['other_programs']:.2f} processors busy meanwhile")
    if result["interrupted"]:
        runs = ", ".join(f"{row['name']} {row['runs']}" for row in result["rows"])
        lines.append(f"interrupted; timed runs until then: {runs}")
    return "\n".join(lines)


def _what(result: dict[str, Any]) -> str:
    settings = result["settings"]
    part = "" if settings["tokens"] is None else f", the first {settings['tokens']} tokens"
    return f"{settings['model']}, {settings['dtype']}, batch {settings['batch']}{part}"


def _threads_text(number: int) -> str:
    return "1 thread" if number == 1 else f"{number} threads"


def plot(result: dict[str, Any], path: Path) -> None:
    """A bar for each way of making the picture, ours in colour; needs matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure

    rows, machine = result["rows"], result["machine"]
    middle = [row["median_s"] for row in rows]
    spread = [
        [row["median_s"] - row["p10_s"] for row in rows],
        [row["p90_s"] - row["median_s"] for row in rows],
    ]
    figure = Figure(figsize=(6.4, 1.7 + 0.5 * len(rows)), layout="constrained", dpi=150)
    axes = figure.subplots()
    colours = ["tab:blue" if row["name"] == OURS else "silver" for row in rows]
    bars = axes.barh([r["name"] for r in rows], middle, 0.6, color=colours, xerr=spread, capsize=3)
    axes.bar_label(bars, [f"{r['median_s']:.3g} s   {r['ratio']:.2f}x" for r in rows], padding=6)
    axes.axvline(
        result["floor_s"], linestyle=":", color="black", label="its products and reads at the ceilings"
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.4 * max(*middle, result["floor_s"]))
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(f"seconds (median of {rows[0]['runs']}, p10 to p90)")
    axes.set_title(
        f"{_what(result)}\n{machine['processor']}, {_threads_text(machine['threads'])}", fontsize=10
    )
    figure.legend(loc="outside lower right", fontsize=9, frameon=False)
    figure.savefig(path)


def require_matplotlib() -> None:
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("a plot needs matplotlib: pip install 'arimg[bench]'")


def machine(threads: int) -> dict[str, Any]:
    """What a result depends on; no name of a host."""
    return {
        "processor": _processor(), "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(), "torch": torch.__version__, "simd": _library.simd_level(),
        "threads": threads,
    }  # fmt: skip


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or "unknown"


def ceilings(dtype: torch.dtype = torch.float32, rounds: int = 5) -> dict[str, float]:
    """GB/s of a read and GFLOP/s of a product, of float32 and this type, with the threads of now."""
    source = torch.rand(32 * 2**20)
    found = {"read GB/s": source.nbytes / min(best(f, rounds) for f in reads(source)) / 1e9}
    for kind in dict.fromkeys((torch.float32, dtype)):
        a, b = (torch.randn(1024, 1024).to(kind) for _ in range(2))
        gemm = 2 * 1024**3 / best(lambda a=a, b=b: a @ b, rounds) / 1e9  # type: ignore[misc]
        found[f"{str(kind).removeprefix('torch.')} GEMM GFLOP/s"] = gemm
    return found


def reads(source: Tensor) -> list[Callable[[], object]]:
    """Ways of reading every element once; the fastest is the ceiling (one stream may not reach it)."""
    rows, one = source.view(-1, 4096), torch.ones(1, 4096)
    return [source.sum, source.max, lambda: rows.sum(1), lambda: ops.linear_rows(one, rows)]


def peak_kib() -> int:
    """The most memory that this process has had. Linux: `ru_maxrss` may be that of the process before it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))


def best(function: Callable[[], object], rounds: int) -> float:
    function()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


@contextmanager
def _threads(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _floor(case: Case, limits: dict[str, float], dtype: torch.dtype) -> float:
    """Seconds of the products alone, each step bound by its reads or its arithmetic."""
    rate = [limits[f"{str(t).removeprefix('torch.')} GEMM GFLOP/s"] for t in (dtype, torch.float32)]
    read, last, seconds = limits["read GB/s"], case.steps, 0.0
    for k, (nbytes, flops) in enumerate(case.bytes_and_flops):
        seconds += max(nbytes / read, flops / rate[int(k == last)]) / 1e9
    return seconds


def _build(settings: Settings) -> Case:
    size = MODELS[settings.model]
    torch.manual_seed(settings.seed)
    labels = torch.arange(settings.batch)
    if isinstance(size, _Var):
        return _var_case(build_var(size, settings.dtype), labels, settings)
    return _llama_case(build_llamagen(size, settings.dtype), labels, settings)


def build_var(size: _Var, dtype: torch.dtype) -> VAR:
    tokenizer = VQVAE(size.vocab, ch=size.ch, ch_mult=size.ch_mult, scales=size.scales).eval()
    nn.init.normal_(tokenizer.quantize.embedding.weight)
    with without_weights():
        var = VAR(tokenizer, depth=size.depth, shared_adaln=size.shared_adaln)
    return _with_weights(var, dtype)


def build_llamagen(size: _Llama, dtype: torch.dtype) -> LlamaGen:
    with without_weights():
        model = LlamaGen(size.vocab, 1000, size.depth, size.width, size.heads, grid=size.grid)
    return _with_weights(model, dtype)


@torch.no_grad()
def _with_weights(model: Any, dtype: torch.dtype) -> Any:
    """Random weights whose products keep the size of what goes in; open gates; norms as they start."""
    model = model.to(dtype).to_empty(device="cpu").eval().requires_grad_(False)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            p.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            p.normal_(std=(0.3 if "ada" in name else 1.0) * p[0].numel() ** -0.5)
        if name.endswith("scale_mul_1H11"):
            p.fill_(1.4)
    return model


def _var_case(var: VAR, labels: Tensor, settings: Settings) -> Case:
    kept: dict[str, Any] = dict(cfg=1.5, top_k=900, top_p=0.96)
    run: dict[str, Callable[[], Any]] = {OURS: lambda: var.generate(labels, seed=settings.seed, **kept)}
    blocks = {"eager": plain_var.block}
    if "compile" in settings.peers:
        blocks["compile"] = torch.compile(plain_var.block, backend=settings.compiler)
    for peer in settings.peers:
        run[peer] = lambda block=blocks[peer]: plain_var.generate(
            var, labels, seed=settings.seed, run_block=block, **kept
        )  # type: ignore[misc]
    cost = _var_cost(var, len(labels), settings.dtype)
    return Case(run, lambda trace: var_difference(var, labels, trace), len(var.layout), cost)


@torch.no_grad()
def var_difference(var: VAR, labels: Tensor, trace: plain_var.Trace, cfg: float = 1.5) -> float:
    """The largest difference of guided logits for the same tokens, in standard deviations of a scale's."""
    worst = 0.0
    last = max(len(var.layout) - 1, 1)
    for k, step in enumerate(var.stream(labels, cfg=cfg, given=trace.tokens)):
        cond, uncond = step.logits.float().chunk(2)
        t = cfg * k / last
        error = (1 + t) * cond - t * uncond - trace.logits[k]
        worst = max(worst, float(error.abs().max() / trace.logits[k].std()))
    return worst


def _llama_case(model: LlamaGen, labels: Tensor, settings: Settings) -> Case:
    kept: dict[str, Any] = dict(cfg=4.0, top_k=2000, tokens=settings.tokens)
    run: dict[str, Callable[[], Any]] = {OURS: lambda: model.generate(labels, seed=settings.seed, **kept)}
    steps = {"eager": plain_llamagen.step}
    if "compile" in settings.peers:
        steps["compile"] = torch.compile(plain_llamagen.step, backend=settings.compiler)
    for peer in settings.peers:
        run[peer] = lambda step=steps[peer]: plain_llamagen.generate(
            model, labels, seed=settings.seed, run_step=step, **kept
        )  # type: ignore[misc]
    total = model.length if settings.tokens is None else settings.tokens
    cost = _llama_cost(model, len(labels), total, settings.dtype)
    return Case(run, lambda trace: llamagen_difference(model, labels, trace), total, cost)


@torch.no_grad()
def llamagen_difference(model: LlamaGen, labels: Tensor, trace: plain_llamagen.Trace) -> float:
    """The largest difference of guided logits for the same tokens, in their standard deviation."""
    assert trace.tokens is not None
    given = trace.tokens[:, :-1]
    nothing = torch.full_like(labels, model.num_classes)
    cond, uncond = (model(label, given).float() for label in (labels, nothing))
    want = torch.stack(trace.logits, dim=1)
    return float((uncond + 4.0 * (cond - uncond) - want).abs().max() / want.std())


def _agreed(peer: str, difference: float, dtype: torch.dtype) -> float:
    """Refuses to time what does not agree; 16-bit rounding through many layers is reported, not judged."""
    if not difference < (1e-2 if dtype == torch.float32 else float("inf")):
        raise ValueError(f"arimg and {peer} differ by {difference:.2g} standard deviations of a logit")
    return difference


def _var_cost(var: VAR, batch: int, dtype: torch.dtype) -> list[tuple[float, float]]:
    """(bytes of weights, operations) of each scale with its guidance pair, then of the decoder.

    A modulation is a product of the class alone: its weights are read once. Convolutions count as the least
    that a known method takes.
    """
    width, rows, seen, costs = var.width, 2 * batch, 0, []
    conditioning = sum(p.numel() for n, p in var.named_parameters() if "ada_lin" in n)
    products = sum(p.numel() for n, p in var.blocks.named_parameters() if p.dim() == 2 and "ada_lin" not in n)
    products += var.head.weight.numel()
    for k, n in enumerate(var.layout.sizes):
        seen += n
        flops = 2.0 * rows * n * products + 4.0 * rows * n * seen * width * var.depth
        costs.append(((products + (conditioning if k == 0 else 0)) * float(dtype.itemsize), flops))
    z, (h, w) = var.tokenizer.z_channels, var.tokenizer.scales[-1]
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution: _convolution}) as counted:
        plain_var.decode(var, torch.zeros(1, z, h, w))
    decoder = sum(p.numel() for p in var.tokenizer.decoder.parameters())
    return [*costs, (4.0 * decoder, float(batch) * counted.get_total_flops())]


def _convolution(
    x: Sequence[int], weight: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any
) -> float:
    """Operations of a convolution; 3x3 by Winograd's F(4x4, 3x3), 36 products instead of 144."""
    outputs, inputs = math.prod(out_shape), math.prod(weight[1:])
    return 2.0 * outputs * inputs / (4 if tuple(weight[2:]) == (3, 3) else 1)


def _llama_cost(model: LlamaGen, batch: int, total: int, dtype: torch.dtype) -> list[tuple[float, float]]:
    """(bytes of weights and cached keys and values, operations) of each token with its guidance pair."""
    rows, head_dim = 2 * batch, model.width // model.heads
    products = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2) + model.output.weight.numel()
    cache = 2.0 * rows * model.kv_heads * head_dim * model.depth
    costs = []
    for t in range(total):
        flops = 2.0 * rows * products + 4.0 * rows * (t + 1) * model.width * model.depth
        costs.append(((products + cache * (t + 1)) * float(dtype.itemsize), flops))
    return costs


def chosen(names: Sequence[str]) -> tuple[str, ...]:
    """Peers without repetition, in the order given."""
    return tuple(dict.fromkeys(names))
