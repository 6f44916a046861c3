"""Rule files, and the rules that come with the package."""

import copy
import csv
import io
import json
import os
import shlex
import subprocess
import sys
import tracemalloc
import warnings
import zipfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hostile import VALUES, result_of
from lightning_l2l import CoordinatewiseLSTM, LearnedOptimizer, load_rule, main
from lightning_l2l.rules import files as rule_files
from lightning_l2l.rules.describe import describe
from lightning_l2l.rules.files import card, read_rule, save_rule, shipped_rules

ROOT = Path(__file__).parents[2]
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
    with pytest.raises(FileNotFoundError, match=r"no rule at 'cifar'; .* shipped rule: cifar10, cifar10_sub, general"):
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


# ---- hostile files ----

CANARY = "canary"


class Bomb:
    """Leaves a trace when it is unpickled: where it is absent nothing has been executed."""

    def __reduce__(self):
        return (Path(CANARY).touch, ())


SMALL_RULE = CoordinatewiseLSTM(hidden_size=2, num_layers=1)


def bytes_of(write, content):
    file = io.BytesIO()
    write(content, file)
    return file.getvalue()


def write_npz(arrays, file):
    np.savez(file, **arrays)


def arrays_of(rule, **changes):
    described = describe(rule)
    described["init_args"].update(changes)
    return {"rule": np.array(json.dumps(described)), **{k: v.numpy() for k, v in rule.state_dict().items()}}


CHECKPOINT = bytes_of(torch.save, checkpoint(SMALL_RULE))
LEGACY = bytes_of(lambda c, f: torch.save(c, f, _use_new_zipfile_serialization=False), checkpoint(SMALL_RULE))
RULE_FILE = bytes_of(write_npz, arrays_of(SMALL_RULE))
FILES = {"zip.ckpt": CHECKPOINT, "legacy.ckpt": LEGACY, "rule.npz": RULE_FILE}

MUTATION = st.tuples(st.floats(0, 0.9999), st.binary(min_size=1, max_size=6))


def mutated(content, mutations, kept):
    content = content[: round(len(content) * kept)]
    for place, new in mutations:
        start = int(place * len(content))
        content = content[:start] + new + content[start + len(new) :]
    return content


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def loads_a_rule_or_tells(path):
    """Both readers of the file; a rule that is loaded fits its description and works."""
    if path.suffix == ".ckpt":
        result_of(rule_files.read_checkpoint, path)
    found = result_of(load_rule, path)
    assert not Path(CANARY).exists()
    if found is not None:
        assert describe(rule_files.fill_rule(describe(found), found.state_dict(), "itself")) == describe(found)
        assert all(bool(p.isfinite().all()) for p in found.parameters())
        update, _ = found(torch.ones(3), found.init_state(3))
        assert update.shape == (3,)
    return found


ANY_FILE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@ANY_FILE
@given(
    name=st.sampled_from(list(FILES)),
    mutations=st.lists(MUTATION, max_size=4),
    kept=st.just(1.0) | st.floats(0, 1),
)
def test_mutated_and_truncated_files_are_loaded_or_told(here, name, mutations, kept):
    path = here / name
    path.write_bytes(mutated(FILES[name], mutations, kept))
    loads_a_rule_or_tells(path)


@ANY_FILE
@given(
    content=st.binary(max_size=200),
    start=st.sampled_from([b"", b"PK\x03\x04", b"\x80\x02", b"\x80\x04", b"\x93NUMPY\x01\x00"]),
    suffix=st.sampled_from([".ckpt", ".npz"]),
)
def test_arbitrary_bytes_are_told(here, content, start, suffix):
    path = here / f"file{suffix}"
    path.write_bytes(start + content)
    assert loads_a_rule_or_tells(path) is None


JSON = st.recursive(VALUES, lambda v: st.lists(v, max_size=2) | st.dictionaries(st.text(max_size=3), v, max_size=2))
CLASS_PATHS = st.sampled_from(
    [
        "lightning_l2l.rules.lstm.CoordinatewiseLSTM",
        "lightning_l2l.CoordinatewiseLSTM",
        "lightning_l2l.rules.base.UpdateRule",
        "torch.nn.modules.linear.Linear",
        "os.system",
        "antigravity.geohash",
    ]
)
INIT_ARGS = st.dictionaries(
    st.sampled_from([*describe(SMALL_RULE)["init_args"], "self", "width", "../../x"]), JSON, max_size=3
)


@ANY_FILE
@given(path=CLASS_PATHS | JSON, arguments=INIT_ARGS | JSON, suffix=st.sampled_from([".ckpt", ".npz"]))
@example(path="lightning_l2l.rules.lstm.CoordinatewiseLSTM", arguments={"hidden_size": 30_000}, suffix=".ckpt")
@example(path="lightning_l2l.rules.lstm.CoordinatewiseLSTM", arguments={"num_layers": 10**9}, suffix=".npz")
@example(path="lightning_l2l.rules.lstm.CoordinatewiseLSTM", arguments={"p": [1]}, suffix=".npz")
@example(path=["os.system"], arguments={}, suffix=".npz")
def test_any_description_is_built_or_told(here, path, arguments, suffix):
    before = set(sys.modules)
    if isinstance(arguments, dict):
        arguments = {**describe(SMALL_RULE)["init_args"], **arguments}
    described = {"class_path": path, "init_args": arguments}
    file = here / f"file{suffix}"
    if suffix == ".ckpt":
        torch.save({**checkpoint(SMALL_RULE), "hyper_parameters": {"rule": described}}, file)
    else:
        write_npz({**arrays_of(SMALL_RULE), "rule": np.array(json.dumps(described))}, file)
    found = loads_a_rule_or_tells(file)
    if found is not None:
        assert describe(found)["init_args"] == json.loads(json.dumps(arguments))
    assert "antigravity" not in set(sys.modules) - before


def deep(levels):
    return "[" * levels + "]" * levels


def huge_header(shape):
    """An array file that states a shape and has nothing of it."""
    header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


def archive(members, method=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as out:
        for name, content in members.items():
            out.writestr(name, content)
    return file.getvalue()


def members_of(content):
    with zipfile.ZipFile(io.BytesIO(content)) as packed:
        return {name: packed.read(name) for name in packed.namelist()}


def expanded(size):
    """A tensor of any size in a file of any size: all its elements are the same one."""
    content = checkpoint(SMALL_RULE)
    content["state_dict"]["rule.readout.bias"] = torch.zeros(1).expand(size)
    return bytes_of(torch.save, content)


def with_weight(value):
    content = checkpoint(SMALL_RULE)
    content["state_dict"]["rule.readout.bias"] = value
    return bytes_of(torch.save, content)


def saved(content):
    return bytes_of(torch.save, content)


def with_member(members, method=zipfile.ZIP_STORED):
    return archive({**members_of(RULE_FILE), **members}, method)


HOSTILE = {
    "code.ckpt": (lambda: bytes_of(torch.save, {**checkpoint(SMALL_RULE), "x": Bomb()}), "it holds more than weights"),
    "old.ckpt": (
        lambda: bytes_of(lambda c, f: torch.save(c, f, _use_new_zipfile_serialization=False), Bomb()),
        "it holds more than weights",
    ),
    "code.npz": (
        lambda: bytes_of(write_npz, {**arrays_of(SMALL_RULE), "bias_l0": np.array([Bomb()], dtype=object)}),
        "pickle",
    ),
    "more_code.npz": (lambda: with_member({"x.npy": members_of(CHECKPOINT)["archive/data.pkl"]}), "cannot be read"),
    "bomb.npz": (lambda: with_member({"x.npy": bytes(10**8)}, zipfile.ZIP_DEFLATED), "unpacked it"),
    "bomb.ckpt": (lambda: archive({**members_of(CHECKPOINT), "x": bytes(10**8)}, zipfile.ZIP_DEFLATED), "unpacked it"),
    "huge.npz": (lambda: with_member({"bias_l0.npy": huge_header((10**13,))}), "cannot be read"),
    "endless.npz": (lambda: with_member({"bias_l0.npy": huge_header((10**40,))}), "cannot be read"),
    "deep.npz": (lambda: bytes_of(write_npz, {"rule": np.array(deep(10**5))}), "cannot be read"),
    "long.npz": (lambda: bytes_of(write_npz, {"rule": np.array("9" * 10**5)}), "cannot be read"),
    "outside.npz": (lambda: with_member({"../../x.npy": huge_header((0,))}), "do not fit"),
    "texts.npz": (lambda: bytes_of(write_npz, {**arrays_of(SMALL_RULE), "bias_l0": np.array(["a"] * 8)}), "cannot be"),
    "complex.npz": (lambda: bytes_of(write_npz, {**arrays_of(SMALL_RULE), "bias_l0": np.zeros(8, complex)}), "do not"),
    "nan.npz": (
        lambda: bytes_of(write_npz, {**arrays_of(SMALL_RULE), "bias_l0": np.full(8, np.nan, "f4")}),
        "are not all finite",
    ),
    "expanded.ckpt": (lambda: expanded((10**13,)), "do not fit"),
    "sparse.ckpt": (lambda: with_weight(torch.zeros(1).to_sparse()), "do not fit"),
    "meta.ckpt": (lambda: with_weight(torch.zeros(1, device="meta")), "do not fit"),
    "number.ckpt": (lambda: with_weight(3.0), "holds no rule"),
    "numbered.ckpt": (lambda: saved({"state_dict": {1: 2}, "hyper_parameters": {"rule": {}}}), "no rule"),
    "listed.ckpt": (lambda: saved({"state_dict": [], "hyper_parameters": [{"rule": 1}]}), "no rule"),
    "empty.ckpt": (bytes, "EOFError"),
    "empty.npz": (bytes, "cannot be read as a rule file"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_refused_without_code_memory_or_files(here, name):
    make, told = HOSTILE[name]
    path = here / name
    path.write_bytes(make())
    tracemalloc.start()
    assert loads_a_rule_or_tells(path) is None
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert told in result_of.told and name in result_of.told
    assert peak < 30_000_000 or name == "huge.npz"  # whose memory is asked for, and never touched
    assert os.listdir(here) == [name] and not (here.parents[1] / "x.npy").exists()


def test_the_canary_would_sing(here):
    torch.save(Bomb(), "code.ckpt")
    torch.load("code.ckpt", weights_only=False)
    assert Path(CANARY).exists()


@pytest.mark.parametrize("kind", ["folder", "link"])
def test_no_file_at_all(here, kind):
    for name in ("a.ckpt", "a.npz"):
        Path(name).mkdir() if kind == "folder" else Path(name).symlink_to("nowhere")
        with pytest.raises(FileNotFoundError, match=f"no rule at '{name}'; give the path of a checkpoint"):
            load_rule(name)
    for source in (None, 5, ["mnist"], torch.nn.Linear(1, 1)):
        with pytest.raises(TypeError, match="give the name of a shipped rule, or a path"):
            load_rule(source)
    for source in ("a\0b", "", ".", "x" * 5000):
        assert result_of(load_rule, source) is None


def command_line(*arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lightning-l2l"])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            main([*arguments])


def test_commands_refuse_hostile_files_too(here):
    for name, (make, _) in HOSTILE.items():
        Path(name).write_bytes(make())
        for command in (["test", f"--ckpt_path={name}"], ["export", f"--ckpt_path={name}", "--output=out.npz"]):
            assert result_of(command_line, *command) is None
            assert name in result_of.told
        assert not Path(CANARY).exists() and not Path("out.npz").exists()


def test_a_flipped_bit_in_a_weight_is_found(here):
    place = CHECKPOINT.index(SMALL_RULE.readout.weight.detach().numpy().tobytes())
    Path("flipped.ckpt").write_bytes(mutated(CHECKPOINT, [(place / len(CHECKPOINT), b"\x01\x02")], 1.0))
    with pytest.raises(ValueError, match=r"cannot be read as a checkpoint .* the checksum of .* is wrong"):
        load_rule("flipped.ckpt")


@pytest.mark.parametrize("missing", ["loops", "optimizer_states", "pytorch-lightning_version"])
def test_fit_goes_on_with_whole_checkpoints_only(here, missing):
    whole = {"epoch": 0, "global_step": 0, "loops": {}, "callbacks": {}, "optimizer_states": [], "lr_schedulers": []}
    whole |= {"pytorch-lightning_version": "2.6.6"}
    torch.save({**checkpoint(SMALL_RULE), **whole, missing: None}, "a.ckpt")
    assert result_of(command_line, "fit", "--ckpt_path=a.ckpt") is None
    assert f"nothing that `fit` could go on with ({missing}); use `test`" in result_of.told


PROBE = """from pathlib import Path
Path("canary").touch()
def make(): Path("canary").touch()
"""


@pytest.mark.parametrize(
    "model",
    [
        {"task": {"class_path": "probe.Task", "init_args": {}}},
        {"task": {"class_path": "lightning_l2l.NetworkTask", "init_args": {"module": "probe.make"}}},
        {"task": {"class_path": "lightning_l2l.NetworkTask", "init_args": {"module": "os.abort"}}},
        {"task": {"class_path": "lightning_l2l.NetworkTask", "init_args": {"module": "./probe.yaml"}}},
        {"task": {"class_path": "lightning_l2l.NetworkTask", "init_args": {"module": "probe"}}},
        {"task": "probe.make"},
        {"rule": {"class_path": "probe.Rule"}},
        {"optimizer": {"class_path": "probe.make", "init_args": {}}},
        {"_class_path": "probe.make"},
        {"task": {"class_path": "lightning_l2l.Quadratic", "init_args": {"dim": torch.ones(2)}}},
    ],
)
def test_a_checkpoint_cannot_have_the_command_line_import_anything(here, monkeypatch, model):
    Path("probe.py").write_text(PROBE)
    Path("probe").write_text("class_path: probe.make")
    Path("probe.yaml").write_text("class_path: probe.make")
    monkeypatch.syspath_prepend(here)
    content = checkpoint(CoordinatewiseLSTM(2))
    torch.save({**content, "hyper_parameters": {**content["hyper_parameters"], **model}}, "evil.ckpt")
    assert result_of(command_line, "test", "--ckpt_path=evil.ckpt") is None
    told = ("cannot be made from it alone", "'probe.Rule' is not known; import its module first (--import probe")
    assert any(one in result_of.told for one in told) and "evil.ckpt" in result_of.told
    assert not Path(CANARY).exists() and "probe" not in sys.modules


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
    with pytest.raises(ValueError, match="no shipped rule is called 'cifar'; use one of cifar10, cifar10_sub, general"):
        card("cifar")
