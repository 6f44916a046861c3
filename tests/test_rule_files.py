"""Rule files, and the rules that come with the package."""

import copy
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

from lightning_l2l import CoordinatewiseLSTM, LearnedOptimizer, load_rule, main, rule_files
from lightning_l2l.rule_files import card, read_rule, save_rule, shipped_rules
from lightning_l2l.rules.describe import describe

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


# ---- load_rule ----


def checkpoint(rule):
    """What a checkpoint of MetaOptimizer holds, as far as its rule is concerned."""
    return {
        "state_dict": {"task.scale": torch.ones(1), **{f"rule.{k}": v for k, v in rule.state_dict().items()}},
        "hyper_parameters": {"rule": describe(rule), "unroll_length": 20},
        "epoch": 3,
    }


SOURCES = {
    "checkpoint": (checkpoint, False),
    "state-dict": (lambda rule: rule.state_dict(), True),
    "state-dict-of-the-module": (lambda rule: checkpoint(rule)["state_dict"], True),
}


@pytest.mark.parametrize("way", ["path", "name", "loaded"])
@pytest.mark.parametrize("source", SOURCES)
def test_load_rule_brings_back_rule_and_weights(rule, tmp_path, source, way):
    make, is_bare = SOURCES[source]
    content = copy.deepcopy(make(rule))
    torch.save(content, tmp_path / "rule.ckpt")
    given = {"path": tmp_path / "rule.ckpt", "name": str(tmp_path / "rule.ckpt"), "loaded": content}[way]
    form = CoordinatewiseLSTM(hidden_size=4, preprocessing="identity", output_scale=0.3) if is_bare else None
    before = copy.deepcopy(form)
    found = load_rule(given, form)
    assert describe(found) == describe(rule) and found is not form
    assert not found.training and not any(p.requires_grad for p in found.parameters())
    for weights in content.get("state_dict", content).values():
        weights.zero_()  # they were copied
    for key, value in rule.state_dict().items():
        assert torch.equal(found.state_dict()[key], value)
    if form is not None:
        assert form.training and all(p.requires_grad for p in form.parameters())
        for a, b in zip(form.parameters(), before.parameters(), strict=True):
            assert torch.equal(a, b)


def test_load_rule_reads_rule_files_and_knows_the_shipped_ones(rule, tmp_path):
    save_rule(rule, tmp_path / "own.npz")
    for source in (tmp_path / "own.npz", str(tmp_path / "own.npz")):
        assert torch.equal(load_rule(source).readout.weight, rule.readout.weight)
    for name in NAMES:
        assert describe(load_rule(name)) == describe(rule_files.read_shipped(name))
    with pytest.raises(FileNotFoundError, match=r"no rule at 'cifar'; .* name of a shipped rule: mnist, quadratic"):
        load_rule("cifar")
    with pytest.raises(FileNotFoundError, match=r"no rule at .*nothing\.npz"):
        load_rule(tmp_path / "nothing.npz")
    with pytest.raises(FileNotFoundError, match="no rule at"):
        load_rule(tmp_path)


def test_an_optimizer_takes_what_load_rule_takes(rule):
    params = [torch.nn.Parameter(torch.zeros(2))]
    found = LearnedOptimizer(params, checkpoint(rule)).rule
    assert torch.equal(found.readout.weight, rule.readout.weight)


def changed(**arguments):
    """A checkpoint's description of its rule, with other arguments."""

    def change(content):
        content["hyper_parameters"]["rule"]["init_args"].update(arguments)
        return content

    return change


def of_class(path):
    def change(content):
        content["hyper_parameters"]["rule"]["class_path"] = path
        return content

    return change


def without_rule(content):
    del content["hyper_parameters"]["rule"]
    return content


@pytest.mark.parametrize(
    "change, message",
    [
        (without_rule, "neither a checkpoint of a MetaOptimizer nor a state_dict: it holds no rule"),
        (changed(hidden_size=5), "do not fit"),
        (changed(num_layers=3), "do not fit"),
        (changed(width=5), "cannot be built"),
        (of_class("os.system"), "'os.system' is not known"),
        (
            lambda content: {**content, "trap": Trap()},
            r"cannot be read as a checkpoint \(damaged, or with code in it\)",
        ),
        (lambda content: [1, 2], "holds no rule"),
        (lambda content: {"state_dict": 3, "hyper_parameters": {"rule": 3}}, "holds no rule"),
        (lambda content: content["state_dict"], r"does not say of which rule; give load_rule\(\.\.\., rule="),
    ],
)
def test_load_rule_refuses(rule, tmp_path, change, message):
    content = change(checkpoint(rule))
    torch.save(content, tmp_path / "rule.ckpt")
    with pytest.raises(ValueError, match=message):
        load_rule(tmp_path / "rule.ckpt")
    if isinstance(content, dict) and "trap" not in content:
        with pytest.raises(ValueError, match=message):
            load_rule(content)


@pytest.mark.parametrize("form", [CoordinatewiseLSTM(hidden_size=5), CoordinatewiseLSTM(hidden_size=4, num_layers=1)])
def test_a_bare_state_dict_must_fit_the_rule_it_is_said_to_be_of(rule, form):
    with pytest.raises(ValueError, match="weights in this state_dict do not fit the rule they are for"):
        load_rule(rule.state_dict(), form)
    with pytest.raises(ValueError, match="do not fit"):
        load_rule({}, form)


def test_load_rule_refuses_truncated_files(rule, tmp_path):
    path = tmp_path / "rule.ckpt"
    torch.save(checkpoint(rule), path)
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"rule\.ckpt' cannot be read as a checkpoint"):
            load_rule(path)


# ---- shipped rules and their cards ----


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
