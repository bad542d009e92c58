"""OpenRLHF's real update in its Ray actors; ``python -m benchmarks.hosts.openrlhf_update FIXTURE CASES OUT``.

``BasePPOTrainer.train_step`` makes the experience (log-probs, rewards, advantages) under the policy of the fixture's
rollouts and trains on it, in micro-batches of two. Between the two parts, the policy being updated is loaded into the
workers.

The update is computed in float32, as ``benchmarks.drivers.openrlhf`` explains. The case ``... in bf16`` shows what
users get.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any
from unittest import mock

from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.drivers import openrlhf, openrlhf_actor
from benchmarks.hosts import openrlhf_watch
from benchmarks.hosts.cases import BETA, Case
from benchmarks.hosts.fixture import Rollouts
from benchmarks.hosts.records import Record, read_cases, save
from tests.support.openrlhf import by_hand, harness, remote
from tests.support.openrlhf.rollouts import Rollouts as HostRollouts

FLAGS = (
    *("--train.batch_size", "8", "--train.max_epochs", "1", "--train.micro_batch_size", "2"),
    *("--rollout.micro_batch_size", "2", "--algo.advantage.estimator", "dr_grpo", "--actor.eps_clip", "1e6"),
    *("--algo.kl.init_coef", str(BETA)),
)


def in_host_form(rollouts: Rollouts) -> HostRollouts:
    """Return the rollouts in the form of OpenRLHF's sampler; the task reward is 0."""
    given = (rollouts.prompts, rollouts.responses, rollouts.sampler)
    return HostRollouts.of(*given, [0.0] * len(rollouts.prompts))


def flags(case: Case) -> list[str]:
    """Return OpenRLHF's command line."""
    unbiased = bool(case.native.get("unbiased_gradient"))
    kl = case.spec or case.native["estimator"]
    return [*FLAGS, *openrlhf.kl_flags(kl, in_loss=case.placement == "loss", unbiased_gradient=unbiased)]


def update(case: Case, host: harness.Harness, fixture: Path, rollouts: Rollouts, current: dict[str, Tensor]) -> Record:
    """Run one case and return its record."""
    host.assets = fixture / case.scenario
    with openrlhf.parsed_in(case.native.get("dtype", "fp32")):
        trainer = host.start(flags(case))
    if case.spec.startswith("exact"):
        host.ask(by_hand.name_reference, str(host.assets / "reference"))
    host.receipts(trainer)
    make = trainer.experience_maker.make_experience_batch

    def then_move(samples: Any) -> Any:
        made = make(samples)
        host.ask(openrlhf_actor.load, current)
        host.ask(openrlhf_watch.start)
        return made

    with mock.patch.object(trainer.experience_maker, "make_experience_batch", then_move):
        metrics, _ = trainer.train_step(in_host_form(rollouts).experiences(), 0)
    record = Record.empty(case, rollouts.lengths)
    record.take(rollouts.index_of, host.ask(openrlhf_watch.stop))
    record.logged = float(metrics["kl"]) if case.placement == "loss" else None
    record.gradient = host.ask(remote.state)[0][1]
    return record


def main(fixture: Path, cases: Path, output: Path) -> None:
    """Run all cases and write their records."""
    rollouts, records = Rollouts.load(fixture), []
    current = AutoModelForCausalLM.from_pretrained(fixture / "near" / "current").state_dict()
    with openrlhf.session(by_hand, openrlhf_watch):
        hosts: dict[int, harness.Harness] = {}
        for case in read_cases(cases):
            ranks = case.native.get("ranks", 1)
            if ranks not in hosts:
                hosts[ranks] = openrlhf.actors_of(fixture / "near", ranks)
            records.append(update(case, hosts[ranks], fixture, rollouts, current))
            print(f"done {case.name}", flush=True)
        for host in hosts.values():
            host.end()
    save(output, "openrlhf", version("openrlhf"), records)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
