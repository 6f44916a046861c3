"""What an unroll, an episode and a run need of memory, measured in processes of their own.

`pytest -m benchmark tests/test_memory.py` prints the table of the README and draws its plot, notebooks/memory.png.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from lightning_l2l.evaluation.figures import COLOURS, tidy
from lightning_l2l.rules import CoordinatewiseLSTM

ROOT = Path(__file__).parents[1]

#: Beside what Python and the libraries take; the peak is that of the process' whole life.
STATUS = """
def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
"""

#: An unroll of the MNIST MLP, as wide as it takes, and its backward pass.
UNROLL = """
import json, sys, time
import torch
from lightning_l2l import CoordinatewiseLSTM, FirstOrder, MLP, NetworkTask
from lightning_l2l.meta.unroll import Unroll
start = status("VmRSS")
hidden, num_steps, budget, rounds = map(int, sys.argv[1:])
g = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (1, num_steps + 1, 128, 28, 28), dtype=torch.uint8, generator=g)
labels = torch.randint(0, 10, (1, num_steps + 1, 128), dtype=torch.uint8, generator=g)
rule = CoordinatewiseLSTM()
unroll, seconds = Unroll(NetworkTask(MLP(hidden_size=hidden)), rule, FirstOrder(memory_budget=budget)), []
while len(seconds) < rounds:  # from the second on, an episode finds the buffers of the one before
    episode = unroll.start({"inputs": images, "targets": labels, "seed": torch.tensor([0])})
    begin = time.perf_counter()
    unroll.run(episode, num_steps).meta_loss.backward()
    seconds.append(time.perf_counter() - begin)
    size = episode.parts[0].theta.numel()
    del episode
assert all(p.grad.isfinite().all() for p in rule.parameters())
peak = status("VmHWM") - start
print(json.dumps({"coordinates": size, "bytes": peak, "seconds": min(seconds), "steps": num_steps}))
"""

linux = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="/proc says how much memory a process has")
pytestmark = linux


def measured(script, *arguments, **environment):
    command = [sys.executable, "-c", STATUS + script, *map(str, arguments)]
    options = {"env": {**os.environ, "PYTHONPATH": str(ROOT), **environment}, "capture_output": True, "text": True}
    process = subprocess.run(command, check=False, **options)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def hidden_units(coordinates):
    return round((coordinates - 10) / 795)


@pytest.mark.parametrize(
    "fused, coordinates", [("1", 1e6), pytest.param("0", 2e5, marks=pytest.mark.slow)], ids=["compiled", "plain"]
)
def test_twenty_steps_of_a_million_coordinates_stay_within_2_GB(fused, coordinates):
    """Where torch's operators do the work, which takes longer, fewer coordinates in proportion."""
    found = measured(UNROLL, hidden_units(coordinates), 20, 2**30, 1, LIGHTNING_L2L_FUSED=fused)
    assert found["coordinates"] > 0.99 * coordinates
    # Kept, the activations alone would take more than 20 GB. The state is there twice, before the unroll and after.
    assert 2 * 4 * 80 < found["bytes"] / found["coordinates"] < 2e3


@pytest.mark.slow
def test_auto_memory_keeps_the_activations_up_to_its_budget_and_not_beyond():
    kept = 39_760 * CoordinatewiseLSTM().shape.floats_kept(20) * 4
    fast, flat = (measured(UNROLL, 50, 20, budget, 1, LIGHTNING_L2L_FUSED="0") for budget in (kept, kept - 1))
    assert fast["coordinates"] == 39_760
    assert kept < fast["bytes"] < 1.5 * kept
    assert flat["bytes"] < 0.4 * kept


#: `predict`: episodes of a rule alone.
EPISODE = """
import json, sys
from lightning_l2l import main
root, num_steps = sys.argv[1:]
del sys.argv[1:]
flags = ["--data=lightning_l2l.MNISTDataModule", f"--data.root={root}", "--data.num_test_tasks=2"]
flags += ["--data.batch_size=16", "--data.num_unseen=0"]
flags += ["--model.task=lightning_l2l.NetworkTask", "--model.task.module=lightning_l2l.MLP"]
flags += ["--model.task.module.hidden_size=5", "--model.rule.hidden_size=5"]
main(["predict", *flags, f"--model.num_steps={num_steps}", "--trainer.logger=false", "--trainer.accelerator=cpu"])
print(json.dumps(status("VmHWM")))
"""


@pytest.mark.slow
def test_an_episode_of_ten_thousand_steps_takes_the_memory_of_a_short_one(mnist_root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    short, long = (measured(EPISODE, mnist_root, steps, OMP_NUM_THREADS="1") for steps in (100, 10_000))
    print(f"peak: {short / 1e6:.0f} MB for 100 steps, {long / 1e6:.0f} MB for 10,000")
    assert long < 1.05 * short


#: `fit`, all that it does by default but tuning; memory after each epoch.
FIT = """
import gc, json, sys
from lightning.pytorch import Callback
from lightning_l2l import main
after = []
class Watch(Callback):
    def on_train_epoch_start(self, trainer, module):
        gc.collect()
        after.append(status("VmRSS"))
sizes = ["--data.num_tasks=8", "--data.num_val_tasks=8", "--model.num_steps=20", "--model.rule.hidden_size=8"]
run = ["--data.episodes_per_epoch=100", "--trainer.max_epochs=21", "--trainer.accelerator=cpu"]
main(["fit", *sizes, *run, "--trainer.callbacks=__main__.Watch", "--trainer.enable_progress_bar=false"])
print(json.dumps(after))
"""


@pytest.mark.slow
def test_two_thousand_episodes_leak_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    after = measured(FIT, OMP_NUM_THREADS="1")
    first, last = after[1], after[20]  # after 100 episodes and after 2,000
    print(f"after 100 episodes {first / 1e6:.0f} MB, after 2,000 {last / 1e6:.0f} MB")
    assert last < 1.05 * first


@pytest.mark.benchmark
def test_memory_and_time_of_an_unroll(benchmark, capsys):
    def table():
        return [
            measured(UNROLL, hidden_units(size), steps, 2**30, 2 if size * steps > 1e7 else 3, OMP_NUM_THREADS="2")
            for size in (1e4, 1e5, 1e6)
            for steps in (20, 100, 500)
        ]

    like_mnist = measured(UNROLL, 20, 20, 2**30, 3, OMP_NUM_THREADS="2")
    rows = benchmark.pedantic(table, rounds=1)
    lines = ["", "coordinates, steps: peak GB above the start (bytes a coordinate); ns a coordinate and step"]
    for row in (like_mnist, *rows):
        size, steps = row["coordinates"], row["steps"]
        row["ns"] = row["seconds"] / size / steps * 1e9
        a_coordinate = row["bytes"] / size
        lines.append(f"{size:,}, {steps}: {row['bytes'] / 1e9:.3f} ({a_coordinate:,.0f}); {row['ns']:.0f}")
    largest = next(row for row in rows if row["steps"] == 20 and row["coordinates"] > 9e5)
    lines.append(f"time a coordinate, of a million / of the MNIST MLP: {largest['ns'] / like_mnist['ns']:.2f}")
    with capsys.disabled():
        print("\n".join(lines))
    draw(rows, ROOT / "notebooks" / "memory.png")


def draw(rows, path):
    figure = Figure(figsize=(7.2, 3.2), dpi=110, layout="constrained")
    memory, time = figure.subplots(1, 2)
    kept = CoordinatewiseLSTM().shape
    for k, steps in enumerate(sorted({row["steps"] for row in rows})):
        of_these = [row for row in rows if row["steps"] == steps]
        sizes = [row["coordinates"] for row in of_these]
        look = {"color": COLOURS[k], "marker": "o", "markersize": 4}
        memory.plot(sizes, [row["bytes"] / 1e9 for row in of_these], label=f"{steps} steps", **look)
        memory.plot(sizes, [n * kept.floats_kept(steps) * 4e-9 for n in sizes], color=COLOURS[k], linestyle=":")
        time.plot(sizes, [row["ns"] for row in of_these], label=f"{steps} steps", **look)
    memory.plot([], [], color="0.4", linestyle=":", label="if activations were kept")
    memory.set(xscale="log", yscale="log", xlabel="coordinates", ylabel="GB", ylim=(3e-4, None))
    memory.set_title("peak memory above the start")
    time.set(xscale="log", xlabel="coordinates", ylabel="ns", title="time a coordinate and step", ylim=(0, None))
    for axes in (memory, time):
        tidy(axes)
        axes.legend(frameon=False, fontsize=8, loc="lower right")
    figure.savefig(path)
