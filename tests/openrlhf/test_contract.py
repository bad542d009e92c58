"""The contract of all hosts, kept by OpenRLHF: ``tests/contract/table.py`` says what happens in each situation."""

import pytest

from tests.contract.table import rows
from tests.support.openrlhf.contract_driver import driver

__all__ = ["driver"]

pytestmark = pytest.mark.timeout(1200)


@pytest.mark.parametrize("row", rows())
def test_contract(row, driver):
    row.check(driver)
