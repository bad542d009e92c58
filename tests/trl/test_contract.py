"""The contract of all hosts, on TRL."""

from collections.abc import Iterator

import pytest
import trl
from packaging.version import Version

from kl_plugins.adapters.trl.config import ROLLOUT_WITHOUT_VLLM
from tests.contract.table import Row, rows
from tests.support.trl.contract_driver import TRLDriver

pytestmark = pytest.mark.skipif(
    Version(trl.__version__) < ROLLOUT_WITHOUT_VLLM, reason="this TRL calls rollout_func only with vLLM"
)


@pytest.fixture(scope="module")
def driver(model: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TRLDriver]:
    driver = TRLDriver(model, tmp_path_factory.mktemp("contract"))
    yield driver
    driver.close()


@pytest.mark.parametrize("row", rows())
def test_contract(row: Row, driver: TRLDriver) -> None:
    row.check(driver)
