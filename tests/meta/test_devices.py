"""Several processes train the rule that one would, and end together whatever ends one of them."""

import csv
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_l2l.data.episodes import task_seed
from processes import ENDLESS, TINY, start, start_ranks

ROOT = Path(__file__).parents[2]
ONE, EACH = "--data.num_tasks=4", "--data.num_tasks=2"
TWO = ["--trainer.devices=2", "--trainer.strategy=ddp"]
LEAN = [*TINY, "--curves.baselines=[]"]
FIT = ["fit", *TINY, "--trainer.max_epochs=3", "--trainer.precision=64-true", "--model.gradient_clip=0.1"]
LAST = Path("lightning_logs/version_0/checkpoints/last.ckpt")


def shell(folder, *arguments, launcher=("-m", "lightning_l2l")):
    """A command as it is typed, from which Lightning or torchrun starts the processes."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return subprocess.Popen(
        [sys.executable, *launcher, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
    )


def end(process, seconds=100):
    """Wait for the end of a command; gives what it has said."""
    try:
        return process.communicate(timeout=seconds)[0]
    except subprocess.TimeoutExpired:
        process.kill()
        raise AssertionError(f"it hung; it had said:\n{process.communicate()[0]}") from None


def files(folder):
    """Names of all files, but for moment, host and process in those of TensorBoard."""
    paths = (p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    return sorted(re.sub(r"tfevents\..*", "tfevents", str(path)) for path in paths)


def curves(folder):
    events = EventAccumulator(str(folder / "lightning_logs/version_0"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def load(path):
    return torch.load(path, map_location="cpu", weights_only=True)


def best_scores(state):
    return [float(s["best_model_score"]) for s in state["callbacks"].values() if s.get("monitor")]


def assert_close(ours, reference, tolerance=1e-6):
    for name, weight in reference.items():
        assert (ours[name] - weight).norm() <= tolerance * weight.norm(), name


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run of one process."""
    folder = tmp_path_factory.mktemp("one") / "run"
    command = start(folder, *FIT, ONE)
    assert command.end() == 0, command.told
    return folder


TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "lightning_l2l")


@pytest.mark.parametrize("launcher", [("-m", "lightning_l2l"), TORCHRUN], ids=["lightning", "torchrun"])
def test_two_processes_train_the_rule_of_one_and_write_what_it_writes(alone, tmp_path, launcher):
    process = shell(tmp_path, *FIT, EACH, *TWO, launcher=launcher)
    told = end(process)
    assert process.returncode == 0, told
    for name in ("last.ckpt", "best.ckpt"):
        ours, reference = (load(folder / LAST.with_name(name)) for folder in (tmp_path, alone))
        assert ours["global_step"] == reference["global_step"] > 0
        assert_close(ours["state_dict"], reference["state_dict"])
        assert best_scores(ours) == pytest.approx(best_scores(reference), rel=1e-6)
    ours, reference = curves(tmp_path), curves(alone)
    assert ours.keys() == reference.keys() >= {"train/meta_loss", "val/final_loss", "val/adam/final_loss"}
    for tag, points in reference.items():
        assert [step for step, _ in ours[tag]] == [step for step, _ in points]
        assert [value for _, value in ours[tag]] == pytest.approx([value for _, value in points], rel=1e-6), tag
    assert files(tmp_path) == files(alone)
    for line in ("Tuning the learning rates", "Compare on test tasks:", "Look at the curves:"):
        assert told.count(line) == 1, told


@pytest.mark.cuda
def test_a_gpu_trains_the_rule_of_the_cpu_and_writes_what_it_writes(alone, tmp_path):
    process = shell(tmp_path, *FIT, ONE, "--trainer.accelerator=gpu", "--trainer.devices=1")
    told = end(process)
    assert process.returncode == 0, told
    ours, reference = (load(folder / LAST) for folder in (tmp_path, alone))
    assert_close(ours["state_dict"], reference["state_dict"])
    assert best_scores(ours) == pytest.approx(best_scores(reference), rel=1e-6)
    assert files(tmp_path) == files(alone)


def numbers(path):
    """What a CSV file says, but for how long it took."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return [[row[name] for name in row if "seconds" not in name] for row in rows]


@pytest.mark.parametrize("command, names", [("test", ("comparison", "curves")), ("predict", ("predictions",))])
def test_two_processes_evaluate_as_one(alone, tmp_path, command, names):
    flags = [command, *TINY, "--trainer.precision=64-true", f"--ckpt_path={alone / LAST}"]
    one = start(tmp_path / "one", *flags, "--data.num_tasks=4")
    assert one.end() == 0, one.told
    for process in start_ranks(tmp_path / "two", *flags, "--data.num_tasks=2"):
        assert process.end() == 0, process.told
    assert files(tmp_path / "two") == files(tmp_path / "one")
    for name in names:
        ours, reference = (
            numbers(tmp_path / folder / f"lightning_logs/version_0/{name}.csv") for folder in ("two", "one")
        )
        assert len(ours) == len(reference) > 1
        for row, wanted in zip(ours, reference, strict=True):
            for value, want in zip(row, wanted, strict=True):
                assert value == want or float(value) == pytest.approx(float(want), rel=1e-6)


def poison(rank, step):
    """Flags with which one training task fails, which is one of that rank, in epoch 0, in its second episode."""
    seed = task_seed(0, "train/start", 0, 4 + rank)
    return ["--model.task=processes.Poisoned", f"--model.task.seed={seed}", f"--model.task.step={step}"]


@pytest.mark.parametrize("rank", [0, 1])
def test_all_processes_skip_together_where_one_has_no_gradient(tmp_path, rank):
    flags = ["fit", *LEAN, *poison(rank, 1), "--trainer.max_epochs=2", "--trainer.precision=64-true"]
    flags += ["--trainer.callbacks=processes.WriteDown"]
    one = start(tmp_path / "one", *flags, ONE)
    assert one.end() == 0, one.told
    for process in start_ranks(tmp_path / "two", *flags, EACH):
        assert process.end() == 0, process.told
    reference = load(tmp_path / "one/rank_0.pt")
    ranks = [load(tmp_path / f"two/rank_{k}.pt") for k in range(2)]
    assert reference["skipped"] == ranks[0]["skipped"] == ranks[1]["skipped"] == 2
    assert_close(ranks[0]["weights"], reference["weights"])
    assert all(torch.equal(ranks[0]["weights"][name], weight) for name, weight in ranks[1]["weights"].items())
    assert load(tmp_path / "two" / LAST)["global_step"] == 2 * 3 * 2 - 2
    assert not math.isfinite(curves(tmp_path / "two")["train/meta_loss"][1][1])  # of all ranks


NOT_FINITE = "error: the loss is not finite at the start of the episode for 1 of 2 tasks"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_fails_alone_ends_the_others(tmp_path, rank):
    processes = start_ranks(tmp_path / "run", "fit", *LEAN, EACH, *poison(rank, 0))
    assert [process.end(30) for process in processes] == [1, 1]
    assert NOT_FINITE in processes[rank].told
    assert "error: another process of this run has ended or cannot be reached" in processes[1 - rank].told
    assert not any("Traceback" in process.told for process in processes)


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_the_command_ends_with_the_message_of_the_process_that_fails(tmp_path, rank):
    process = shell(tmp_path, "fit", *LEAN, EACH, *TWO, *poison(rank, 0))
    told = end(process, 60)
    assert process.returncode == 1, told
    assert told.count("error: ") == told.count(NOT_FINITE) == 1, told
    assert "Traceback" not in told


@pytest.mark.slow
def test_tasks_that_cannot_be_shared_out_are_told_once(tmp_path):
    process = shell(tmp_path, "fit", *LEAN, EACH, *TWO, "--data.num_val_tasks=5")
    told = end(process, 60)
    assert process.returncode == 1, told
    assert told.count("error: ") == told.count("5 tasks cannot be shared out evenly over 2 processes; use 4 or 6") == 1


def children(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def is_alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def wait_for_line(process, line):
    told = ""
    while line not in told:
        part = process.stdout.readline()
        assert part, told
        told += part
    return told


LONG = [*LEAN, EACH, "--data.episodes_per_epoch=40", "--trainer.max_epochs=6"]


def test_sigterm_to_the_main_process_stops_all_after_the_same_episode(tmp_path):
    undisturbed = start_ranks(tmp_path / "undisturbed", "fit", *LONG)
    process = shell(tmp_path / "stopped", "fit", *LONG, *TWO)
    told = wait_for_line(process, "All distributed processes registered")
    while not (tmp_path / "stopped" / LAST).exists():
        assert process.poll() is None, told + process.stdout.read()
    others = children(process)
    assert others
    process.send_signal(signal.SIGTERM)
    told += end(process, 60)
    assert process.returncode == 143, told
    assert told.count("go on with --ckpt_path lightning_logs/version_0/checkpoints/last.ckpt") == 1
    assert "Traceback" not in told and not any(map(is_alive, others))
    assert 0 < load(tmp_path / "stopped" / LAST)["global_step"] < 6 * 40 * 2
    for rank in [*undisturbed, *start_ranks(tmp_path / "stopped", "fit", *LONG, "--ckpt_path=last")]:
        assert rank.end() == 0, rank.told
    ours, reference = (load(tmp_path / folder / LAST) for folder in ("stopped", "undisturbed"))
    assert_close(ours["state_dict"], reference["state_dict"], tolerance=0)
    assert best_scores(ours) == best_scores(reference)


@pytest.mark.parametrize(
    "signum, ranks, status", [(signal.SIGINT, [1], 1), (signal.SIGTERM, [0, 1], 143)], ids=["Ctrl-C", "SIGTERM"]
)
def test_a_signal_is_heeded_by_all_processes_whichever_get_it(tmp_path, signum, ranks, status):
    processes = start_ranks(tmp_path / "run", "fit", *LEAN, EACH, ENDLESS)
    processes[0].wait_for((tmp_path / "run" / LAST).exists)
    for rank in ranks:
        processes[rank].signal(signum)
    assert [process.end(30) for process in processes] == [status, status]
    assert processes[0].told.count("go on with --ckpt_path") == 1
    assert load(tmp_path / "run" / LAST)["global_step"] > 0


@pytest.mark.slow
def test_sigterm_while_baselines_are_tuned_ends_all_at_once(tmp_path):
    process = shell(tmp_path, "fit", *TINY, EACH, *TWO, "--model.num_steps=300000")
    told = wait_for_line(process, "Tuning the learning rates")
    others = children(process)
    assert others
    process.send_signal(signal.SIGTERM)
    told += end(process, 10)
    assert process.returncode == 143, told
    assert "Traceback" not in told and not any(map(is_alive, others))
