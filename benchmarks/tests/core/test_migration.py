"""The page on migration has a row for every setting that the comparison of hosts measures."""

from __future__ import annotations

import pytest

from benchmarks.hosts.cases import AGGREGATIONS, HOSTS, NATIVE
from tests.pages import migration


@pytest.mark.parametrize("host", HOSTS)
def test_migration_covers_every_setting_that_is_measured(host: str) -> None:
    names = [name for name, _, _ in NATIVE[host]]
    assert list(migration.COMMANDS[host]) == names
    assert list(migration.settings(host)) == names
    aggregations = [row["aggregation"] for row in migration.measured()["portable_beta"] if row["host"] == host]
    assert aggregations == list(AGGREGATIONS[host])
