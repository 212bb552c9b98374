"""Generators that arimg.accelerate knows as a whole: what the report says of each part, and equal results."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import arimg
from arimg import ops
from arimg.accelerate import few_rows
from arimg.accelerate.families import _PARTS, FAMILIES
from arimg.accelerate.few_rows import FewRows
from standins import families, llamagen, var

LABELS = torch.tensor([3, 7])


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


# name -> (make, use, how many linear layers are replaced)
SUBJECTS = {
    # of a block: proj, fc1, fc2, ada_lin; beside: those of the head and the embedding of codes
    "FlexVAR": (families.FlexVAR, lambda m: m.autoregressive_infer_cfg(drawn(40, 8), LABELS), 2 * 4 + 3),
    "HMAR": (lambda: families.HMAR(var.VQVAE()), lambda m: m.autoregressive_infer_cfg(2, LABELS), 3 * 4 + 3),
    "Infinity": (families.Infinity, lambda m: m(drawn(1, 5, 24), drawn(1, 4, 6)), 2 * 5 + 5),
    "MAR": (families.MAR, lambda m: m.sample_tokens(LABELS, drawn(2, 9, 4)), 3),
    "NAR": (lambda: families.NAR(llamagen.ModelArgs()), lambda m: m(LABELS[:, None], LABELS), 3 * 5 + 2),
}


@pytest.fixture(params=SUBJECTS)
def subject(request):
    make, use, layers = SUBJECTS[request.param]
    torch.manual_seed(0)
    return request.param, make().requires_grad_(False).eval(), use, layers


@pytest.fixture
def products(monkeypatch):
    """How often a product of ours ran."""
    count = [0]
    product = few_rows.product

    def counted(*arguments, **named):
        count[0] += 1
        return product(*arguments, **named)

    monkeypatch.setattr(few_rows, "product", counted)
    return count


def test_every_part_is_in_the_report(subject):
    name, model, _, layers = subject
    report = arimg.accelerate(model)
    linears = [entry for entry in report.replaced if "few rows" in entry.note]
    assert len(linears) == layers and all(isinstance(model.get_submodule(e.path), FewRows) for e in linears)
    kept = {entry.part: entry.note for entry in report.kept}
    family = next(f for f in FAMILIES if f.name == name)
    assert [kept[f"{name}'s {part}"] for part in _PARTS] == list(family.kept)
    assert f"{name}'s sampler" in str(report) and all(family.kept)


def test_results_are_equal_and_the_model_comes_back(subject, products):
    _, model, use, _ = subject
    want, kinds = use(model), [type(m) for m in model.modules()]
    state = list(model.state_dict())
    with arimg.accelerate(model):
        assert torch.allclose(use(model), want, atol=1e-5, rtol=1e-4) and products[0] > 0
        assert list(model.state_dict()) == state
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert torch.equal(use(twin), use(model))
    products[0] = 0
    assert torch.equal(use(model), want) and products[0] == 0
    assert [type(m) for m in model.modules()] == kinds


def test_gradients_are_the_original_s(subject, products):
    _, model, use, _ = subject
    model.requires_grad_(True)

    def gradients():
        model.zero_grad()
        use(model).square().sum().backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    want = gradients()
    with arimg.accelerate(model):
        assert want and all(torch.equal(a, b) for a, b in zip(gradients(), want)) and products[0] == 0


@pytest.mark.parametrize("options", [{"dtype": torch.bfloat16}, {"weights": "int8"}])
def test_copies_are_counted_and_given_back(subject, products, options):
    name, model, use, _ = subject
    if name == "FlexVAR":  # of one scale, for a rounding may choose another code

        def use(m):
            return m.autoregressive_infer_cfg(drawn(40, 8), LABELS, (1,))

    want = use(model)
    report = arimg.accelerate(model, **options)
    got = use(model)
    assert 0 < (got - want).norm() < 0.1 * want.norm() and products[0] > 0
    weights = [model.get_submodule(e.path).weight for e in report.replaced if "few rows" in e.note]
    if "dtype" in options:
        assert report.memory == 2 * sum(w.numel() for w in weights)
    else:
        codes = [ops.quantize_weight(w) for w in weights]
        assert report.memory == sum(c.codes.nbytes + c.scales.nbytes for c in codes)
    report.restore()
    assert torch.equal(use(model), want) and not few_rows._copies


def names_of_families(model):
    report = arimg.accelerate(model)
    report.restore()
    return [e for e in report.kept if any(e.part.startswith(f"{f.name}'s") for f in FAMILIES)]


def test_a_var_and_a_llamagen_are_what_they_were():
    assert not names_of_families(var.VAR(var.VQVAE()).requires_grad_(False))
    assert not names_of_families(llamagen.Transformer(llamagen.ModelArgs()))


@pytest.mark.parametrize(
    "kind,missing",
    [
        (families.FlexVAR, "pos_1LC"),
        (families.Infinity, "text_norm"),
        (families.MAR, "mask_token"),
        (families.MAR, "diffloss"),
    ],
)
def test_a_model_without_one_of_the_names_stays(kind, missing):
    model = kind()
    delattr(model, missing)
    kinds = [type(m) for m in model.modules()]
    report = arimg.accelerate(model)
    assert not report.replaced and report.kept[0].note.startswith("no known part found")
    assert [type(m) for m in model.modules()] == kinds


def test_a_model_whose_products_are_of_another_kind_is_named():
    class Other(nn.Linear):
        pass

    model = families.MAR()
    for layer in model.diffloss.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = Other
    report = arimg.accelerate(model)
    assert not report.replaced and report.kept[0].note == "expected linear layers, found none"
