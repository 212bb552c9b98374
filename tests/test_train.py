"""The training loop (schedule, order, EMA, resume after a kill) and both tasks."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from arimg.data.images import Images
from arimg.generators import VAR
from arimg.tokenizers import VQVAE
from arimg.train.grid import make_grid, save_png
from arimg.train.loop import RunConfig, batch_indices, fit, rate_factor, update_ema
from arimg.train.losses import chroma_loss, gradient_loss
from arimg.train.muon import Muon, orthogonalise
from arimg.train.tokenizer import TokenizerSettings, TokenizerTask, scale_residuals
from arimg.train.var import VarSettings, VarTask, cached_tokens, class_weights, tokenize

SMALL = {"vocab_size": 32, "z_channels": 8, "ch": 8, "ch_mult": (1, 2), "scales": (1, 2, 4), "blocks": 1}


def pictures(count=12, size=8):
    """Discs of a class's colour at random places."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size]
    pixels, labels = np.full((count, size, size, 3), 255, np.uint8), np.arange(count) % 2
    for image, label in zip(pixels, labels):
        cy, cx = rng.integers(2, size - 2, 2)
        image[(y - cy) ** 2 + (x - cx) ** 2 <= 5] = (220, 40, 30) if label else (30, 60, 220)
    names = tuple(f"{'ab'[label]}/{i}.png" for i, label in enumerate(labels))
    return Images(pixels, labels, names, ("a", "b"))


def test_the_rate_rises_stays_and_falls_to_zero():
    rates = [rate_factor(s, 100, 10, 0.4) for s in range(101)]
    assert rates[0] == 0.1 and rates[9] == 1 == rates[60]
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[80] == pytest.approx(0.5) and rates[100] == pytest.approx(0, abs=1e-6)
    assert [rate_factor(s, 1000, 10, 0.4) for s in range(60)] == rates[
        :60
    ]  # the length may change on the plateau


def test_batches_cover_every_epoch_once_and_depend_on_the_step_alone():
    drawn = torch.cat([batch_indices(10, 4, step, seed=3) for step in range(5)])
    assert sorted(drawn[:10].tolist()) == sorted(drawn[10:].tolist()) == list(range(10))
    assert drawn[:10].tolist() != drawn[10:].tolist()
    assert torch.equal(batch_indices(10, 4, 2, seed=3), drawn[8:12])


def test_weighted_batches_follow_the_weights():
    weights = torch.tensor([0.0, 1.0, 3.0])
    drawn = torch.cat([batch_indices(3, 100, step, 0, weights) for step in range(40)])
    counts = drawn.bincount(minlength=3)
    assert counts[0] == 0 and abs(counts[2].item() - 3000) < 5 * (4000 * 3 / 16) ** 0.5


def test_class_weights_match_patterns_in_order():
    labels, classes = torch.tensor([0, 1, 2]), ("food/x", "food/y", "flags/x")
    assert class_weights(labels, classes, {"food/x": 3, "food/*": 2}).tolist() == [3, 2, 1]
    assert class_weights(labels, classes, {}) is None
    with pytest.raises(ValueError, match="'sky'"):
        class_weights(labels, classes, {"sky": 2})


def test_the_average_follows_the_weights_and_takes_over_buffers():
    model, ema = torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)
    with torch.no_grad():
        model.weight.fill_(3)
    model.running_mean.fill_(5)
    update_ema(ema, model, decay=0.9, step=10**6)
    torch.testing.assert_close(ema.weight, torch.full((2,), 0.9 * 1 + 0.1 * 3))
    assert ema.running_mean.tolist() == [5, 5]


def test_the_gradient_loss_ignores_a_constant_shift():
    a = torch.rand(2, 3, 16, 16)
    assert gradient_loss(a, a + 0.2).item() < 1e-6 < gradient_loss(a, a.flip(-1)).item()


def test_the_chroma_loss_sees_hue_and_no_lightness():
    a = torch.rand(2, 3, 4, 4)
    assert chroma_loss(a, a + 0.3).item() < 1e-6
    green = torch.tensor([0, 0.1, 0]).view(1, 3, 1, 1)
    assert chroma_loss(a, a + green).item() == pytest.approx(0.2, abs=1e-5)


def test_residuals_are_what_the_quantizer_looks_up():
    torch.manual_seed(0)
    tokenizer = VQVAE(**SMALL)
    images = torch.rand(3, 3, 8, 8)
    rows = scale_residuals(tokenizer, images)
    assert rows.shape == (3 * (1 + 4 + 16), 8)
    nearest = torch.cdist(rows, tokenizer.quantize.embedding.weight).argmin(1)
    expected = torch.cat([index.flatten() for index in tokenizer.encode(images)])
    assert (nearest == expected).float().mean() > 0.99  # ties of two roundings may flip


def test_both_parts_learn_a_small_set_and_draw_it(tmp_path):
    images = pictures()
    torch.manual_seed(0)
    settings = TokenizerSettings(lr=5e-3, feature=0, shift=0, flip=False, restart_every=20, restart_until=100)
    task = TokenizerTask(VQVAE(**SMALL), images, settings)
    config = RunConfig(tmp_path / "tok", steps=200, batch_size=6, warmup=5, ema=0.9, grid_every=200)
    tokenizer = fit(task, config)
    log = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()][1:]
    assert log[-1]["psnr"] > 16 and log[-1]["loss"] < log[0]["loss"]
    assert (config.out / "grid-000200.png").exists()

    tokens = tokenize(tokenizer, images)
    assert tokens.indices.shape == (12, 21) and tokens.sizes == (1, 4, 16)
    assert len(tokens.indices.unique()) > 8  # the codebook is alive
    var = VAR(tokenizer, 2, depth=2, width=32, heads=2, shared_adaln=True)
    config = RunConfig(tmp_path / "var", steps=150, batch_size=6, warmup=5, ema=0.9, grid_every=150)
    var = fit(VarTask(var, tokens, VarSettings(lr=5e-3)), config)
    log = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()][1:]
    assert log[-1]["loss"] < 0.5 * np.log(32)
    red, blue = var.generate([1, 0], cfg=1.0, top_k=1, top_p=1.0)[:, [0, 2]].mean((-1, -2))
    assert red[0] > blue[0] and blue[1] > red[1]  # the hue, whatever the size of the disc


def test_cached_tokens_are_used_until_codes_or_images_change(tmp_path):
    torch.manual_seed(0)
    tokenizer, images, settings = VQVAE(**SMALL).eval(), pictures(), VarSettings()
    path = tmp_path / "run" / "tokens.pt"
    first = cached_tokens(path, tokenizer, images, settings)
    written = path.stat().st_mtime_ns
    again = cached_tokens(path, tokenizer, images, settings)
    assert path.stat().st_mtime_ns == written
    assert torch.equal(first.indices, again.indices) and first.sizes == again.sizes
    with torch.no_grad():
        tokenizer.quantize.embedding.weight[:] = tokenizer.quantize.embedding.weight.flip(0)
    flipped = cached_tokens(path, tokenizer, images, settings)
    assert not torch.equal(flipped.indices, first.indices)
    fewer = cached_tokens(path, tokenizer, images.subset(range(5)), settings)
    assert len(fewer.labels) == 5


def test_the_adversary_is_trained_and_saved_too(tmp_path):
    task = TokenizerTask(
        VQVAE(**SMALL), pictures(), TokenizerSettings(feature=0, adversarial=0.1, adversarial_from=1)
    )
    before = task.modules["critic"].layers[0].weight.clone()
    fit(task, RunConfig(tmp_path, steps=3, batch_size=4))
    assert not torch.equal(before, task.modules["critic"].layers[0].weight)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert set(saved["modules"]) == {"model", "critic", "usage"}
    assert set(saved["optimizers"]) == {"model", "critic"}


def test_a_continued_run_knows_which_codes_were_used(tmp_path):
    """Else the first restart after it would move every code."""

    def run(folder, *lengths):
        for steps in lengths:
            torch.manual_seed(0)
            settings = TokenizerSettings(feature=0, restart_every=4)
            task = TokenizerTask(VQVAE(**SMALL), pictures(), settings)
            fit(task, RunConfig(tmp_path / folder, steps=steps, batch_size=4, decay=0, save_every=4))
        return task.modules["model"].quantize.embedding.weight

    assert torch.equal(run("whole", 7), run("continued", 4, 7))


def test_bfloat16_rounds_the_products_and_nothing_else(tmp_path):
    images = pictures()
    for make, settings in ((tokenizer_task, TokenizerSettings), (var_task, VarSettings)):
        losses = []
        for bf16 in (False, True):
            task = make(images, settings(bf16=bf16))
            losses.append(task.step(torch.arange(6), 0)["loss"])
            assert all(p.dtype == torch.float32 for p in task.modules["model"].parameters())
        assert losses[0] != losses[1] == pytest.approx(losses[0], rel=0.03)


def tokenizer_task(images, settings):
    torch.manual_seed(0)
    return TokenizerTask(VQVAE(**SMALL), images, settings)


def var_task(images, settings):
    torch.manual_seed(0)
    tokenizer = VQVAE(**SMALL).eval()
    var = VAR(tokenizer, 2, depth=2, width=32, heads=2, shared_adaln=True, class_dropout=0)
    torch.nn.init.normal_(var.head.weight)  # the recipe starts with all logits near 0
    return VarTask(var, tokenize(tokenizer, images), settings)


def test_the_decoder_alone_can_learn_on(tmp_path):
    torch.manual_seed(0)
    tokenizer = VQVAE(**SMALL)
    images, before = pictures(), {k: v.clone() for k, v in tokenizer.state_dict().items()}
    settings = TokenizerSettings(feature=0, decoder_only=True, restart_every=1)
    after = fit(TokenizerTask(tokenizer, images, settings), RunConfig(tmp_path, steps=2, ema=0)).state_dict()
    changed = {k.split(".")[0] for k in before if not torch.equal(before[k], after[k])}
    assert changed == {"decoder", "post_quant_conv"}


@pytest.mark.parametrize("shape", [(6, 10), (10, 6), (8, 8)])
def test_orthogonalised_matrices_keep_their_singular_vectors(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    values = u.T @ orthogonalise(matrix, iterations=8) @ vh.T
    assert ((values.diagonal() > 0.6) & (values.diagonal() < 1.3)).all()
    torch.testing.assert_close(values, values.diagonal().diag(), atol=1e-4, rtol=0)


def test_muon_moves_at_the_rate_it_says():
    weight = torch.nn.Parameter(torch.zeros(64, 32))
    weight.grad = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    Muon([weight], lr=0.5).step()
    assert weight.square().mean().sqrt().item() == pytest.approx(0.2 * 0.5, rel=0.2)
    with pytest.raises(ValueError, match="expected matrices"):
        Muon([torch.nn.Parameter(torch.zeros(3))], lr=0.1)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    fit(TokenizerTask(VQVAE(**SMALL), pictures(), TokenizerSettings(feature=0)), RunConfig(tmp_path, steps=1))
    other = TokenizerTask(VQVAE(**{**SMALL, "ch": 16}), pictures(), TokenizerSettings(feature=0))
    with pytest.raises(ValueError, match=r"checkpoint\.pt was written by a run with other settings"):
        fit(other, RunConfig(tmp_path, steps=2))


@pytest.mark.parametrize("name", ["steps", "batch_size", "save_every"])
def test_impossible_runs_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=f"expected {name} >= 1, got 0"):
        RunConfig(tmp_path, **{name: 0})


def training_command(data, out):
    options = (
        "--steps 40 --save-every 4 --batch-size 4 --size 8 --vocab 16 --z-channels 8 --ch 8 --ch-mult 1,2"
    )
    options += " --scales 1,2,4 --feature 0 --held-out 0 --restart-every 10"
    return [
        sys.executable,
        "-m",
        "arimg",
        "train",
        "tokenizer",
        str(data),
        "--out",
        str(out),
        *options.split(),
    ]


def test_a_killed_run_continues_to_the_same_weights(tmp_path):
    images = pictures()
    for pixels, name in zip(images.pixels, images.names):
        (tmp_path / "data" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / "data" / name)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, killed = (training_command(tmp_path / "data", tmp_path / out) for out in ("whole", "killed"))
    subprocess.run(whole, env=environment, check=True, capture_output=True)

    run = subprocess.Popen(killed, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / "killed" / "checkpoint.pt").exists():
        assert time.monotonic() < deadline and run.poll() is None
        time.sleep(0.002)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "tokenizer.safetensors").exists()

    subprocess.run(killed, env=environment, check=True, capture_output=True)
    log = [json.loads(line) for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    starts = [record["from_step"] for record in log if "from_step" in record]
    assert len(starts) == 2 and starts[0] == 0 and 4 <= starts[1] < 40
    expected = load_file(tmp_path / "whole" / "tokenizer.safetensors")
    for name, tensor in load_file(tmp_path / "killed" / "tokenizer.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def test_two_processes_share_a_batch_and_agree(tmp_path):
    """The averaged gradient of halves is that of the whole batch, up to rounding."""
    script = """
import sys, torch
from arimg.train.loop import descend, start_processes
rank, _ = start_processes()
torch.manual_seed(0)
layer = torch.nn.Linear(3, 2)
data = torch.randn(4, 3)
part = data[rank::2] if sys.argv[1] == "two" else data
layer(part).square().mean().backward()
descend([torch.optim.SGD(layer.parameters(), 0.1)], clip=100.0)
if rank == 0:
    torch.save(layer.state_dict(), sys.argv[2])
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    subprocess.run([sys.executable, "-c", script, "one", one], env=environment, check=True)
    port = str(20000 + os.getpid() % 20000)
    both = [
        subprocess.Popen(
            [sys.executable, "-c", script, "two", two],
            env={**environment, "WORLD_SIZE": "2", "RANK": str(rank), "MASTER_PORT": port},
        )
        for rank in range(2)
    ]
    assert [p.wait(timeout=120) for p in both] == [0, 0]
    for a, b in zip(torch.load(one).values(), torch.load(two).values()):
        torch.testing.assert_close(a, b)


def test_grids_keep_order_and_pixels(tmp_path):
    images = torch.arange(5).view(5, 1, 1, 1).expand(5, 3, 4, 4) / 4
    page = make_grid(images, 3, gap=1)
    assert page.shape == (3, 11, 16) and page[0, 2, 12] == 0.5 and page[0, 7, 2] == 0.75
    save_png(page, tmp_path / "deep" / "page.png")
    assert np.asarray(Image.open(tmp_path / "deep" / "page.png"))[7, 2].tolist() == [191, 191, 191]
    with pytest.raises(ValueError, match="expected images"):
        make_grid(images[0], 3)
