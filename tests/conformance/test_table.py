"""The table of layers in docs/networks.md is what the tests are about."""

import pytest
import torch
from table import PAGE, parts, table


@pytest.mark.skipif(not torch.__version__.startswith("2.14."), reason="the page tells what vmap of torch 2.14 takes")
@pytest.mark.usefixtures("double")
def test_the_page_has_the_present_table() -> None:
    assert parts(PAGE.read_text())[1] == table(), "write it by: python tests/conformance/table.py"
