"""TRL's side of the contract: its real trainer, alone and in two processes."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import trl

from kl_plugins.adapters import trl as adapter
from kl_plugins.adapters.trl.config import ASSUME_VARIABLE
from kl_plugins.receipts import Receipt
from tests.contract.driver import BETA, Fault, Outcome, Program, Request, Resumed, Sampled
from tests.support.trl import contract_batch, trainers
from tests.support.trl.launch import ROOT

ANSWER_LIMIT, START_LIMIT, PROGRAM_LIMIT = 60, 120, 120
"""Seconds: for an answer of two processes, for the first of them, and for a whole program."""

WHOLE = Sampled()


class TRLDriver:
    """The contract's requests on TRL; see :class:`tests.contract.driver.Driver`."""

    host, key = "trl", "k1@reward"

    def __init__(self, model: str, folder: Path) -> None:
        """Nothing is started before it is asked for."""
        self._model, self._folder = model, folder
        self._pair: _Pair | None = None

    def close(self) -> None:
        """End the two processes."""
        if self._pair is not None:
            self._pair.stop()

    def observing(self, spec: str, probe: str = "") -> str:
        """See :meth:`tests.contract.driver.Driver.observing`."""
        return f"observe{spec and ':'}{spec}{probe}"

    def update(self, request: Request) -> Outcome:
        """``GRPOTrainer.train()`` on the fixed batch."""
        if request.ranks == 1:
            return contract_batch.outcome(request, self._model, self._folder)
        if self._pair is None or not self._pair.running:
            self._pair = _Pair(self._model, self._folder / f"pair-{time.monotonic_ns()}")
        return self._pair.ask(request)

    def score(self, spec: str, fault: Fault | None = None) -> Outcome:
        """One step of ``GRPOTrainer.train()`` with TRL's own rollout, which scores what a rollout function gives."""
        trainer_class, config = contract_batch.ours()
        settings = trainers.settings(self._folder, kl=spec, beta=BETA, max_steps=1)
        trainer = trainer_class(
            self._model, trainers.even_reward, args=config(**settings), train_dataset=trainers.prompts(),
            rollout_func=rollout,
        )  # fmt: skip
        before = [p.detach().clone() for p in trainer.model.parameters()]
        scored = trainer.ref_model if fault is not None and fault.whose == "reference" else trainer.model
        with contract_batch.broken(scored, fault, lambda: not torch.is_grad_enabled()):
            error = contract_batch.attempted(trainer)
        changed = not all(map(torch.equal, before, trainer.model.parameters()))
        return Outcome((error,), changed, contract_batch.logged(trainer))

    def refusal(self, spec: str, *, sampled: Sampled = WHOLE, sampler: bool = True, wrong_key: bool = False) -> str:
        """Build config and trainer on a model that does not exist: what gets as far as loading it was not refused."""
        config, trainer = (adapter.RLOOConfig, adapter.RLOOTrainer) if wrong_key else contract_batch.ours()[::-1]
        with vllm_server("raw_logprobs") as port:
            engine = {"use_vllm": True, "vllm_mode": "server" if sampled.raw else "colocate", "vllm_server_port": port}
            settings = trainers.settings(self._folder, kl=spec, **_generation(sampled), **(engine if sampler else {}))
            return refusal_of(trainer, config, **settings, vllm_server_host="127.0.0.1")

    def receipt(self, spec: str, *, sampled: Sampled = WHOLE, sampler: bool = True) -> Receipt:
        """The receipt of a trainer that is built."""
        from kl_plugins.patches.trl.trainer import session_of

        trainer_class, config = contract_batch.ours()
        settings = trainers.settings(self._folder, kl=spec, **_generation(sampled))
        extra = {"rollout_func": rollout} if sampler else {}
        # Whoever writes a rollout function knows what it reports, and says so.
        with environment(**{ASSUME_VARIABLE: "1"}):
            trainer = trainer_class(
                self._model, trainers.even_reward, args=config(**settings), train_dataset=trainers.prompts(), **extra
            )
        session = session_of(trainer)
        assert session is not None
        return session.receipt()

    def resume(self, before: str, after: str) -> Resumed:
        """Two steps and a checkpoint of ``GRPOTrainer.train()``, then two more from it."""
        folder = self._folder / f"resume-{time.monotonic_ns()}"

        def trained(spec: str, steps: int, checkpoint: str | None = None) -> tuple[Any, str | None]:
            saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": steps, "beta": BETA}
            built = trainers.build(*contract_batch.ours(), self._model, folder, kl=spec, **saving)
            return built, contract_batch.attempted(built, resume_from_checkpoint=checkpoint)

        _, failed = trained(before, 2)
        assert failed is None, failed
        checkpoint = folder / "checkpoint-2"
        weights = checkpoint / "model.safetensors"
        digest = hashlib.sha256(weights.read_bytes()).hexdigest()
        state = json.loads((checkpoint / "trainer_state.json").read_text())["stateful_callbacks"]["kl_plugins"]
        saved = BETA if state["controller"] is None else state["controller"]["beta"]
        built, error = trained(after, 4, str(checkpoint))
        betas = [entry["kl/beta"] for entry in built.state.log_history if entry["step"] > 2 and "kl/beta" in entry]
        intact = hashlib.sha256(weights.read_bytes()).hexdigest() == digest
        return Resumed(error, saved, betas[0] if error is None else None, intact)

    def unused(self) -> tuple[Outcome, Outcome]:
        """TRL's own classes on the fixed batch: as they are, and with kl-plugins attached to them."""
        found = []
        for attached in (False, True):
            if attached:
                adapter.attach()
            kinds = trl.GRPOTrainer, trl.GRPOConfig
            found.append(contract_batch.outcome(Request(None), self._model, self._folder, kinds, everything=True))
            adapter.detach()
        return found[0], found[1]

    def program(self) -> Program:
        """``python -m tests.support.trl.contract_program``."""
        folder = self._folder / "program"
        command = [sys.executable, "-m", "tests.support.trl.contract_program", self._model, str(folder)]
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=PROGRAM_LIMIT, check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        names = sorted(path.name for path in folder.glob("checkpoint-*"))
        return Program(done.returncode, done.stdout + done.stderr, tuple(names))


def refusal_of(trainer: type, config: type, rollout_func: Any = None, **settings: Any) -> str:
    """Our error when config and trainer are built on a model that does not exist; empty where its load is reached."""
    extra = {"rollout_func": rollout_func} if rollout_func else {}
    try:
        args = config(**settings)
        trainer("no/such/model", trainers.even_reward, args=args, train_dataset=trainers.prompts(), **extra)
    except (OSError, ImportError):  # no such model, or no vLLM
        return ""
    except ValueError as error:
        return str(error)
    raise AssertionError("a trainer was built without its model")


class _Pair:
    """Two processes under one ``torchrun``, which answer one request after another."""

    def __init__(self, model: str, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder, self._number = folder, 0
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            "-m", "tests.support.trl.contract_worker", model, str(folder), str(os.getpid()),
        ]  # fmt: skip
        with (folder / "log").open("w") as log:
            self._process = subprocess.Popen(
                command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def ask(self, request: Request) -> Outcome:
        draft = self._folder / "draft"
        draft.write_bytes(pickle.dumps(request))
        draft.rename(self._folder / f"request-{self._number}")
        answers = [self._folder / f"answer-{self._number}-{rank}" for rank in (0, 1)]
        deadline = time.monotonic() + (ANSWER_LIMIT if self._number else START_LIMIT)
        while self.running and time.monotonic() < deadline and not all(answer.exists() for answer in answers):
            time.sleep(0.02)
        self._number += 1
        found = [pickle.loads(answer.read_bytes()) if answer.exists() else None for answer in answers]
        if None in found:
            self.stop()
            log = (self._folder / "log").read_text()[-4000:]
            raise AssertionError(f"no answer from rank {found.index(None)}; the other one: {found}\n{log}")
        errors = tuple(one.errors[0] for one in found)
        return replace(found[0], errors=errors, changed=any(one.changed for one in found))

    def stop(self) -> None:
        (self._folder / "stop").touch()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
    """Completions as long as those of the fixed batch, which no model has drawn, with log-probs to match."""
    tokenizer = trainer.processing_class
    generator = torch.Generator().manual_seed(0)
    lengths = [contract_batch.LENGTHS[i % len(contract_batch.LENGTHS)] for i in range(len(prompts))]
    ids = [torch.randint(3, len(tokenizer), (length,), generator=generator).tolist() for length in lengths]
    return {
        "prompt_ids": [tokenizer(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": ids,
        "logprobs": [[-2.5] * len(completion) for completion in ids],
    }


def _generation(sampled: Sampled) -> dict[str, float]:
    changes = {"temperature": sampled.temperature, "top_p": sampled.top_p, "top_k": sampled.top_k}
    return changes | ({"min_p": sampled.min_p} if sampled.min_p else {})


@contextmanager
def environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def vllm_server(mode: str | None) -> Iterator[int]:
    """What a vLLM server says about its log-probs, on a free port; None: it does not say."""

    class Info(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            content = json.dumps({"vllm_config": {"model_config": {"logprobs_mode": mode}}}).encode()
            self.send_response(200 if mode and self.path.startswith("/server_info") else 404)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Stay quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Info) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        with environment(no_proxy="127.0.0.1"):
            yield server.server_address[1]
        server.shutdown()
        thread.join()
