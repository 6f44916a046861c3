"""The compiled part gives what torch's operators give, and is never needed."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from lightning_l2l.rules import CoordinatewiseLSTM, RNNprop
from lightning_l2l.rules.kernels import fused
from lightning_l2l.rules.kernels.compiled import NotCompiled, find_compiler


def is_compiler():
    try:
        return bool(find_compiler())
    except NotCompiled:
        return False


compiler = pytest.mark.skipif(not is_compiler(), reason="no C compiler here")


def make_with_time(**options):
    return RNNprop(beta1=[0.5, 0.9, 0.99], beta2=0.999, time=True, decay=3, horizon=15, warmup=4, **options)


KINDS = {
    "identity": lambda: CoordinatewiseLSTM(preprocessing="identity"),
    "log_and_sign": lambda: CoordinatewiseLSTM(),
    "moments": lambda: RNNprop(),
    "moments and time": make_with_time,
}


def run(rule, gradients, memory, weights=None, beside=None):
    *fed, _ = gradients
    unroller = rule.unroller(gradients.shape[1], len(fed), memory=memory, block=900)
    state = rule.init_state(gradients.shape[1])
    unroller.begin(state)
    updates = torch.stack([unroller.step(g, state).clone() for g in fed])
    return [updates, *unroller.gradients(gradients, weights or [1.0] * len(fed), beside)]


@compiler
@pytest.mark.parametrize("memory", ["fast", "flat"])
@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("make", [CoordinatewiseLSTM, RNNprop, make_with_time])
@pytest.mark.parametrize("beside", [None, torch.linspace(-1, 3, 20 * 2001).view(20, 2001)], ids=["alone", "beside"])
def test_compiled_and_plain_agree(monkeypatch, beside, make, num_layers, memory):
    assert fused.fused_for(torch.empty(0)) is not None
    torch.manual_seed(0)
    rule = make(num_layers=num_layers)
    gradients, weights = torch.randn(21, 2001) * 0.1, torch.randn(20).tolist()
    compiled = run(rule, gradients, memory, weights, beside)
    monkeypatch.setattr(fused, "_library", lambda: None)
    plain = run(rule, gradients, memory, weights, beside)
    torch.testing.assert_close(compiled[0], plain[0], rtol=1e-5, atol=1e-7)
    for a, b in zip(compiled[1:], plain[1:], strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


@compiler
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_saturates_as_plain_does_and_lets_nan_through(monkeypatch, kind):
    torch.manual_seed(0)
    rule = KINDS[kind]()
    gradients = torch.tensor([0.0, 1e-30, -3.0, 80.0, -80.0, 1e30, -1e30]).repeat(6, 5)
    gradients[-1] = torch.randn(35)  # the only one that counts: the others are too large to be multiplied
    weights = [0.0, 0.0, 0.0, 0.0, 1.0]
    compiled = run(rule, gradients, "flat", weights)
    broken = gradients.clone()
    broken[2, 33] = torch.nan
    updates, *found = run(rule, broken, "flat", weights)
    assert updates[2:, 33].isnan().all() and updates.isnan().sum() == 3
    assert all(gradient.isnan().any() for gradient in found)
    monkeypatch.setattr(fused, "_library", lambda: None)
    plain = run(rule, gradients, "flat", weights)
    torch.testing.assert_close(compiled[0], plain[0], rtol=1e-5, atol=1e-7)
    for a, b in zip(compiled[1:], plain[1:], strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


@compiler
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_counts_denormals_as_zero_and_leaves_others_theirs(monkeypatch, kind):
    torch.manual_seed(0)
    rule = KINDS[kind]()
    gradients = torch.randn(21, 500) * torch.logspace(0, -45, 500)  # an unroll is slow where it meets many of these
    compiled = run(rule, gradients, "flat")
    assert (torch.full((500,), 1e-40) * 0.5).count_nonzero() == 500
    monkeypatch.setattr(fused, "_library", lambda: None)
    plain = run(rule, gradients, "flat")
    torch.testing.assert_close(compiled[0], plain[0], rtol=1e-5, atol=1e-7)
    for a, b in zip(compiled[1:], plain[1:], strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


@compiler
def test_compiled_goes_by_the_weights_of_the_beginning():
    torch.manual_seed(0)
    rule, gradients = CoordinatewiseLSTM(), torch.randn(4, 40)
    wanted = run(rule, gradients, "flat")
    unroller = rule.unroller(40, 3)
    state = rule.init_state(40)
    unroller.begin(state)
    with torch.no_grad():
        for parameter in rule.parameters():
            parameter.zero_()
    assert torch.equal(torch.stack([unroller.step(g, state).clone() for g in gradients[:-1]]), wanted[0])
    for a, b in zip(unroller.gradients(gradients, [1.0] * 3), wanted[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_only_float32_on_the_cpu_is_compiled():
    assert fused.fused_for(torch.empty(0, dtype=torch.float64)) is None
    assert fused.fused_for(torch.empty(0, device="meta")) is None


@pytest.fixture
def afresh(monkeypatch, tmp_path):
    """Of the library nothing is known and nothing kept."""
    fused._library.cache_clear()
    for name in ("CC", "LIGHTNING_L2L_FUSED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield monkeypatch
    fused._library.cache_clear()


def test_one_warning_says_why_it_is_slow_and_what_to_do(afresh):
    afresh.setenv("CC", "no-such-compiler")
    rule, state = CoordinatewiseLSTM(), torch.zeros(80, 5)
    with pytest.warns(RuntimeWarning) as found:
        rule.step_(torch.ones(5), state)
    (warning,) = found
    message = str(warning.message)
    assert Path(warning.filename).name == "lstm.py"  # not the line that warns
    assert "3 to 6 times as long" in message and "CC='no-such-compiler' names no program" in message
    assert "install a C compiler" in message and "LIGHTNING_L2L_FUSED=0" in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rule.step_(torch.ones(5), state)
        rule.unroller(5, 1)


@pytest.mark.parametrize("like", [torch.empty(0, dtype=torch.float64), torch.empty(0, device="meta")], ids=str)
def test_what_is_never_compiled_is_not_warned_of(afresh, like):
    afresh.setenv("CC", "no-such-compiler")
    assert fused.fused_for(like) is None  # a warning is an error here


@compiler
def test_where_it_cannot_be_kept_it_is_compiled_all_the_same_and_one_warning_says_so(afresh, tmp_path):
    (tmp_path / "cache").write_text("a file")
    with pytest.warns(
        RuntimeWarning, match="have to be again the next time: .* set XDG_CACHE_HOME to a folder"
    ) as found:
        library = fused.fused_for(torch.empty(0))
    assert len(found) == 1 and library is not None and fused.fused_for(torch.empty(0)) is library
    gradients = torch.randn(4, 40)
    compiled = run(CoordinatewiseLSTM(), gradients, "flat")
    assert all(part.isfinite().all() for part in compiled)


@pytest.mark.parametrize(
    "environment, causes",
    [
        ({"LIGHTNING_L2L_FUSED": "0"}, []),
        ({"CC": "no-such-compiler"}, ["CC='no-such-compiler' names no program"]),
        ({"CC": "false"}, ["false failed (exit status 1"]),
    ],
    ids=str,
)
def test_without_it_all_goes_on(environment, causes, tmp_path):
    code = (
        "import torch; from lightning_l2l.rules import CoordinatewiseLSTM; "
        "from lightning_l2l.rules.kernels import fused; assert fused.fused_for(torch.empty(0)) is None; "
        "u, s = CoordinatewiseLSTM().unroller(5, 1), torch.zeros(80, 5); u.begin(s); "
        "print(u.step(torch.ones(5), s).shape)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "torch.Size([5])" in found.stdout
    assert found.stderr.count("RuntimeWarning") == len(causes)
    assert all(cause in found.stderr for cause in causes)
