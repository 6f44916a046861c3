import pytest
from markdown import markdown
from rich.table import Table

from lightning_l2l.evaluation.tables import to_markdown

EXTENSIONS = ["tables", "fenced_code"]  # those of TensorBoard


@pytest.mark.parametrize(
    "text", ["a|b", "*a*", "_a_ __b__", "`a`", "a\\b", "a\\|b", "[a](b)", "<b>a</b>", "&lt;", "# a", "-"]
)
def test_tensorboard_shows_the_text_of_a_table_as_it_is(text):
    table = Table(title=text, caption=text)
    table.add_column("optimizer")
    table.add_column(text, justify="right")
    table.add_row(text, "1")
    table.add_row("adam", text)
    shown = markdown(to_markdown(table), extensions=EXTENSIONS)
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    assert f"<strong>{escaped}</strong>" in shown and f"<p>{escaped}</p>" in shown
    for tag, count in (("td", 2), ("th", 1)):
        assert shown.count(f">{escaped}</{tag}>") == count
    assert shown.count("<tr>") == 3


def test_a_table_without_caption():
    table = Table(title="A title")
    table.add_column("optimizer")
    table.add_column("loss", justify="right")
    table.add_row("adam", "1")
    assert to_markdown(table) == "**A title**\n\n| optimizer | loss |\n| --- | ---: |\n| adam | 1 |"
