"""The tables in docs/lightning.md are those of the cases."""

from page import PAGE, parts, tables


def test_the_page_has_the_present_tables() -> None:
    assert parts(PAGE.read_text())[1] == tables(), "write them by: python tests/trainer/page.py"
