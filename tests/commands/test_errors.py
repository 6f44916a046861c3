"""Errors in one line where they were foreseen, with their traceback where they were not."""

import itertools
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from commandline import TINY
from hostile import SCALARS
from lightning_l2l import CoordinatewiseLSTM, QuadraticDataModule, main
from lightning_l2l.commands.errors import PROG, find_foreseen, in_one_line, tidy

pytestmark = pytest.mark.usefixtures("in_tmp_path")


def raised_by(function):
    try:
        function()
    except Exception as error:
        return error


def test_errors_of_the_program_keep_their_traceback():
    """What torch raises when the project calls it is no mistake of a user, though C code has no frame of its own."""
    for wrong in (
        lambda: CoordinatewiseLSTM(2)(torch.ones(3), torch.ones(5, 3)),
        lambda: QuadraticDataModule().sample("train", "no generator"),
        lambda: 1 / 0,
        lambda: main(3),
    ):
        error = raised_by(wrong)
        assert error is not None and find_foreseen(error) is None and in_one_line(error) is None


def test_a_full_memory_is_told():
    for error in (
        raised_by(lambda: torch.empty(2**50)),
        raised_by(lambda: bytearray(2**62)),
        torch.OutOfMemoryError("x"),
    ):
        assert in_one_line(error).startswith("there is not enough memory for this; use a smaller --data.num_tasks")


def test_a_message_of_the_parser_becomes_one_line():
    wall = """Parser key "data":
  Does not validate against any of the Union subtypes
  Subtypes: [<class 'a.B'>, <class 'NoneType'>]
  Errors:
    - Expected a <class 'a.b.C'>
    - Expected a <class 'NoneType'>
  Given value type: <class 'str'>
  Given value: x"""
    assert tidy(wall) == f"--data: expected C, got x; see {PROG} --help"


# ---- any value, through the parser ----

FIELDS = [
    "model.num_steps",
    "model.unroll_length",
    "model.final_steps",
    "model.lr",
    "model.loss_weights",
    "model.gradient_clip",
    "model.memory",
    "model.rule",
    "model.rule.hidden_size",
    "model.rule.p",
    "model.rule.preprocessing",
    "model.task",
    "model.task.dim",
    "data",
    "data.num_tasks",
    "data.dim",
    "data.seed",
    "data.num_workers",
    "curves.baselines",
    "curves.quantiles",
    "checkpoint.monitor",
    "trainer.max_epochs",
    "trainer.limit_val_batches",
    "trainer.accelerator",
    "seed_everything",
    "ckpt_path",
]
NUMBERS = itertools.count()
FEW = settings.default.max_examples // 3  # each makes a parser, a model and a Trainer


def run_or_tell(arguments, capsys):
    """The command in question, made as far as the Trainer: it is built, or refused in one line."""
    try:
        with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
            warnings.simplefilter("ignore")
            patch.setattr("lightning.pytorch.cli.LightningCLI._run_subcommand", lambda self, command: None)
            main(arguments)
    except SystemExit as stop:
        error = capsys.readouterr().err
        assert stop.code == 2 and error.startswith("error: ") and error.count("\n") == 1 and len(error) < 2500, error
    except Exception as error:
        line = in_one_line(error)
        assert line is not None and "\n" not in line, error
    capsys.readouterr()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=FEW)
@given(field=st.sampled_from(FIELDS), value=SCALARS, in_file=st.booleans())
@example(field="data.num_workers", value=10**30, in_file=True)
@example(field="seed_everything", value=10**400, in_file=False)
@example(field="ckpt_path", value="x" * 5000, in_file=False)
@example(field="data.dim", value=10**9, in_file=True)
def test_any_value_of_any_field_is_taken_or_told(capsys, field, value, in_file):
    if in_file:
        content = value
        for key in reversed(field.split(".")):
            content = {key: content}
        path = Path(f"{next(NUMBERS)}.yaml")
        path.write_text(yaml.safe_dump(content))
        run_or_tell(["fit", *TINY, f"--config={path}"], capsys)
    else:
        run_or_tell(["fit", *TINY, f"--{field}={value}"], capsys)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=FEW)
@given(st.binary(max_size=60) | st.text(max_size=40).map(str.encode))
@example(b"model: &a [*a, *a]")
@example(b"a: !!python/object/apply:pathlib.Path.touch [canary]")
@example(b"\xff\xfe")
@example(b"model: {rule: *unknown}")
@example(b"[" * 3000)
def test_any_configuration_file_is_taken_or_told(capsys, content):
    Path("any.yaml").write_bytes(content)
    run_or_tell(["fit", *TINY, "--config=any.yaml"], capsys)
    assert not Path("canary").exists()
