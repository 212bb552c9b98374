"""The steps that arimg.accelerate(graphs=True) captures, on tensors of another device that have no values.

As on a GPU, what a step asks of the host is not there: reading a value fails, and so does a tensor of the
host among the step's own. What the operations compute, other tests show.
"""

from __future__ import annotations

import pytest
import torch

import arimg
from arimg import _library
from arimg.accelerate import llamagen as accelerated
from arimg.accelerate import var
from arimg.accelerate.var_graphs import _GraphedSession
from arimg.ops._common import kernels
from standins import llamagen
from standins import var as standin
from test_cuda_graphs import Watch


class Watcher:
    """A capture under the watch."""

    captured = 0

    def refusal(self):
        return ""

    def capture(self, function):
        with Watch():
            outputs = function()
        self.captured += 1
        return outputs, lambda: None


@pytest.fixture(autouse=True)
def another_device(monkeypatch):
    assert _library.ops() is not None
    # in the place of its code: modules hold the function itself
    monkeypatch.setattr(kernels, "__code__", (lambda *tensors: _library.ops()).__code__)
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: False)  # meta has no answer
    with torch.device("meta"), torch.no_grad():
        yield


def ready(model, dtype):
    return model.eval().requires_grad_(False).to(dtype)


@pytest.mark.parametrize("rows", [2, 20])  # products of a few rows, and of more
@pytest.mark.parametrize("hidden", ["nothing", "left", "right"])
@pytest.mark.parametrize(
    "options",
    [{}, {"dtype": torch.bfloat16}, {"weights": "int8"}, {"weights": "int4"}, {"own": torch.bfloat16}],
    ids=str,
)
def test_a_token_of_llamagen(monkeypatch, rows, hidden, options):
    """hidden: the columns of a text's mask that no other token sees."""
    dtype = options.get("own", torch.float32)
    column = torch.zeros(rows, dtype=torch.int32)
    seen = {"nothing": (), "left": (None, column), "right": (column, column)}[hidden]
    # read on the host, once for a picture
    monkeypatch.setattr(accelerated, "_look_at", lambda mask: accelerated._Mask(mask, 0, True, *seen))
    model, backend = ready(llamagen.Transformer(llamagen.ModelArgs()), dtype), Watcher()
    report = arimg.accelerate(model, graphs=backend, **{k: v for k, v in options.items() if k != "own"})
    assert report.replaced, str(report)
    model.setup_caches(rows, 26, dtype)
    token = torch.zeros(rows, 1, dtype=torch.int64)
    for device in ("meta", "meta", "cpu"):
        logits, _ = model(token, None, torch.ones(1, dtype=torch.int64, device=device))
        assert logits.shape == (rows, 1, 50) and logits.device.type == "meta"
    assert backend.captured == 1


@pytest.mark.parametrize("guided", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"shared_aln": True}, {"attn_l2_norm": False}], ids=str)
def test_the_scales_of_var(guided, dtype, options):
    with torch.device("cpu"):  # whose constants are computed with sizes from values
        vae = standin.VQVAE()
        model = standin.VAR(vae, **options)
    ready(vae.to("meta"), torch.float32)
    ready(model.to("meta"), dtype)
    backend = Watcher()
    report = arimg.accelerate(model, graphs=backend)
    assert report.replaced[0].part == "VAR", str(report)
    session = _GraphedSession(var._generator(model), torch.zeros(2, dtype=torch.int64), guided, report.graphs)
    for _ in range(3):
        for k, (h, w) in enumerate(session.layout.shapes):
            (logits,) = session.graphed(session.f_hat, k=k)
            assert logits.shape == (2 * (1 + guided), h * w, 64) and logits.device.type == "meta"
    assert backend.captured == len(session.layout)
