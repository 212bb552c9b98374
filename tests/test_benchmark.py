"""`arimg bench models`, and the plain loops that it measures against."""

import json
import sys

import pytest
import torch

from arimg import benchmark
from arimg.benchmark import MODELS, Settings
from arimg.cli import main
from arimg.reference import plain_llamagen, plain_var

LABELS = torch.tensor([3, 8])


def bench(*arguments):
    return main(["bench", "models", *arguments])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared_adaln", [False, True])
def test_the_plain_var_has_our_logits(shared_adaln, dtype):
    torch.manual_seed(0)
    size = benchmark._Var(2, (1, 2, 4), shared_adaln, ch=32, ch_mult=(1, 2), vocab=64)
    var = benchmark.build_var(size, dtype)
    trace = plain_var.generate(var, LABELS, top_k=20)
    error = benchmark.var_difference(var, LABELS, trace)
    assert error < (1e-4 if dtype == torch.float32 else 0.3)
    # a sampler that has something to choose from
    spread = torch.stack([t.softmax(-1).max(-1).values.mean() for t in trace.logits]).mean()
    assert spread < 0.5 and len(torch.cat(trace.tokens, 1).unique()) > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kv_heads", [2, 1])
def test_the_plain_llamagen_has_our_logits(kv_heads, dtype):
    torch.manual_seed(0)
    with torch.device("meta"):
        model = benchmark.LlamaGen(64, 10, 2, 64, 2, kv_heads=kv_heads, grid=4)
    model = benchmark._with_weights(model, dtype)
    trace = plain_llamagen.generate(model, LABELS, top_k=30, top_p=0.9)
    assert trace.tokens.shape == (2, 16) and len(trace.tokens.unique()) > 10
    assert benchmark.llamagen_difference(model, LABELS, trace) < (1e-4 if dtype == torch.float32 else 0.3)
    again = plain_llamagen.generate(model, LABELS, given=trace.tokens)
    assert torch.equal(torch.stack(again.logits), torch.stack(trace.logits))


def test_filters_of_the_plain_llamagen():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(200, 4)
    rng = torch.Generator().manual_seed(0)

    def drawn(**filters):
        return set(plain_llamagen._draw(logits, rng=rng, **filters).flatten().tolist())

    assert drawn(top_k=2, top_p=1.0) == {0, 1} and drawn(top_k=0, top_p=0.75) == {0, 1}
    assert drawn(top_k=0, top_p=0.1) == {0} and drawn(top_k=9, top_p=1.0) == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("name", "steps", "extra"), [("var-tiny", 3, ()), ("llamagen-tiny", 5, ("--tokens", "5"))]
)
def test_the_command_prints_a_table_and_writes_json_and_a_plot(name, steps, extra, tmp_path, capsys):
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    pytest.importorskip("matplotlib")
    arguments = ["--model", name, "--repeat", "2", "--batch", "2", "--json", str(out), "--plot", str(picture)]
    threads = torch.get_num_threads()
    assert bench(*arguments, *extra) == 0 and torch.get_num_threads() == threads
    result = json.loads(out.read_text())
    ours, eager = result["rows"]
    assert (ours["name"], eager["name"], ours["ratio"]) == ("arimg", "eager", 1.0)
    for row in (ours, eager):
        assert 0 < row["p10_s"] <= row["median_s"] <= row["p90_s"]
        assert row["images_per_s"] == (None if extra else pytest.approx(2 / row["median_s"]))
        assert row["runs"] == 2 and row["first_s"] > 0
        assert row["ms_per_step"] == pytest.approx(1e3 * row["median_s"] / steps)
        assert row["ratio"] == pytest.approx(row["median_s"] / ours["median_s"])
        assert row["percent_of_ceiling"] == pytest.approx(100 * result["floor_s"] / row["median_s"])
    assert result["settings"]["model"] == name and result["machine"]["torch"] == torch.__version__
    assert result["date"][:2] == "20" and result["ceilings"]["read GB/s"] > 0
    assert result["logits_differ_by_std"]["eager"] < 1e-3 and not result["interrupted"]
    printed = capsys.readouterr().out
    assert f"{name}, float32, batch 2" in printed and "% ceiling" in printed and "  eager " in printed
    assert picture.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", ["var-tiny", "llamagen-tiny"])
def test_peers_may_be_compiled(name):
    result = benchmark.measure(Settings(name, ("compile",), repeat=1, compiler="aot_eager"))
    assert [row["name"] for row in result["rows"]] == ["arimg", "compile"]


def test_a_missing_compiler_costs_its_peer_alone(monkeypatch, tmp_path):
    from torch._inductor import config

    torch.compiler.reset()
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    with config.patch({"cpp.cxx": (None, "/no/such/compiler")}):
        result = benchmark.measure(Settings("var-tiny", ("compile", "eager"), repeat=1))
    assert [row["name"] for row in result["rows"]] == ["arimg", "eager"]
    assert result["skipped"]["compile"].startswith("InvalidCxxCompiler: No working C++ compiler found")
    assert "compile   skipped: InvalidCxxCompiler: No working C++ compiler" in benchmark.table(result)


def test_a_peer_that_fails_or_disagrees_is_not_passed_over(monkeypatch):
    monkeypatch.setattr(benchmark, "var_difference", lambda *_: 0.5)
    with pytest.raises(ValueError, match=r"arimg and eager differ by 0\.5 standard deviations of a logit"):
        benchmark.measure(Settings("var-tiny", repeat=1))
    monkeypatch.setattr(plain_var, "generate", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        benchmark.measure(Settings("var-tiny", repeat=1))


def test_what_was_measured_before_ctrl_c_is_kept(monkeypatch, tmp_path, capsys):
    out, generate, calls = tmp_path / "out.json", plain_var.generate, []

    def interrupted(*arguments, **options):
        calls.append(1)
        if len(calls) == 4:  # the first run, two timed ones
            raise KeyboardInterrupt
        return generate(*arguments, **options)

    monkeypatch.setattr(plain_var, "generate", interrupted)
    assert bench("--model", "var-tiny", "--repeat", "9", "--json", str(out)) == 130
    captured = capsys.readouterr()
    assert "interrupted; timed runs until then: arimg 3, eager 2" in captured.out
    assert "arimg: interrupted" in captured.err
    result = json.loads(out.read_text())
    assert result["interrupted"] and [row["runs"] for row in result["rows"]] == [3, 2]
    calls[:], out = [1, 1, 1], tmp_path / "nothing.json"  # before anything is timed
    assert bench("--model", "var-tiny", "--json", str(out)) == 130 and not out.exists()


def test_other_programs_are_seen():
    load = benchmark._OtherPrograms()
    found = load.processors()
    if found is None:
        pytest.skip("no /proc/stat")
    load.start = tuple(a - b for a, b in zip(load._now(), (2.0, 3.0, 1.0)))  # 2 s, 3 busy, 1 of them ours
    assert load.processors() == pytest.approx(1.0, abs=0.1) and found >= 0


def test_the_floor_counts_what_a_picture_reads_and_multiplies():
    size = MODELS["llamagen-tiny"]
    model = benchmark.build_llamagen(size, torch.float32)
    layer = 64 * 192 + 64 * 64 + 3 * 64 * model.hidden
    weights = 2 * layer + 64 * 128
    nbytes, flops = benchmark._llama_cost(model, 3, 4, torch.bfloat16)[3]
    assert nbytes == 2 * (weights + 2 * 6 * 4 * 64 * 2) and flops == 2 * 6 * weights + 4 * 6 * 4 * 64 * 2

    var = benchmark.build_var(MODELS["var-tiny"], torch.float32)
    *scales, decoder = benchmark._var_cost(var, 1, torch.float32)
    products, ada = 2 * 12 * 128 * 128 + 64 * 128, 128 * (2 * 6 + 2) * 128 + 14 * 128
    assert scales[0] == (4 * (products + ada), 2 * 2 * products + 4 * 2 * 128 * 2)
    assert scales[2] == (4 * products, 2 * 2 * 16 * products + 4 * 2 * 16 * 21 * 128 * 2)
    assert decoder[1] > 0
    wide, narrow = ((8, 4, k, k) for k in (3, 1))
    assert benchmark._convolution((1, 4, 5, 5), wide, out_shape=(1, 8, 5, 5)) == 2 * 200 * 36 / 4
    assert benchmark._convolution((1, 4, 5, 5), narrow, out_shape=(1, 8, 5, 5)) == 2 * 200 * 4
    case = benchmark.Case({}, lambda _: 0.0, 1, [(6e9, 1e9), (1e9, 8e9)])
    limits = {"read GB/s": 2.0, "bfloat16 GEMM GFLOP/s": 1.0, "float32 GEMM GFLOP/s": 4.0}
    assert benchmark._floor(case, limits, torch.bfloat16) == 3.0 + 2.0


def test_all_released_sizes_can_be_built():
    parameters = {"var-d16": 310e6, "var-d36": 2.35e9, "llamagen-b": 111e6, "llamagen-xxl": 1.4e9}
    for name, number in parameters.items():
        size = MODELS[name]
        with torch.device("meta"):
            if isinstance(size, benchmark._Var):
                tokenizer = benchmark.VQVAE(size.vocab, scales=size.scales)
                model = benchmark.VAR(tokenizer, depth=size.depth, shared_adaln=size.shared_adaln)
            else:
                model = benchmark.LlamaGen(size.vocab, 1000, size.depth, size.width, size.heads)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(number, rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "var-d17"), "expected a model of var-d16, "),
        (("--peer", "eager,jax"), "expected peers of eager, compile, got 'jax'"),
        (("--model", "var-tiny", "--tokens", "3"), "expected a number of tokens for a LlamaGen alone"),
        (("--model", "var-tiny", "--repeat", "0"), "expected repeat >= 1, got 0"),
        (("--model", "llamagen-tiny", "--tokens", "99"), "expected tokens from 1 to 16, got 99"),
    ],
)
def test_mistakes_are_one_sentence(arguments, message, capsys):
    assert bench(*arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("arimg: error: ") and message in captured.err and captured.out == ""


def test_a_plot_without_matplotlib_is_refused_before_anything_runs(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(benchmark, "measure", lambda *a, **k: pytest.fail("ran"))
    assert bench("--plot", str(tmp_path / "x.png")) == 2
    assert "a plot needs matplotlib: pip install 'arimg[bench]'" in capsys.readouterr().err
