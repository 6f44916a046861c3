import math

import pytest
import torch

from lightning_l2l.rules.preprocessing import identity, log_and_sign


@pytest.mark.parametrize("p", [1.0, 10.0, 50.0])
def test_log_and_sign_is_appendix_a(p):
    torch.manual_seed(0)
    g = torch.cat([torch.randn(1000), torch.randn(1000) * math.exp(-p), torch.tensor([0.0])]).double()
    magnitude, sign = log_and_sign(g, p)
    for value, first, second in zip(g.tolist(), magnitude.tolist(), sign.tolist(), strict=True):
        if abs(value) >= math.exp(-p):
            assert first == pytest.approx(math.log(abs(value)) / p, abs=1e-12)
            assert second == pytest.approx(math.copysign(1.0, value))
        else:
            assert (first, second) == (-1.0, pytest.approx(math.exp(p) * value))


@pytest.mark.parametrize(
    "factor, expected", [(1 - 1e-6, (-1.0, 1 - 1e-6)), (1.0, (-1.0, 1.0)), (1 + 1e-6, (-1 + 1e-7, 1.0))]
)
def test_log_and_sign_at_its_threshold(factor, expected):
    g = torch.tensor([math.exp(-10) * factor], dtype=torch.float64)
    for direction in (1, -1):
        magnitude, sign = log_and_sign(direction * g)
        assert magnitude.item() == pytest.approx(expected[0], abs=1e-12)
        assert sign.item() == pytest.approx(direction * expected[1], abs=1e-12)


def test_log_and_sign_keeps_nonfinite_gradients_visible():
    assert log_and_sign(torch.tensor([float("nan")])).isnan().all()
    assert log_and_sign(torch.tensor([float("inf")]))[0].isinf()


def test_the_argument_is_left_alone():
    for function in (log_and_sign, identity):
        g = torch.tensor([0.5, -1e-9])
        function(g, 10.0)
        assert g.tolist() == [0.5, pytest.approx(-1e-9)]


def test_identity():
    assert identity(torch.tensor([3.0, -2.0])).tolist() == [[3.0, -2.0]]
