"""Rule files, and the rules that come with the package."""

import csv
import os
import shlex
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_l2l import CoordinatewiseLSTM, main, rule_files
from lightning_l2l.rule_files import card, read_rule, save_rule, shipped_rules

ROOT = Path(__file__).parents[1]
NAMES = shipped_rules()


@pytest.fixture
def rule():
    torch.manual_seed(0)
    return CoordinatewiseLSTM(hidden_size=4, preprocessing="identity", output_scale=0.3)


def test_a_rule_file_brings_back_rule_and_weights(rule, tmp_path):
    save_rule(rule, tmp_path / "a.npz")
    found = read_rule(tmp_path / "a.npz")
    assert (found.hidden_size, found.preprocessing, found.output_scale) == (4, "identity", 0.3)
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    for name, value in rule.state_dict().items():
        assert torch.equal(found.state_dict()[name], value)
    assert os.listdir(tmp_path) == ["a.npz"]


def test_another_suffix_is_refused(rule, tmp_path):
    with pytest.raises(ValueError, match=r"use 'a\.npz'"):
        save_rule(rule, tmp_path / "a.ckpt")


class Trap:
    def __reduce__(self):
        return (pytest.fail, ("a rule file executed code",))


def test_damaged_files_and_pickles_are_refused(rule, tmp_path):
    path = tmp_path / "a.npz"
    save_rule(rule, path)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="cannot be read as a rule file"):
            read_rule(path)
    np.savez(path, rule=np.array([Trap()], dtype=object))
    with pytest.raises(ValueError, match="cannot be read as a rule file"):
        read_rule(path)
    np.savez(path, something=np.zeros(3))
    with pytest.raises(ValueError, match="cannot be read as a rule file"):
        read_rule(path)


def test_weights_must_fit_the_description(rule, tmp_path):
    save_rule(rule, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as archive:
        arrays = dict(archive)
    np.savez(tmp_path / "b.npz", **{k: v for k, v in arrays.items() if k != "bias_l1"})
    with pytest.raises(ValueError, match="do not fit the rule they are for"):
        read_rule(tmp_path / "b.npz")


@pytest.mark.parametrize("name", NAMES)
def test_shipped_rules_are_small_and_have_a_card(name):
    path = ROOT / "lightning_l2l" / "shipped" / f"{name}.npz"
    assert path.stat().st_size <= 200_000
    assert card(name)["sha256"] == sha256(path.read_bytes()).hexdigest()


def recompute(row, tmp_path, monkeypatch, root=None):
    """Run the command of a card's row and compare what it finds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["lightning-l2l"])
    words = shlex.split(row["command"])
    assert words[:3] == ["python", "-m", "lightning_l2l"]
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    if root is not None:
        words[words.index("--data.root") + 1] = str(root)
    main([*words[3:], "--trainer.enable_progress_bar=false"])
    (path,) = tmp_path.rglob("comparison.csv")
    with path.open(newline="") as file:
        found = {row["optimizer"]: row for row in csv.DictReader(file)}
    best = min((r for n, r in found.items() if n != "learned"), key=lambda r: float(r["final_loss"]))
    assert int(best["num_tasks"]) == row["num_tasks"]
    assert (best["optimizer"], float(best["lr"])) == (row["best"], row["lr"])
    # Other processors round otherwise, which moves single tasks more than their mean.
    assert float(found["learned"]["final_loss"]) == pytest.approx(row["learned"], rel=0.02)
    assert float(best["final_loss"]) == pytest.approx(row["best_loss"], rel=0.02)
    assert float(found["learned"]["ratio"]) == pytest.approx(row["ratio"], rel=0.04)


ROWS = [pytest.param(row, id=f"{name}-{k}") for name in NAMES for k, row in enumerate(card(name)["table"])]
SMALL = [row for row in ROWS if row.values[0].get("small")]


def test_every_card_has_a_row_that_is_recomputed_here():
    assert {row.id.split("-")[0] for row in SMALL} == set(NAMES)


@pytest.mark.parametrize("row", SMALL)
def test_the_cards_hold(row, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if "before" in row:
        interpreter, option, code = shlex.split(row["before"])
        assert (interpreter, option) == ("python", "-c")
        subprocess.run([sys.executable, option, code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    recompute(row, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("row", [row for row in ROWS if row not in SMALL])
def test_the_whole_cards_hold(row, tmp_path, monkeypatch):
    root = Path(os.environ.get("MNIST_ROOT", ROOT / "data")).resolve()
    if "--data.root" in row["command"] and not (root / "MNIST" / "raw").is_dir():
        pytest.skip(f"no MNIST in {root}; set MNIST_ROOT")
    recompute(row, tmp_path, monkeypatch, root if "--data.root" in row["command"] else None)


def test_a_shipped_rule_that_was_changed_is_refused(tmp_path, monkeypatch):
    for suffix in (".npz", ".yaml"):
        content = (ROOT / "lightning_l2l" / "shipped" / f"mnist{suffix}").read_bytes()
        (tmp_path / f"mnist{suffix}").write_bytes(content)
    monkeypatch.setattr(rule_files, "_SHIPPED", tmp_path)
    rule_files.read_shipped("mnist")
    save_rule(CoordinatewiseLSTM(), tmp_path / "mnist.npz")
    with pytest.raises(ValueError, match=r"'mnist' is damaged .* install lightning_l2l anew"):
        rule_files.read_shipped("mnist")


def test_unknown_names_are_told():
    with pytest.raises(ValueError, match="no shipped rule is called 'cifar'; use one of mnist, quadratic"):
        card("cifar")
