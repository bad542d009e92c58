"""The contract of all hosts, row by row, on veRL."""

import pytest

from tests.contract.table import rows
from tests.support.verl.contract_driver import VerlDriver

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def driver(single, pair, stock, model, assets, tmp_path_factory):
    return VerlDriver(single, pair, stock, model, assets, tmp_path_factory.mktemp("contract"))


@pytest.mark.parametrize("row", rows())
def test_contract(row, driver):
    row.check(driver)
