"""A process without a receipt, or with another one, stops the run."""

from __future__ import annotations

import json
import os
import pickle
import socket
from dataclasses import replace

import pytest

from kl_plugins.receipts import MissingReceiptError, Receipt, check_receipts


def receipt(rank: int, world_size: int = 3) -> Receipt:
    return Receipt(
        rank=rank,
        world_size=world_size,
        host="a-host",
        host_version="1.2.3",
        patches=("a_host.trainer.Trainer.loss", "a_host.trainer.Trainer.score"),
        fingerprint="0123456789abcdef0123",
        spec="k2@loss/is:token",
        target="reverse_kl_token_behaviour",
        behaviour="sampler",
    )


ALL = [receipt(rank) for rank in range(3)]


def test_complete() -> None:
    check_receipts(ALL, 3)
    check_receipts(ALL[::-1], 3)
    check_receipts([receipt(0, 1)], 1)
    elsewhere = [replace(r, node=f"node-{r.rank}", pid=r.rank) for r in ALL]
    check_receipts(elsewhere, 3)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_rank_is_named(missing: int) -> None:
    present = [r for r in ALL if r.rank != missing]
    with pytest.raises(MissingReceiptError, match=f"no receipt from rank {missing} of 3") as caught:
        check_receipts(present, 3)
    for r in present:
        assert f"rank {r.rank} (pid {r.pid} on {r.node})" in str(caught.value)


def test_no_receipts_at_all() -> None:
    with pytest.raises(MissingReceiptError, match="rank 0, 1 of 2; present: none"):
        check_receipts([], 2)


def test_two_processes_of_one_rank() -> None:
    with pytest.raises(MissingReceiptError, match="4 receipts for 3 ranks"):
        check_receipts([*ALL, replace(ALL[1], pid=1)], 3)
    with pytest.raises(MissingReceiptError, match="no receipt from rank 2"):
        check_receipts([ALL[0], ALL[1], ALL[1]], 3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("host", "another-host"),
        ("host_version", "1.2.4"),
        ("patches", ("a_host.trainer.Trainer.loss",)),
        ("fingerprint", "ffff"),
        ("spec", "k3@loss"),
        ("behaviour", "old"),
        ("reward_site", "after normalisation"),
    ],
)
def test_ranks_must_agree(name: str, value: object) -> None:
    with pytest.raises(MissingReceiptError, match=f"ranks disagree on {name}") as caught:
        check_receipts([ALL[0], replace(ALL[1], node="odd", **{name: value}), ALL[2]], 3)  # type: ignore[arg-type]
    assert "rank 1 on odd" in str(caught.value)


def test_the_line_says_everything() -> None:
    line = replace(ALL[1], reward_site="before group normalisation").line()
    for word in (
        *("kl-plugins", "k2@loss/is:token", "a-host 1.2.3", "rank 1 of 3", f"pid {os.getpid()}", socket.gethostname()),
        *("reverse_kl_token_behaviour", "sampler", "a_host.trainer.Trainer.score", "[0123456789ab]"),
        "reward site: before group normalisation",
    ):
        assert word in line
    assert "\n" not in line
    assert "reward site" not in ALL[1].line()


def test_receipts_travel() -> None:
    for r in ALL:
        assert Receipt.from_dict(json.loads(json.dumps(r.to_dict()))) == r
        assert pickle.loads(pickle.dumps(r)) == r
