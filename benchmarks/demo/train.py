"""One GRPO run with TRL, and the training of its reference; both run inside a worker process."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.drivers.trl import classes
from benchmarks.reporting import machine

from . import evaluate, model, task
from .arms import NATIVE, Arm, Settings
from .curve import Curve, Tick


def make_reference(folder: Path, settings: Settings, tick: Tick) -> dict[str, Any]:
    """Pre-train the reference, save it, and return a description of it and of the machine.

    Args:
        folder: folder for the model.
        settings: settings of the demo.
        tick: function that is called with the number of finished steps.
    """
    from kl_plugins.kernels.backend import COMPILE_ABOVE, backend_status, chosen_backend

    start = time.perf_counter()
    loss = model.pretrain(folder, settings.pretrain_steps, settings.pretrain_seed, tick)
    reference = load(folder)
    tree = evaluate.walk(reference, reference)
    rewards = tree.rewards.clamp(1e-12, 1 - 1e-12)
    tokens = settings.prompts * settings.generations * task.COMPLETION_TOKENS
    status, chosen = backend_status("cpu"), chosen_backend(tokens, "cpu")
    return {
        "reward": float(rewards.mean()),
        "reward_by_number": dict(zip(map(str, task.NUMBERS), rewards.tolist(), strict=True)),
        "entropy": evaluate.evaluate(reference, reference, None, False)["entropy"],
        "coverage": tree.coverage,
        "optimum": evaluate.optimum(rewards, settings.beta),
        "loss": loss,
        "parameters": sum(p.numel() for p in reference.parameters()),
        "seconds": time.perf_counter() - start,
        "machine": machine(),
        "backend": {
            "used": chosen, "can_compile": status.compiled, "reason": status.reason,
            "tokens_per_call": tokens, "compile_above": COMPILE_ABOVE,
        },
    }  # fmt: skip


def load(folder: Path) -> Any:
    """Load the saved reference model."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def settings_of_trl(arm: Arm, seed: int, settings: Settings, output: str, completion_tokens: int) -> dict[str, Any]:
    """Return the arguments of TRL's `GRPOConfig`, with `kl` if the arm is a KL spec."""
    extra = {"use_bias_correction_kl": NATIVE.get(arm.name, False)} if arm.spec is None else {"kl": arm.spec}
    return {
        "output_dir": output,
        "seed": seed,
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.prompts * settings.generations,
        "num_generations": settings.generations,
        "num_iterations": 1,
        "max_completion_length": completion_tokens,
        "temperature": 1.0,
        "top_k": 0,
        "beta": 0.0 if arm.name == "none" else settings.beta,
        "loss_type": settings.loss_type,
        "scale_rewards": settings.scale_rewards,
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "linear",
        "max_grad_norm": settings.max_grad_norm,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **extra,
    }


def make_trainer(arm: Arm, seed: int, settings: Settings, policy: Any, output: str, callback: Any) -> Any:
    """Make TRL's own trainer, or the one of kl-plugins if the arm is a KL spec."""
    from datasets import Dataset
    from transformers import PrinterCallback

    trainer, config = classes(arm.spec)
    made = trainer(
        policy,
        reward_funcs=task.reward,
        args=config(**settings_of_trl(arm, seed, settings, output, task.COMPLETION_TOKENS)),
        train_dataset=Dataset.from_list([{"prompt": task.prompt(n)} for n in task.NUMBERS]),
        processing_class=model.tokenizer(),
        callbacks=[callback],
    )
    made.remove_callback(PrinterCallback)  # it would print every step's log
    return made


def watcher(curve: Curve) -> Any:
    """Return a TRL callback that tells a curve about TRL's steps and logs."""
    from transformers import TrainerCallback

    class Watch(TrainerCallback):  # type: ignore[misc]
        """Tells the curve of TRL's steps and logs."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            curve.measure(0)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            curve.log(logs)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            curve.step(state.global_step)

    return Watch()


def run(arm: Arm, seed: int, settings: Settings, reference_folder: Path, tick: Tick) -> dict[str, Any]:
    """Train one arm with one seed.

    Args:
        arm: the regulariser.
        seed: seed of the rollouts.
        settings: settings of the demo.
        reference_folder: folder of the saved reference.
        tick: function that is called with the number of finished steps.

    Returns:
        `curve` with one dict per evaluation; `seconds` of wall-clock time; `cpu_seconds`; and `evaluation_seconds`. A
        dict of the curve has the results of `evaluate`, `step`, and `logged_coef_std`, the mean of the logged
        `kl/coef/std` since the previous evaluation.
    """
    from kl_plugins.adapters.trl import detach

    policy, reference = load(reference_folder), load(reference_folder).eval()
    own, future = evaluate.own_coefficient(arm.name)
    spread = "kl/coef/std"
    curve = Curve(settings, lambda: evaluate.evaluate(policy, reference, own, future), tick, (spread,))
    start, cpu = time.perf_counter(), time.process_time()
    try:
        with tempfile.TemporaryDirectory() as output:
            make_trainer(arm, seed, settings, policy, output, watcher(curve)).train()
    finally:
        detach()  # the next run in this worker may use TRL without kl-plugins
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    points = [{**point, "logged_coef_std": point.pop(spread)} for point in curve.points]
    return {"curve": points, "seconds": seconds, "cpu_seconds": cpu, "evaluation_seconds": curve.seconds}
