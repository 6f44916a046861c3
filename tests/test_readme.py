"""The READMEs: links, commands and numbers in them are those of the code beside them."""

import ast
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI

from commandline import ROOT
from lightning_l2l import CoordinatewiseLSTM, LearnedOptimizer, RuleGroups, load_rule, main
from lightning_l2l.commands import export, map, sweep
from lightning_l2l.commands.errors import COMMANDS
from lightning_l2l.rules.files import card, save_rule, shipped_rules

README, RECIPES, SHIPPED, NOTEBOOKS = (
    "README.md",
    "configs/README.md",
    "lightning_l2l/shipped/README.md",
    "notebooks/README.md",
)
PAGES = [README, RECIPES, SHIPPED, NOTEBOOKS]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s]+)\)|<img [^>]*src=\"([^\"]+)\"")
LIGHTNINGS = {"fit", "validate", "test", "predict"}  # commands that know --print_config


@cache
def text(page):
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page):
    return FENCE.sub("", text(page))


def blocks(page, language):
    return [body for kind, body in FENCE.findall(text(page)) if kind == language]


def spans(page):
    """What stands between backticks, also where a line ends within."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", prose(page))]


def table(page, *heads):
    """Rows, by the heads of their columns, of the one table that has these."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", text(page), re.MULTILINE):
        first, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines())
        if set(heads) <= set(first):
            found.append([dict(zip(first, row, strict=True)) for row in rows])
    (rows,) = found
    return rows


# ---- how they are written ----


def test_the_landing_page_is_short():
    assert len(text(README).splitlines()) <= 220


@pytest.mark.parametrize("page", PAGES)
def test_lines_are_of_a_width_that_editors_show(page):
    wide = [line for line in text(page).splitlines() if len(line) > 120 and not line.startswith("|")]
    assert not wide and text(page).endswith("\n") and text(page).isascii()


@pytest.mark.parametrize("page", PAGES)
def test_tables_have_as_many_cells_in_every_row(page):
    for block in re.findall(r"(?:^\|.*\n)+", text(page), re.MULTILINE):
        assert len({line.count("|") for line in block.splitlines()}) == 1, block


# ---- links ----


def anchors(page):
    """Names that code hosts give to headings."""
    heads = re.findall(r"^#+ (.*)$", FENCE.sub("", Path(page).read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    targets = [first or second for first, second in LINK.findall(prose(page))]
    assert targets
    for target in targets:
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert found.exists() and found.is_relative_to(ROOT) and "://" not in target, target
        assert not anchor or anchor in anchors(found), target


def test_every_page_notebook_and_picture_is_linked_to():
    linked = {
        ((ROOT / page).parent / (one or other).partition("#")[0]).resolve()
        for page in PAGES
        for one, other in LINK.findall(prose(page))
    }
    wanted = [*PAGES[1:], *(path for pattern in ("*.ipynb", "*.png") for path in (ROOT / "notebooks").glob(pattern))]
    assert not {(ROOT / path).resolve() for path in wanted} - linked


# ---- commands ----


def lines(block):
    """The commands of a block, as a shell splits it: each a list of words."""
    open_line = ""
    for line in block.splitlines():
        open_line += line + "\n"
        try:
            words = shlex.split(open_line.replace("\\\n", " "), comments=True)
        except ValueError:  # a quotation goes on
            continue
        if not line.endswith("\\"):
            if words:
                yield words
            open_line = ""
    assert not open_line, open_line


PLACES = {"P": "quadratic", "C": "configs/quadratic.yaml", "FIELD=A,B": "model.lr=0.1,0.2"}


def commands(page):
    """What follows `python -m lightning_l2l`, in blocks and, with placeholders, between backticks."""
    found = [words for block in blocks(page, "bash") for words in lines(block)]
    for span in spans(page):
        full = span.replace("... ", "python -m lightning_l2l ", 1) if span.startswith("... ") else span
        if (span.split()[0] in COMMANDS and len(span.split()) > 2) or span == "fit --help":  # `fit --help` and the like
            full = f"python -m lightning_l2l {span}"
        if full.startswith("python -m lightning_l2l "):
            found.append([PLACES.get(word, word) for word in shlex.split(full) if word != "..."])
    own = [words[words.index("lightning_l2l") + 1 :] for words in found if "lightning_l2l" in words]
    return sorted({tuple(words) for words in own})


COMMANDS_OF = [
    pytest.param(words, id=" ".join(words)[:70]) for words in sorted({w for p in PAGES for w in commands(p)})
]

MINE = """
import torch
from torch.utils.data import TensorDataset

class Net(torch.nn.Linear):
    def __init__(self):
        super().__init__(4, 3)

class Points(TensorDataset):
    def __init__(self):
        inputs = torch.randn(900, 4, generator=torch.Generator().manual_seed(0))
        super().__init__(inputs, inputs[:, :3].argmax(1))
"""


class ParsedError(Exception):
    """A command was understood, and is not to go on."""


@pytest.fixture
def in_tmp_path(in_tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(in_tmp_path)  # as `python -m` has it
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    (in_tmp_path / "configs").symlink_to(ROOT / "configs")
    Path("mine.py").write_text(MINE)
    (config,) = blocks(README, "yaml")
    Path("mine.yaml").write_text(config)
    save_rule(CoordinatewiseLSTM(hidden_size=3), Path("my_rule.npz"))
    yield in_tmp_path
    sys.modules.pop("mine", None)


def parse(*words):
    with pytest.raises(SystemExit) as stop:
        main([*words, *([] if "--help" in words else ["--print_config"])])
    assert stop.value.code == 0, words


def stop(*_):
    raise ParsedError


@pytest.mark.parametrize("words", COMMANDS_OF)
@pytest.mark.usefixtures("in_tmp_path")
def test_commands_are_understood(words, monkeypatch, capsys):
    command, *rest = words
    if command in LIGHTNINGS:
        parse(*words)
    elif command == "sweep":
        options, swept = sweep._parse(rest)
        settings = [f"--{field}={values[0]}" for field, values in options.over]
        parse(*swept, *settings, *(f"--{field}={bounds[0]}" for field, bounds in options.random))
    elif command == "map":
        monkeypatch.setattr(map, "new_folder", stop)
        with pytest.raises(ParsedError):
            main(list(words))
    elif command == "export":
        monkeypatch.setattr(export, "newest_last", lambda *_: "rnnprop")
        monkeypatch.setattr(export, "load_rule", lambda name: load_rule(name.replace("a.ckpt", "rnnprop")))
        main([*words, *([] if "--output" in words else ["--output", "found.npz"])])
        assert len(list(Path().glob("*.npz"))) == 2 and "Use it" in capsys.readouterr().out
    else:
        pytest.fail(f"no such command: {command}")


def test_all_commands_are_named():
    assert {words[0] for words in commands(README)} == set(COMMANDS)


@pytest.mark.parametrize("page", PAGES)
def test_commands_of_pytest_name_files_and_tests_that_there_are(page):
    told = [line for block in blocks(page, "bash") for line in block.splitlines()] + spans(page)
    for command in (one for one in told if re.search(r"\bpytest\b", one)):
        for path in re.findall(r"\btests/\S+", command):
            assert (ROOT / path).is_file(), command
            if name := re.search(r"-k (\w+)", command):
                assert re.search(rf"^def test_\w*{name[1]}", (ROOT / path).read_text(), re.MULTILINE), command
        if mark := re.search(r"-m (\w+)", command):
            assert mark[1] in ("slow", "benchmark", "cuda"), command


def test_lightning_cli_takes_the_command_of_the_readme(in_tmp_path, monkeypatch, capsys):
    (command,) = [shlex.split(span) for span in spans(README) if span.startswith("python main.py ")]
    script = next(block for block in blocks(README, "python") if "# train.py\n" in block)
    found = {}
    exec(script[: script.index("pl.seed_everything")], found)
    with pytest.raises(SystemExit) as stop:
        LightningCLI(found["Classifier"], args=[*command[2:], "--print_config"])
    assert stop.value.code == 0
    chosen = yaml.safe_load(capsys.readouterr().out)["optimizer"]
    assert chosen["class_path"] == "lightning_l2l.LearnedOptimizer" and chosen["init_args"]["rule"] == "mnist"


# ---- Python and YAML ----


@pytest.mark.parametrize("page", PAGES)
def test_python_compiles(page):
    for block in blocks(page, "python"):
        ast.parse(block)


QUICK = "fast_dev_run=True, accelerator='cpu', enable_progress_bar=False, enable_model_summary=False"
SHORT = [(page, block) for page in PAGES for block in blocks(page, "python") if "# train.py\n" not in block]


@pytest.mark.parametrize(("page", "block"), [pytest.param(*one, id=f"{one[0]}-{k}") for k, one in enumerate(SHORT)])
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_short_python_runs(page, block, in_tmp_path):
    mine = {}
    exec(MINE, mine)
    model, dataset = mine["Net"](), mine["Points"]()
    loader = [dataset[k : k + 30] for k in range(0, 900, 30)]
    loss = torch.nn.functional.cross_entropy
    known = {"model": model, "loader": loader, "loss": loss, "my_module": model, "my_dataset": dataset}
    before = loss(model(loader[0][0]), loader[0][1]).item()
    exec(block.replace("max_epochs=10", QUICK), known)
    if "optimizer" in known:
        assert isinstance(known["optimizer"], LearnedOptimizer)
        assert loss(model(loader[0][0]), loader[0][1]).item() < before


@pytest.mark.usefixtures("in_tmp_path")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_the_yaml_meta_trains_on_data_of_ones_own():
    flags = ["--trainer.fast_dev_run=true", "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false"]
    main(["fit", "--config", "mine.yaml", *flags, "--model.num_steps=10", "--curves.baselines=[]"])
    (python,) = [block for block in blocks(README, "python") if "DatasetDataModule" in block]
    assert len([line for line in python.splitlines() if line]) <= 6


# ---- numbers and names ----


def plain(cell):
    return re.sub(r"[`*]|\]\(.*?\)|\[", "", cell)


def members(rule):
    return list(rule.members) if isinstance(rule, RuleGroups) else [rule]


@pytest.mark.parametrize("page", [README, SHIPPED])
def test_the_table_of_shipped_rules_is_right(page):
    head = "state, bytes a parameter"
    rows = {}
    for row in table(page, head, "file, kB"):
        for name in plain(next(iter(row.values()))).split(", "):
            rows[name] = row
    assert set(rows) == set(shipped_rules())
    for name, row in rows.items():
        for rule in members(load_rule(name)):
            assert int(row[head]) == 4 * rule.state_size, name
            operations = 2 * sum(weight.numel() for weight in rule.parameters() if weight.dim() > 1)
            assert int(row["kFLOP a parameter and step"]) == round(operations / 1000), name
        size = (ROOT / "lightning_l2l" / "shipped" / f"{name}.npz").stat().st_size
        assert int(row["file, kB"]) == round(size / 1000), name


def test_the_table_of_recipes_names_every_one():
    rows = table(RECIPES, "recipe", "how long")
    assert sorted(plain(row["recipe"]) for row in rows) == sorted(path.name for path in ROOT.glob("configs/*.yaml"))


def test_the_results_are_those_of_the_cards():
    seen = set()
    for row in table(README, "test tasks", "best tuned"):
        rule = plain(row["rule"])
        if rule == "cifar10":  # its card has a row on generated digits alone
            continue
        learned, ratio = float(plain(row["learned (s.e.)"]).split()[0]), float(row["learned / best"])
        best, optimizer = row["best tuned"].split(", ")
        near = [
            k
            for k, one in enumerate(card(rule)["table"])
            if abs(one["learned"] - learned) < 6e-4 * max(1, learned)
            and abs(one["ratio"] - ratio) < 6e-4
            and abs(one["best_loss"] - float(best)) < 6e-4
            and one["best"] == optimizer.lower()
        ]
        assert len(near) == 1, row
        seen.add((rule, *near))
    assert len(seen) == 10
