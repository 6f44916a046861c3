import shlex
import sys

import pytest
import torch
from markdown import markdown
from rich.table import Table
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from lightning_l2l.evaluation.results import Result
from lightning_l2l.evaluation.tensorboard import command_line, write_curve, write_table

EXTENSIONS = ["tables", "fenced_code"]  # those of TensorBoard


def tensors(folder, tag):
    return EventAccumulator(str(folder)).Reload().Tensors(tag)


def card(folder):
    (event,) = tensors(folder, "results/val/text_summary")
    return event.tensor_proto.string_val[0].decode()


def table():
    found = Table(title="A title")
    found.add_column("optimizer")
    found.add_row("adam")
    return found


@pytest.mark.parametrize(
    "argv, want",
    [
        (["/a/lightning_l2l/__main__.py", "fit", "--x=a b"], "python -m lightning_l2l fit '--x=a b'"),
        (["/bin/lightning-l2l", "test"], "lightning-l2l test"),
        (["lightning-l2l.exe", "test"], "lightning-l2l test"),
        (["lightning-l2l"], None),
        (["/a/other/__main__.py", "fit"], None),
        (["train.py", "fit"], None),
        (["-c", "fit"], None),
        ([""], None),
    ],
)
def test_the_command_is_what_was_typed(monkeypatch, argv, want):
    monkeypatch.setattr(sys, "argv", argv)
    assert command_line() == want


def test_a_long_command_has_a_line_an_option(monkeypatch):
    arguments = ["fit", "--config", "a b.yaml", f"--name={'x' * 100}", "--y", "-1"]
    monkeypatch.setattr(sys, "argv", ["lightning-l2l", *arguments])
    lines = command_line().splitlines()
    assert [line.split()[0] for line in lines] == ["lightning-l2l", "--config", f"--name={'x' * 100}", "--y"]
    assert shlex.split(command_line().replace("\\\n", "")) == ["lightning-l2l", *arguments]


def test_curve_and_card_replace_the_last_ones(tmp_path):
    with SummaryWriter(tmp_path, purge_step=0) as writer:
        for loss in (1.0, 2.0):
            write_curve(writer, Result("adam", torch.full((3, 2), loss)), "val")
            write_table(writer, "val", table(), {"Number:": str(loss)})
    curve = tensors(tmp_path, "curves/val_loss_by_inner_step")
    assert [(event.step, event.tensor_proto.float_val[0]) for event in curve] == [(0, 2), (1, 2), (2, 2)]
    assert card(tmp_path) == "**A title**\n\n| optimizer |\n| --- |\n| adam |\n\nNumber:\n\n    2.0"


@pytest.mark.parametrize("command", ["a ` *b* <c> ``` ~~~", "a 'b\n\n# c'", "python \\\n  --a", "\udce9"])
def test_commands_are_shown_as_they_are(tmp_path, command):
    with SummaryWriter(tmp_path) as writer:
        write_table(writer, "val", table(), {"None:": None, "Type:": command})
    shown = markdown(card(tmp_path), extensions=EXTENSIONS)
    escaped = command.replace("<", "&lt;").replace(">", "&gt;").replace("\udce9", "?")
    assert f"<pre><code>{escaped}\n</code></pre>" in shown and "None" not in shown
