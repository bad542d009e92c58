"""One GRPO run of the language model in TRL, inside a worker process."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.demo.curve import Curve
from benchmarks.demo.train import watcher
from benchmarks.drivers import trl
from benchmarks.reporting import machine
from benchmarks.study.sampler import Drawn
from benchmarks.study.trl_host import against_the_sampler

from .measure import Measure, staleness
from .model import load, tokenizer_of
from .sampler import LaggedSampler
from .settings import HOST, NONE, Settings
from .tasks import Prompts, prompts_of

Tick = Callable[[int], None]
LOGGED = (
    "reward", "kl", "grad_norm", "kl/exact", "kl/value", "kl/ess", "kl/floor_frac", "kl/weight/max", "kl/coef/std",
    "clip_ratio/region_mean",
)  # fmt: skip
"""Keys of TRL's log whose averages since the previous measurement are in a curve, with the prefix `train/`."""
WARM_UP = 2  # warm-up steps of the learning rate; their times are not used


def arguments(arm: str, seed: int, settings: Settings, output: str) -> dict[str, Any]:
    """Return the arguments of TRL's `GRPOConfig`; the arm `trl` keeps all of TRL's defaults for the KL."""
    gpu = settings.device == "cuda"
    return {
        "output_dir": output,
        "seed": seed,
        "max_steps": settings.steps,
        "per_device_train_batch_size": settings.batch,
        "num_generations": settings.generations,
        "num_iterations": 1,
        "max_completion_length": settings.tokens,
        "temperature": 1.0,
        "top_k": 0,
        "beta": 0.0 if arm == NONE else settings.beta,
        "loss_type": "dr_grpo",
        "scale_rewards": "none",
        "learning_rate": settings.learning_rate,
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": WARM_UP,
        "use_cpu": not gpu,
        "bf16": gpu,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        **({} if arm in (NONE, HOST) else {"kl": arm}),
    }


def classes(arm: str) -> tuple[Any, Any]:
    """Return the classes `GRPOTrainer` and `GRPOConfig` for an arm."""
    return trl.classes(None if arm in (NONE, HOST) else arm)


class TrainingCurve(Curve):
    """A curve whose averages of TRL's log have a prefix, because they are from training prompts."""

    def __init__(self, settings: Settings, measure: Callable[[], dict[str, Any]], tick: Tick) -> None:
        names = tuple(f"train/{name}" for name in LOGGED)
        super().__init__(settings, measure, tick, names)  # type: ignore[arg-type]

    def log(self, logs: Mapping[str, Any]) -> None:
        """Add an entry of the trainer's log."""
        super().log({f"train/{name}": value for name, value in logs.items()})


def clock() -> Any:
    """Return a TRL callback that times each step including its rollout, and keeps the times in `seconds`."""
    import torch
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]
        """Measures the time from before the rollout to after the update."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.start = 0.0

        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.start = time.perf_counter()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.start)

    return Clock()


def typical(seconds: list[float]) -> float:
    """Return the median seconds of a step, without the first steps (allocation, compilation) if there are others."""
    return statistics.median(seconds[WARM_UP:] or seconds)


def longest(prompts: Prompts, tokenizer: Any) -> int:
    """Return the number of tokens of the longest prompt."""
    return max(len(tokenizer(p)["input_ids"]) for p in prompts.trained + prompts.held_out)


def run(arm: str, seed: int, settings: Settings, threads: int, tick: Tick) -> dict[str, Any]:
    """Train one arm with one seed.

    Args:
        arm: `none`, `trl` or a KL spec.
        seed: seed of the rollouts.
        settings: settings of the run.
        threads: number of threads of this process on a CPU.
        tick: function that is called with the number of finished steps.

    Returns:
        `curve` (the results of `Measure`, with `step` and averages of TRL's log), `weights` (those of the rollouts, if
        the sampler is behind the policy), `step_seconds` of every step, `seconds`, `evaluation_seconds`, `peak_bytes`
        on a GPU, and `machine`.
    """
    import torch
    from datasets import Dataset
    from transformers import PrinterCallback

    from kl_plugins.adapters.trl import detach

    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    torch.set_num_threads(threads)
    folder, gpu = Path(settings.model), settings.device == "cuda"
    tokenizer = tokenizer_of(folder)
    prompts = prompts_of(settings.task, tokenizer)
    size = longest(prompts, tokenizer)
    policy, reference = (load(folder, settings.device) for _ in range(2))
    measure = Measure(reference, prompts, tokenizer, settings, size)
    curve = TrainingCurve(settings, lambda: measure(policy), tick)
    weights: list[dict[str, float]] = []
    watched = [0.0]

    def watch(model: Any, drawn: Drawn, step: int) -> None:
        if step % settings.evaluate_every == 0 or step == settings.steps - 1:
            start = time.perf_counter()
            weights.append({"step": step, **staleness(model, drawn)})
            watched[0] += time.perf_counter() - start

    trainer_class, config_class = classes(arm)
    extra: dict[str, Any] = {}
    sampler = None
    if settings.delay is not None:
        trainer_class = against_the_sampler(trainer_class)
        shape = settings.batch, size, settings.tokens
        sampler = LaggedSampler(folder, settings.device, settings.delay, tokenizer, shape, seed, watch)
        extra["rollout_func"] = sampler
    times = clock()
    if gpu:
        torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    try:
        with tempfile.TemporaryDirectory() as output:
            trainer = trainer_class(
                policy,
                reward_funcs=prompts.reward,
                args=config_class(**arguments(arm, seed, settings, output)),
                train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts.trained]),
                processing_class=tokenizer,
                callbacks=[times, watcher(curve)],
                **extra,
            )
            trainer.remove_callback(PrinterCallback)
            trainer.train()
    finally:
        detach()  # the next run in this worker may use TRL without kl-plugins
    seconds = time.perf_counter() - start
    return {
        "curve": [{k: v for k, v in point.items() if v is not None} for point in curve.points],
        "weights": weights,
        "step_seconds": [round(s, 4) for s in times.seconds],
        "seconds": seconds,
        "evaluation_seconds": curve.seconds + watched[0],
        "machine": machine(),
        "captured": sampler.captured if sampler else None,
        "sampling_seconds": [round(s, 4) for s in sampler.seconds] if sampler else None,
        "peak_bytes": torch.cuda.max_memory_allocated() if gpu else None,
    }
