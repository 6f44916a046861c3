"""The notebooks as they are committed: executed from top to bottom, with results, and with no trace of a machine."""

import ast
import json
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
NAMES = [
    *("01_quadratics.ipynb", "02_mnist.ipynb", "03_your_own_model.ipynb", "04_where_it_breaks.ipynb"),
    "05_which_way_is_down.ipynb",
]
ALLOWED = {"lightning_l2l", "torch", "lightning", "matplotlib", "IPython", "numpy"} | sys.stdlib_module_names
ABSOLUTE = re.compile(r"(?<![\w.:/<])/[\w.-]+/[\w.-]+|\b[A-Z]:\\")
LARGEST = 1_500_000  # bytes: what a repository, and its viewer on the web, take well


def read(name):
    return json.loads((FOLDER / name).read_text(encoding="utf-8"))


def text(source):
    return source if isinstance(source, str) else "".join(source)


def code_cells(name):
    return [cell for cell in read(name)["cells"] if cell["cell_type"] == "code"]


def outputs(name):
    return [output for cell in code_cells(name) for output in cell["outputs"]]


def shown_text(output):
    """What an output says in words; pictures are left out, whose letters may spell anything."""
    data = {kind: value for kind, value in output.get("data", {}).items() if not kind.startswith("image/png")}
    return "\n".join([text(output.get("text", "")), *map(text, data.values())])


def imported(source):
    """Names of the packages that a code cell imports."""
    lines = [line for line in source.splitlines() if not line.lstrip().startswith(("%", "!"))]
    for node in ast.walk(ast.parse("\n".join(lines))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a notebook is in no package"
            yield node.module.split(".")[0]


def test_every_notebook_is_tested():
    assert sorted(path.name for path in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_format(name):
    notebook = read(name)
    assert notebook["nbformat"] == 4 and notebook["nbformat_minor"] >= 5  # 5: cells have an id
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell_id) for cell_id in ids)
    for cell in notebook["cells"]:
        fields = {"id", "cell_type", "metadata", "source"}
        if cell["cell_type"] == "code":
            fields |= {"outputs", "execution_count"}
        assert cell["cell_type"] in ("code", "markdown") and set(cell) == fields
        assert text(cell["source"]).strip()
    assert text(notebook["cells"][0]["source"]).startswith("# ")
    assert (FOLDER / name).stat().st_size < LARGEST


@pytest.mark.parametrize("name", NAMES)
def test_executed_from_top_to_bottom_without_errors(name):
    cells = code_cells(name)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    kinds = [output["output_type"] for output in outputs(name)]
    assert set(kinds) <= {"stream", "display_data", "execute_result"}
    assert not [output for output in outputs(name) if output.get("name") == "stderr"]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_have_pictures_and_no_path_of_a_machine(name):
    pictures = [output["data"]["image/png"] for output in outputs(name) if "image/png" in output.get("data", {})]
    assert pictures and all(text(picture).startswith("iVBORw0KGgo") for picture in pictures)  # PNG's first bytes
    found = [match[0] for output in outputs(name) if (match := ABSOLUTE.search(shown_text(output)))]
    assert not found


@pytest.mark.parametrize("name", NAMES)
def test_needs_nothing_but_the_package_and_what_comes_with_it(name):
    packages = {package for cell in code_cells(name) for package in imported(text(cell["source"]))}
    assert "lightning_l2l" in packages and packages <= ALLOWED
    assert not [cell for cell in read(name)["cells"] if ABSOLUTE.search(text(cell["source"]))]


@pytest.mark.parametrize("name", ["02_mnist.ipynb", "04_where_it_breaks.ipynb"])
def test_notebooks_on_mnist_show_real_mnist(name):
    assert not [output for output in outputs(name) if "not MNIST images" in shown_text(output)]


@pytest.mark.parametrize("path", ["/home/ann/run", "in /tmp/x", "(/opt/x/y.py)", "C:\\Users\\ann"])
def test_paths_are_recognised(path):
    assert ABSOLUTE.search(path)


@pytest.mark.parametrize(
    "harmless", ["MNIST/raw", "../data", "https://arxiv.org/abs/1606.04474", "</span>", "a/home", "../tmp"]
)
def test_what_is_no_path_is_not_taken_for_one(harmless):
    assert not ABSOLUTE.search(harmless)
