"""Every public operation of quantize, kv_cache, pyramid and sampling, and of attention those with a carried
state, in a CUDA graph: captured once, replayed with new inputs, seeds and settings.

Without a GPU the same bodies run eagerly on the CPU, under a watch for what a capture forbids: reading a
value on the host, sizes that depend on values, tensors made from Python's numbers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from arimg import _library, commit, ops

SCALES = ((1, 1), (2, 2), (4, 4))
FORBIDDEN = {
    "aten::_local_scalar_dense",
    "aten::bincount",
    "aten::is_nonzero",
    "aten::equal",
    "aten::lift_fresh",
    "aten::masked_select",
    "aten::nonzero",
    "aten::repeat_interleave.Tensor",
    "aten::_unique2",
    "aten::unique_consecutive",
    "aten::unique_dim",
}
# On the CPU these read or share memory without an operation.
METHODS = {"tolist", "numpy", "__array__", "cpu", "cuda", "pin_memory", "from_numpy", "as_tensor"}


class Draft:
    """Inputs of one step, by name: a function of the step."""

    def __init__(self, step: int) -> None:
        self.generator = torch.Generator().manual_seed(step)
        self.step = step

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def below(self, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def members(self, *shape: int) -> torch.Tensor:
        members = self.normal(*shape) > -0.5
        members[..., 0] = True
        return members

    def seeds(self, rows: int) -> torch.Tensor:
        return torch.arange(rows) + 100 * self.step

    def at(self) -> torch.Tensor:
        return torch.tensor([1000 * self.step])

    def row(self, *values: float) -> torch.Tensor:
        return torch.tensor(values) * (1 - 0.1 * self.step)


def law(logits):
    return ops.token_law(logits, top_p=0.9)


def accumulated(i):
    f_hat, residual = i["f"].clone(), i["r"].clone()
    ops.accumulate_(f_hat, i["h"], i["w"], i["b"], 0.5, residual)
    return f_hat, residual


def maps(d):
    return dict(f=d.normal(2, 3, 4, 4), codes=d.normal(20, 3), w=d.normal(2, 3, 3, 3, 3), b=d.normal(2, 3))


def window(d):
    return dict(p=d.normal(3, 5, 20), q=d.normal(3, 4, 20), draft=d.below(20, 3, 4), s=d.seeds(3), at=d.at())


def search(d):
    return dict(x=d.normal(30, 4), codes=d.normal(50, 4), logits=d.normal(50))


def cached(d):
    """New tokens, where they go, and a cache of three pages a row."""
    where = dict(at=d.below(3, 2, 2).int() + torch.tensor([0, 4]).int(), table=d.below(1, 2, 3).int())
    where["table"] += torch.randperm(6, generator=d.generator).view(2, 3).int()
    return where | dict(
        qkv=d.normal(2, 2, 4, 8),
        k=d.normal(6, 1, 3, 8),
        v=d.normal(6, 1, 3, 8),
        w=d.normal(8),
        angle=d.normal(9, 4),
    )


def appended(i):
    k, v = i["k"].clone(), i["v"].clone()
    rope = ops.Rope(i["angle"].cos(), i["angle"].sin())
    q = ops.append_(
        k, v, i["qkv"], positions=i["at"], page_table=i["table"], norm="rms", q_weight=i["w"], rope=rope
    )
    return q, k, v


def appended_codes(i):
    codes = [torch.zeros_like(i[n], dtype=torch.int8) for n in "kv"]
    factors = [torch.zeros_like(i[n][..., 0]).contiguous() for n in "kv"]
    q = ops.append_(
        *codes, i["qkv"], positions=i["at"], page_table=i["table"], k_scale=factors[0], v_scale=factors[1]
    )
    return q, *codes, *factors


def appended_units(i):
    k, v = i["k"].clone(), i["v"].clone()
    return ops.append_qk_norm_(k[:2], v[:2], i["qkv"][:, :, :3, None], 1, i["w"][:1], True), k, v


def carried(d):
    """q, k and v serve attention as [B, H, L, D] and the scan, whose heads come third, as [B, L, H, D]."""
    each = {name: d.normal(2, 2, 6, 8) for name in ("q", "k", "v")}
    return each | dict(gate=-d.normal(2, 2, 6).abs(), state=d.normal(2, 2, 8, 8), D=d.normal(6))


def levels(d):
    return dict(coarse=d.below(9, 2, 2, 2), fine=d.below(9, 2, 4, 4), is_fine=d.normal(2, 2, 2) > 0)


def token_rows(d):
    each = dict(t=d.row(1.0, 0.5), k=d.below(9, 2), p=d.row(0.9, 0.8), m=d.row(0.01, 0.1))
    return each | dict(
        x=d.normal(4, 3, 40),
        g=d.row(1.5, 3.0),
        bias=d.normal(40),
        allowed=d.members(2, 40),
        s=d.seeds(2),
        at=d.at(),
    )


def settings(i):
    each = dict(temperature=i["t"], top_k=i["k"], top_p=i["p"], min_p=i["m"], guidance=i["g"])
    return each | dict(seed=i["s"], position=i["at"], return_logprob=True)


def bit_rows(d):
    extras = dict(x=d.normal(4, 3, 14, 2), bias=d.normal(14, 2), allowed=d.members(14, 2))
    return token_rows(d) | extras | dict(forced=d.below(4, 2, 3, 14) - 2)


# name: (inputs of a step, the call)
CASES: dict[
    str, tuple[Callable[[Draft], dict[str, torch.Tensor]], Callable[[dict[str, torch.Tensor]], Any]]
] = {
    # quantize
    "nearest_code": (
        lambda d: search(d) | dict(allowed=d.members(50)),
        lambda i: ops.nearest_code(i["x"], i["codes"], allowed=i["allowed"]),
    ),
    "lookup": (
        lambda d: dict(indices=d.below(50, 30), codes=d.normal(50, 4)),
        lambda i: ops.lookup(i["indices"], i["codes"]),
    ),
    "quantize": (search, lambda i: ops.quantize(i["x"], i["codes"], "cosine")),
    "nearest_codes": (search, lambda i: ops.nearest_codes(i["x"], i["codes"], 3)),
    "nearest_code_dual": (
        lambda d: search(d) | dict(y=d.normal(30, 2), other=d.normal(50, 2)),
        lambda i: ops.nearest_code_dual(i["x"], i["y"], i["codes"], i["other"], 0.5),
    ),
    "residual_nearest_code": (
        lambda d: dict(x=d.normal(30, 4), codes=d.normal(3, 50, 4)),
        lambda i: ops.residual_nearest_code(i["x"], i["codes"]),
    ),
    "codebook_softmax_mean": (
        lambda d: search(d) | dict(scale=d.normal(30), sigma=d.normal(30).exp()),
        lambda i: ops.codebook_softmax_mean(i["x"], i["codes"], i["logits"], i["scale"], i["sigma"]),
    ),
    "codebook_velocity": (search, lambda i: ops.codebook_velocity(i["x"], i["codes"], i["logits"], 0.3)),
    "codebook_score": (search, lambda i: ops.codebook_score(i["x"], i["codes"], i["logits"], 0.3)),
    "codebook_flow": (search, lambda i: ops.codebook_flow(i["x"], i["codes"], i["logits"], 3)),
    "code_statistics": (
        lambda d: dict(x=d.normal(30, 4), indices=d.below(50, 30)),
        lambda i: ops.code_statistics(i["x"], i["indices"], 50),
    ),
    "code_usage": (lambda d: dict(indices=d.below(50, 30)), lambda i: ops.code_usage(i["indices"], 50)),
    "fsq": (lambda d: dict(z=d.normal(30, 3)), lambda i: ops.fsq(i["z"], [8, 5, 5])),
    "fsq_codes": (lambda d: dict(n=d.below(200, 30)), lambda i: ops.fsq_codes(i["n"], [8, 5, 5])),
    "sign_codes": (lambda d: dict(z=d.normal(30, 14)), lambda i: ops.sign_codes(i["z"])),
    "pack_bits": (lambda d: dict(z=d.normal(30, 14) > 0), lambda i: ops.pack_bits(i["z"])),
    "unpack_bits": (lambda d: dict(n=d.below(2**14, 30)), lambda i: ops.unpack_bits(i["n"], 14)),
    "unpack_signs": (lambda d: dict(n=d.below(2**14, 30)), lambda i: ops.unpack_signs(i["n"], 14)),
    "bernoulli_bits": (
        lambda d: dict(x=d.normal(2, 3, 14), s=d.seeds(2)),
        lambda i: ops.bernoulli_bits(i["x"], seed=i["s"]),
    ),
    # pyramid
    "accumulate_": (
        lambda d: dict(
            f=d.normal(2, 3, 4, 4),
            r=d.normal(2, 3, 4, 4),
            h=d.normal(2, 3, 2, 2),
            w=d.normal(3, 3, 3, 3),
            b=d.normal(3),
        ),
        accumulated,
    ),
    "encode": (maps, lambda i: ops.encode(i["f"], i["codes"], i["w"], i["b"], SCALES, (0, 1, 1))),
    "features": (
        lambda d: maps(d) | {f"n{k}": d.below(20, 2, h * w) for k, (h, w) in enumerate(SCALES)},
        lambda i: ops.features([i["n0"], i["n1"], i["n2"]], i["codes"], i["w"], i["b"], SCALES, (0, 1, 1)),
    ),
    "encode_parts": (
        lambda d: dict(f=d.normal(2, 5, 4, 4), a=d.normal(20, 3), b=d.normal(20, 2)),
        lambda i: ops.encode_parts(i["f"], [i["a"], i["b"]], SCALES),
    ),
    "encode_bands": (
        lambda d: dict(
            a=d.normal(2, 3, 4, 4), b=d.normal(2, 3, 4, 4), c=d.normal(2, 3, 4, 4), codes=d.normal(20, 3)
        ),
        lambda i: ops.encode_bands([i["a"], i["b"], i["c"]], i["codes"], SCALES),
    ),
    "frequency_bands": (maps, lambda i: ops.frequency_bands(i["f"], SCALES)),
    "area_down": (maps, lambda i: ops.area_down(i["f"], (3, 2))),
    "bicubic_up": (maps, lambda i: ops.bicubic_up(i["f"], (7, 8))),
    "bilinear_up": (maps, lambda i: ops.bilinear_up(i["f"], (7, 8))),
    "resize": (
        lambda d: dict(x=d.normal(2, 3, 2, 4, 4)),
        lambda i: ops.resize(i["x"], (3, 5, 6), "trilinear"),
    ),
    "pool_tokens": (
        lambda d: dict(x=d.normal(2, 2, 18, 4)),
        lambda i: ops.pool_tokens(i["x"], (4, 4), (2, 3), start=1),
    ),
    "token_shuffle": (lambda d: dict(x=d.normal(2, 16, 3)), lambda i: ops.token_shuffle(i["x"], 2, (4, 4))),
    "token_unshuffle": (
        lambda d: dict(x=d.normal(2, 4, 12)),
        lambda i: ops.token_unshuffle(i["x"], 2, (4, 4)),
    ),
    "merge_two_levels": (
        lambda d: dict(coarse=d.normal(2, 3, 2, 2), fine=d.normal(2, 3, 4, 4), is_fine=d.normal(2, 2, 2) > 0),
        lambda i: ops.merge_two_levels(i["coarse"], i["fine"], i["is_fine"]),
    ),
    "pack_two_levels": (levels, lambda i: ops.pack_two_levels(i["coarse"], i["fine"], i["is_fine"])),
    "unpack_two_levels": (
        levels,
        lambda i: ops.unpack_two_levels(*ops.pack_two_levels(i["coarse"], i["fine"], i["is_fine"]), (2, 2)),
    ),
    # sampling
    "sample": (
        token_rows,
        lambda i: ops.sample(i["x"], bias=i["bias"], allowed=i["allowed"], **settings(i)),
    ),
    "sample_bits": (
        bit_rows,
        lambda i: ops.sample_bits(
            i["x"], bias=i["bias"], allowed=i["allowed"], forced=i["forced"], **settings(i)
        ),
    ),
    "keep_most_confident": (
        lambda d: dict(x=d.normal(3, 50), count=d.below(40, 3), candidates=d.members(3, 50)),
        lambda i: ops.keep_most_confident(i["x"], i["count"], i["candidates"]),
    ),
    "philox_uniform": (lambda d: dict(s=d.seeds(3)), lambda i: ops.philox_uniform(i["s"], 5, 20)),
    "frequency_factor": (
        lambda d: dict(x=d.normal(50).exp()),
        lambda i: ops.frequency_factor(i["x"], 0.5, 1.0),
    ),
    "token_law": (lambda d: dict(x=d.normal(3, 5, 20)), lambda i: ops.token_law(i["x"], top_k=7, top_p=0.9)),
    "speculative_accept": (
        window,
        lambda i: ops.speculative_accept(
            law(i["p"]), i["draft"], law(i["q"]), seed=i["s"], position=i["at"], tail="couple", step=i["at"]
        ),
    ),
    "grouped_accept": (
        lambda d: window(d) | dict(groups=d.below(6, 20)),
        lambda i: ops.grouped_accept(
            law(i["p"]), i["draft"], law(i["q"]), i["groups"], published=True, seed=i["s"], position=i["at"]
        ),
    ),
    "gaussian_accept": (
        lambda d: dict(
            x=d.normal(2, 4, 3), p=d.normal(2, 4, 3), q=d.normal(2, 4, 3), s=d.seeds(2), at=d.at()
        ),
        lambda i: ops.gaussian_accept(
            i["x"],
            i["p"],
            i["p"].abs() + 0.5,
            i["q"],
            i["q"].abs() + 0.5,
            seed=i["s"],
            position=i["at"],
        ),
    ),
    # kv_cache
    "append_": (cached, appended),
    "append_ into one-byte storage": (cached, appended_codes),
    "append_qk_norm_": (cached, appended_units),
    "read_cache": (
        lambda d: cached(d) | dict(lengths=d.below(9, 2).int()),
        lambda i: ops.read_cache(i["k"], 1, 8, page_table=i["table"], lengths=i["lengths"]),
    ),
    # attention with a carried state
    "gated_linear_attention": (
        carried,
        lambda i: ops.gated_linear_attention(i["q"], i["k"], i["v"], i["gate"], state=i["state"], chunk=3),
    ),
    "ssd_scan": (
        carried,
        lambda i: ops.ssd_scan(i["v"], i["gate"].exp(), -i["D"].exp(), i["k"], i["q"], D=i["D"]),
    ),
    "causal_conv1d": (
        lambda d: dict(x=d.normal(2, 5, 8), w=d.normal(8, 4), tail=d.normal(2, 3, 8)),
        lambda i: ops.causal_conv1d(i["x"], i["w"], tail=i["tail"]),
    ),
    # what a step of a masked model makes of them
    "a step of Meissonic": (
        lambda d: dict(x=d.normal(2, 30, 20), final=d.normal(2, 30) > 0.5, s=d.seeds(2), at=d.at()),
        lambda i: commit.PUBLISHED["Meissonic"].commit(
            5,
            ops.sample(i["x"], seed=i["s"], position=i["at"], return_logprob=True).logprob,
            i["final"],
            i["s"],
        ),
    ),
}

NOT_IN_A_GRAPH = {
    "band_masks": "no tensor goes in",
    "codebook_groups": "once per codebook: a loop that ends when every token has its group",
    "kmeans": "a loop of training that ends when nothing moves: it reads that on the host",
}


def flat(out: Any) -> list[torch.Tensor]:
    return [out] if isinstance(out, torch.Tensor) else [t for part in out for t in flat(part)]


class Methods(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert getattr(func, "__name__", "") not in METHODS, f"{func.__name__} cannot be captured"
        return func(*args, **(kwargs or {}))


class Watch(TorchDispatchMode):
    """Fails at what a capture forbids, of tensors on several devices (fake ones) at their meeting, too."""

    def __enter__(self) -> Any:
        self.methods = Methods()
        self.methods.__enter__()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self.methods.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = func.name() == "aten::index.Tensor" and any(
            t is not None and t.dtype == torch.bool for t in args[1]
        )
        assert func.name() not in FORBIDDEN and not masks, f"{func.name()} cannot be captured"
        out = func(*args, **(kwargs or {}))
        devices = {t.device for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)}
        assert len(devices) < 2, f"{func.name()} of {devices} cannot be captured"
        return out


def run(
    name: str,
    device: str,
    record: Callable[[Callable[[], Any]], tuple[list[torch.Tensor], Callable[[], None]]],
):
    """Records the case once, replays it on the inputs of two more steps: plain calls give the same."""
    inputs_of, call = CASES[name]

    def inputs(step: int) -> dict[str, torch.Tensor]:
        return {key: x.to(device) for key, x in inputs_of(Draft(step)).items()}

    given = inputs(0)
    before = [t.clone() for t in flat(call(given))]
    results, replay = record(lambda: call(given))
    for step in (1, 2):
        for key, x in inputs(step).items():
            given[key].copy_(x)
        replay()
        want = flat(call(inputs(step)))
        assert len(want) == len(results) > 0
        for got, expected in zip(results, want, strict=True):
            assert torch.equal(got, expected)
        assert any(not torch.equal(a, b) for a, b in zip(before, results, strict=True)), "nothing is new"


@pytest.mark.skipif(not torch.cuda.is_available() or not _library.cuda_usable(), reason="no GPU")
@pytest.mark.parametrize("name", CASES)
def test_replays_with_new_inputs_and_seeds(name):
    def record(function):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = flat(function())
        return results, graph.replay

    run(name, "cuda", record)


@pytest.mark.parametrize("name", CASES)
def test_nothing_waits_for_the_host(name):
    """The same body, replayed by calling again."""

    def record(function):
        with Watch():
            results = flat(function())

        def replay():
            for result, new in zip(results, flat(function()), strict=True):
                result.copy_(new)

        return results, replay

    run(name, "cpu", record)


def test_the_watch_sees_what_a_capture_forbids():
    x = torch.arange(3)
    for function in (
        lambda: x.sum().item(),
        lambda: x[x > 1],
        lambda: x.nonzero(),
        lambda: torch.tensor([1, 2]),
        lambda: bool(x.any()),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.numpy(),
        lambda: torch.as_tensor(0.5),
    ):
        with pytest.raises(AssertionError, match="cannot be captured"), Watch():
            function()


def test_every_operation_of_these_families_has_a_case():
    families = ("quantize", "kv", "pyramid", "sampling")
    public = {
        name
        for name in ops.__all__
        if inspect.isfunction(getattr(ops, name))
        and getattr(ops, name).__module__.rsplit(".", 1)[-1].split("_")[0] in families
    }
    assert public <= CASES.keys() | NOT_IN_A_GRAPH.keys()
    assert NOT_IN_A_GRAPH.keys() <= public
