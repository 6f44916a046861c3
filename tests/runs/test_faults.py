"""What may befall a run, and that nothing is lost by it; with real processes where these are what counts."""

import errno
import random
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_l2l import QuadraticDataModule, main
from lightning_l2l.commands.cli import find_foreseen
from lightning_l2l.runs.checkpoints import AtomicCheckpointIO, is_whole
from lightning_l2l.runs.folder import held
from lightning_l2l.runs.loggers import RunLogger
from processes import ENDLESS, TINY, start

FIT = ["fit", *TINY, "--data.num_tasks=4", "--curves.baselines=[]"]


pytestmark = pytest.mark.usefixtures("in_tmp_path")


def checkpoint(folder, name="last"):
    return folder / "lightning_logs/version_0/checkpoints" / f"{name}.ckpt"


def load(path):
    assert is_whole(path)
    return torch.load(path, weights_only=True)


def scalars(folder, tag):
    events = EventAccumulator(str(folder / "lightning_logs/version_0"))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def best_score(state):
    (score,) = [s["best_model_score"] for s in state["callbacks"].values() if s.get("monitor")]
    return score


def assert_equal(a, b):
    """Two values of checkpoints, bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def assert_same_run(a, b):
    """The runs in two folders have ended with the same rule, best rule and curves."""
    for name in ("last", "best"):
        one, other = load(checkpoint(a, name)), load(checkpoint(b, name))
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
            assert_equal(one[key], other[key])
        assert_equal(best_score(one), best_score(other))
    for tag in ("train/meta_loss", "val/final_loss"):
        assert scalars(a, tag) == scalars(b, tag)


def killed_and_resumed(folder, flags, kills, generator):
    """Kill a run at random moments and go on; returns when it has come to its end."""
    last = checkpoint(folder)
    for kill in range(kills):
        resume = ["--ckpt_path=last"] if last.exists() else []
        command = start(folder, *flags, *resume)
        if kill:  # the first is killed before it has written anything, or soon after
            before = last.stat().st_ino if last.exists() else None
            command.wait_for(lambda before=before: last.exists() and last.stat().st_ino != before)
        time.sleep(generator.uniform(0, 0.3 if kill else 1.5))
        command.process.kill()
        assert command.end() == -signal.SIGKILL, command.told
        if not last.exists():  # a run that has written nothing is started anew, in a folder of its own
            shutil.rmtree(folder)
        time.sleep(1)  # event files are read in the order of the second in their names
    command = start(folder, *flags, *(["--ckpt_path=last"] if last.exists() else []))
    assert command.end() == 0, command.told
    return command


def test_a_run_that_is_killed_at_random_moments_ends_as_if_it_had_not_been(tmp_path):
    kills = 4
    seed = random.randrange(2**32)
    print(f"moments by seed {seed}")
    flags = [*FIT, f"--trainer.max_epochs={15 * kills}", "--trainer.log_every_n_steps=25"]
    undisturbed = start(tmp_path / "undisturbed", *flags)
    command = killed_and_resumed(tmp_path / "killed", flags, kills, random.Random(seed))
    assert undisturbed.end() == 0
    assert "Resuming from lightning_logs/version_0/checkpoints/last.ckpt after " in command.told
    assert_same_run(tmp_path / "undisturbed", tmp_path / "killed")
    assert [p.name for p in (tmp_path / "killed/lightning_logs").iterdir()] == ["version_0"]
    assert {p.name for p in checkpoint(tmp_path / "killed").parent.iterdir()} == {
        f"{name}.ckpt" for name in ("best", "last", "previous")
    }


class Killed(BaseException):
    """In place of SIGKILL, at a moment that is known."""


def test_a_kill_between_best_and_last_loses_no_best(tmp_path, monkeypatch):
    flags = [*FIT, "--trainer.max_epochs=4"]
    main([*flags, "--trainer.default_root_dir=undisturbed"])
    step = load(checkpoint(Path("undisturbed"), "best"))["global_step"]
    assert step > 6  # not the first validation, before which there is no last.ckpt
    save, written = AtomicCheckpointIO.save_checkpoint, []

    def save_or_die(self, state, path, storage_options=None):
        if state["global_step"] == step and written:
            raise Killed
        if state["global_step"] == step:
            written.append(Path(path).name)
        save(self, state, path, storage_options)

    with monkeypatch.context() as patch:
        patch.setattr(AtomicCheckpointIO, "save_checkpoint", save_or_die)
        with pytest.raises(Killed):
            main([*flags, "--trainer.default_root_dir=killed"])
    assert written == ["best.ckpt"]
    main([*flags, "--trainer.default_root_dir=killed", "--ckpt_path=last"])
    for name in ("best", "last"):
        one, other = (load(checkpoint(Path(folder), name)) for folder in ("undisturbed", "killed"))
        assert_equal(one["state_dict"], other["state_dict"])
        assert_equal(best_score(one), best_score(other))


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_checkpoint_is_there_whole_or_not_at_all(tmp_path, monkeypatch, moment):
    plugin, path = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    plugin.save_checkpoint({"a": torch.zeros(3)}, path)
    plugin.save_checkpoint({"a": torch.ones(3)}, path)

    def die(*_):
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "replace":
            patch.setattr(Path, "replace", die)
        else:
            patch.setattr(f"lightning_l2l.runs.checkpoints.os.{'fsync' if moment == 'fsync' else 'link'}", die)
        with pytest.raises(Killed):
            plugin.save_checkpoint({"a": torch.full((3,), 2.0)}, path)
    assert load(path)["a"].tolist() == [1, 1, 1]
    assert load(tmp_path / "previous.ckpt")["a"].tolist() == [0, 0, 0]
    plugin.save_checkpoint({"a": torch.full((3,), 3.0)}, path)
    assert load(path)["a"].tolist() == [3, 3, 3] and load(tmp_path / "previous.ckpt")["a"].tolist() == [1, 1, 1]


def test_without_hard_links_the_one_before_is_a_copy(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError("no hard links here")

    monkeypatch.setattr("lightning_l2l.runs.checkpoints.os.link", unsupported)
    for number in (1.0, 2.0):
        AtomicCheckpointIO().save_checkpoint({"a": torch.tensor(number)}, tmp_path / "last.ckpt")
    assert load(tmp_path / "previous.ckpt")["a"] == 1 and load(tmp_path / "last.ckpt")["a"] == 2


def test_sigterm_finishes_the_episode_and_the_run_goes_on_bit_for_bit(tmp_path):
    flags = [*FIT, "--data.episodes_per_epoch=40", "--trainer.max_epochs=4"]
    undisturbed = start(tmp_path / "undisturbed", *flags)
    stopped = start(tmp_path / "stopped", *flags)
    stopped.wait_for(checkpoint(tmp_path / "stopped").exists)
    stopped.signal(signal.SIGTERM)
    stopped.signal(signal.SIGTERM)  # launchers and clusters both send it
    assert stopped.end() == 143, stopped.told
    assert "go on with --ckpt_path lightning_logs/version_0/checkpoints/last.ckpt" in stopped.told
    assert "Traceback" not in stopped.told
    assert 0 < load(checkpoint(tmp_path / "stopped"))["global_step"] < 4 * 40 * 2
    assert start(tmp_path / "stopped", *flags, "--ckpt_path=last").end() == 0
    assert undisturbed.end() == 0
    for name in ("last", "best"):
        one, other = (load(checkpoint(tmp_path / folder, name)) for folder in ("undisturbed", "stopped"))
        assert_equal(one["state_dict"], other["state_dict"])
        assert_equal(best_score(one), best_score(other))
    steps = [step for step, _ in scalars(tmp_path / "stopped", "val/final_loss")]
    assert steps == [80, 160, 240, 320]


@pytest.mark.parametrize("signum, status", [(signal.SIGTERM, 143), (signal.SIGINT, 1)], ids=["SIGTERM", "Ctrl-C"])
def test_a_signal_to_the_workers_as_well_finishes_the_episode(tmp_path, signum, status):
    command = start(tmp_path / "run", *FIT, ENDLESS, "--data.num_workers=1")
    command.wait_for(checkpoint(tmp_path / "run").exists)
    command.signal(signum, group=True)
    assert command.end() == status, command.told
    assert command.told.count("go on with --ckpt_path") == 1
    assert command.told.count("Finishing this episode") == (signum == signal.SIGINT)
    assert "Traceback" not in command.told


def test_a_worker_still_heeds_the_process_that_started_it():
    data = QuadraticDataModule(num_tasks=2, num_workers=1)
    data.setup()
    batches = iter(data.val_dataloader())
    next(batches)
    (worker,) = batches._workers
    with pytest.raises(RuntimeError, match="exited unexpectedly"):  # by torch, for the signal about a child's end
        worker.terminate()
        worker.join(10)
        assert worker.exitcode == 143
        next(batches)


def test_sigterm_while_baselines_are_tuned_ends_the_run_at_once(tmp_path):
    command = start(tmp_path / "run", *FIT[:-1], "--model.num_steps=300000")
    command.wait_for(lambda: "Tuning the learning rates" in command.told)
    command.signal(signal.SIGTERM)
    assert command.end(10) == 143, command.told
    assert "Traceback" not in command.told
    assert not checkpoint(tmp_path / "run").exists()


def test_a_full_disk_while_it_runs_is_told_in_one_line_and_last_stays(tmp_path):
    flags = [*FIT, "--model.rule.hidden_size=60", "--curves.every_n_epochs=100"]
    assert start(tmp_path / "run", *flags, "--trainer.max_epochs=2").end() == 0
    last = checkpoint(tmp_path / "run")
    content = last.read_bytes()
    command = start(tmp_path / "run", *flags, "--trainer.max_epochs=5", "--ckpt_path=last", largest_file=200_000)
    assert len(content) > 200_000
    assert command.end() == 1
    message = command.told.split("error: ")[1]
    assert message.startswith("the checkpoint lightning_logs/version_0/checkpoints/") and "File too large" in message
    assert message.count("\n") == 1 and "free space" in message and "Traceback" not in command.told
    assert last.read_bytes() == content
    assert not list(last.parent.glob(".*"))
    assert start(tmp_path / "run", *flags, "--trainer.max_epochs=3", "--ckpt_path=last").end() == 0


def test_curves_that_cannot_be_written_are_told_in_one_line(tmp_path):
    flags = [*FIT, ENDLESS, "--curves.every_n_epochs=1"]
    command = start(tmp_path / "run", *flags, largest_file=50_000)  # a figure has more
    assert command.end() == 1
    message = command.told.split("error: ")[1]
    assert "File too large" in message and message.count("\n") == 1
    assert "Traceback" not in command.told


def test_a_thread_that_finds_the_disk_full_leaves_it_to_the_main_thread_to_say_so(tmp_path):
    def write():
        raise OSError(errno.ENOSPC, "No space left on device")

    before = threading.excepthook  # pytest's, by which a thread that fails is an error of the test
    with held([tmp_path], 0):
        thread = threading.Thread(target=write)
        thread.start()
        thread.join()
    assert threading.excepthook is before
    with pytest.raises(RuntimeError, match=r"No space left on device.*--ckpt_path last"), held([tmp_path], 0):
        write()


def refused(arguments):
    """The line in which arguments are refused."""
    with pytest.raises((ValueError, RuntimeError)) as found:
        main(arguments)
    message = str(find_foreseen(found.value))
    assert "\n" not in message
    return message


def test_a_folder_that_cannot_be_written_to_is_told_before_training(tmp_path, monkeypatch):
    Path("file").touch()
    for root in ("file", "file/deeper"):
        message = refused([*FIT, f"--trainer.default_root_dir={root}"])
        assert "file/" in message and "cannot be written to (Not a directory)" in message
        assert "choose another --trainer.default_root_dir" in message
        message = refused([*FIT, f"--trainer.default_root_dir={root}", "--trainer.logger=false"])
        assert "cannot be written to" in message

    def read_only(self, *_, **__):
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", read_only)
        assert "cannot be written to (Read-only file system)" in refused(FIT)
    usage = shutil.disk_usage(".")
    monkeypatch.setattr("lightning_l2l.runs.folder.shutil.disk_usage", lambda folder: usage._replace(free=500_000))
    assert "has room for 0.5 MB" in refused(FIT)


def damage(path, kind):
    content = bytearray(path.read_bytes())
    if kind == "flipped":  # within the weights, where torch does not notice
        weights = load(path)["state_dict"]["rule.weight_hh_l0"].numpy().tobytes()
        content[content.index(weights) + len(weights) // 2] ^= 255
    path.write_bytes({"empty": b"", "short": content[: len(content) // 2], "flipped": content}[kind])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of three epochs, to be copied."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    command = start(folder, *FIT, "--trainer.max_epochs=3")
    assert command.end() == 0, command.told
    return folder


@pytest.mark.parametrize("kind", ["empty", "short", "flipped"])
def test_a_damaged_last_checkpoint_is_told_with_the_one_before_which_goes_on(trained, kind):
    shutil.copytree(trained, "damaged")
    damage(checkpoint(Path("damaged")), kind)
    flags = [*FIT, "--trainer.max_epochs=3", "--trainer.default_root_dir=damaged"]
    for path in ("last", str(checkpoint(Path("damaged")))):
        message = refused([*flags, f"--ckpt_path={path}"])
        assert "last.ckpt' is damaged" in message
        assert message.endswith(f"--ckpt_path {checkpoint(Path('damaged'), 'previous')}")
    main([*flags, "--ckpt_path", message.split("--ckpt_path ")[1]])
    assert [p.name for p in Path("damaged/lightning_logs").iterdir()] == ["version_0"]
    ends = load(checkpoint(Path("damaged"))), load(checkpoint(trained))
    assert_equal(*(end["state_dict"] for end in ends))
    assert_equal(*(best_score(end) for end in ends))
    assert load(checkpoint(Path("damaged"), "previous"))["epoch"] == 1  # not the damaged one
    checkpoint(Path("damaged"), "previous").unlink()
    damage(checkpoint(Path("damaged")), kind)
    assert "previous" not in refused([*flags, "--ckpt_path=last"])


def test_a_run_whose_folder_has_been_moved_keeps_its_best(trained):
    shutil.copytree(trained, "moved")
    state = load(checkpoint(Path("moved")))
    for callback in state["callbacks"].values():
        if callback.get("best_k_models"):  # a best that will not be reached again
            callback["best_model_score"] = callback["kth_value"] = torch.tensor(0.0)
            callback["best_k_models"] = dict.fromkeys(callback["best_k_models"], torch.tensor(0.0))
    torch.save(state, checkpoint(Path("moved")))
    best = checkpoint(Path("moved"), "best").read_bytes()
    main([*FIT, "--trainer.max_epochs=4", "--trainer.default_root_dir=moved", "--ckpt_path=last"])
    assert checkpoint(Path("moved"), "best").read_bytes() == best
    end = load(checkpoint(Path("moved")))
    assert end["epoch"] == 3 and best_score(end) == 0


def test_a_version_that_another_run_has_taken_meanwhile_is_not_shared(tmp_path, monkeypatch):
    monkeypatch.setattr(TensorBoardLogger, "_get_next_version", lambda self: 0)  # all have looked at the same moment
    assert [RunLogger(tmp_path, "logs").version for _ in range(3)] == [0, 1, 2]


def test_two_runs_that_start_at_the_same_moment_do_not_share_a_folder(tmp_path):
    commands = [start(tmp_path / "run", *FIT, "--trainer.max_epochs=2", f"--seed_everything={k}") for k in range(2)]
    for command in commands:
        assert command.end() == 0, command.told
    folders = sorted((tmp_path / "run/lightning_logs").iterdir())
    assert [folder.name for folder in folders] == ["version_0", "version_1"]
    weights = []
    for folder in folders:
        assert len(list(folder.glob("events.*"))) == 1
        weights.append(load(folder / "checkpoints/last.ckpt")["state_dict"]["rule.weight_hh_l0"])
    assert not torch.equal(*weights)


def test_a_run_that_is_alive_is_not_joined_and_a_dead_one_is(tmp_path):
    command = start(tmp_path, *FIT, ENDLESS, "--data.num_workers=1")
    command.wait_for(lambda: checkpoint(tmp_path).exists())
    assert "a run is alive in lightning_logs/version_0" in refused([*FIT, "--ckpt_path=last"])
    command.process.kill()
    command.end()
    epochs = load(checkpoint(tmp_path))["epoch"] + 2
    main([*FIT, f"--trainer.max_epochs={epochs}", "--ckpt_path=last"])
    assert load(checkpoint(tmp_path))["epoch"] == epochs - 1


def test_slurm_has_a_job_go_on_in_its_folder(tmp_path):
    program = tmp_path / "bin/scontrol"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked.txt\n")
    program.chmod(0o755)
    names = {"NTASKS": 1, "JOB_ID": 7, "JOB_NAME": "fit", "PROCID": 0, "LOCALID": 0, "NODEID": 0, "NODELIST": "here"}
    job = {f"SLURM_{name}": value for name, value in names.items()}
    job["PATH"] = f"{program.parent}:/usr/bin:/bin"
    flags = [*FIT, "--model.num_steps=60", "--data.episodes_per_epoch=10", "--trainer.max_epochs=6"]
    undisturbed = start(tmp_path / "undisturbed", *flags)
    command = start(tmp_path / "job", *flags, environment=job)
    command.wait_for(checkpoint(tmp_path / "job").exists)
    time.sleep(0.1)  # into an episode
    command.signal(signal.SIGUSR1)
    command.wait_for((tmp_path / "asked.txt").exists)
    command.signal(signal.SIGTERM)
    assert command.end() == 143, command.told
    assert (tmp_path / "asked.txt").read_text() == "requeue 7\n"
    assert load(tmp_path / "job/hpc_ckpt_1.ckpt")["global_step"] % 20 == 0
    again = start(tmp_path / "job", *flags, environment=job)
    assert again.end() == 0, again.told
    assert "Resuming from hpc_ckpt_1.ckpt after " in again.told
    assert undisturbed.end() == 0
    assert [p.name for p in (tmp_path / "job/lightning_logs").iterdir()] == ["version_0"]
    for name in ("last", "best"):
        one, other = (load(checkpoint(tmp_path / folder, name)) for folder in ("undisturbed", "job"))
        assert_equal(one["state_dict"], other["state_dict"])
        assert_equal(best_score(one), best_score(other))
