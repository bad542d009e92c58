"""GRPO in TRL under a KL spec, in one file: task, reward, settings, training.

    python grpo.py                                      # one GPU; without one, the CPU
    accelerate launch --num_processes 8 grpo.py         # eight GPUs
    KL=k2@loss/is:token BETA=0.01 MODEL=... python grpo.py

Each process logs one line before its first update, and a process without it stops the run:

    kl-plugins: k2@loss/is:token/floor:0.5 active in TRL ..., rank 0 of 1 (...), ...
"""

import os
import random
import re

import torch
from datasets import Dataset

# These are TRL's own classes with one more field, `kl`. TRL itself is not changed.
from kl_plugins.adapters.trl import GRPOConfig, GRPOTrainer

MODEL = os.environ.get("MODEL", "Qwen/Qwen2.5-0.5B-Instruct")
KL = os.environ.get("KL", "default")  # the preset `default` stands for k2@loss/is:token/floor:0.5
BETA = float(os.environ.get("BETA", "0.04"))  # coefficient of the KL; must not be 0
STEPS = int(os.environ.get("STEPS", "200"))  # optimizer steps
PROMPTS = int(os.environ.get("PROMPTS", "4"))  # prompts per device and step
GENERATIONS = int(os.environ.get("GENERATIONS", "8"))  # completions per prompt
LENGTH = int(os.environ.get("LENGTH", "128"))  # largest number of tokens of a completion
OUT = os.environ.get("OUT", "out/trl")


def sums(rows: int) -> Dataset:
    """The task: add three numbers. TRL applies the model's chat template to the prompt."""
    generator = random.Random(0)
    terms = [[generator.randint(10, 99) for _ in range(3)] for _ in range(rows)]
    question = "What is {}? Think step by step, and end with the result."
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": question.format("+".join(map(str, numbers)))}],
                "answer": str(sum(numbers)),
            }
            for numbers in terms
        ]
    )


def correct(completions: list, answer: list[str], **unused: object) -> list[float]:
    """The reward: 1 if the last number of the completion is the answer, otherwise 0."""
    texts = [completion[0]["content"] for completion in completions]
    numbers = [re.findall(r"\d+", text) for text in texts]
    return [float(bool(found) and found[-1] == right) for found, right in zip(numbers, answer, strict=True)]


def main() -> None:
    """Train, and save the model."""
    gpu = torch.cuda.is_available()
    config = GRPOConfig(
        output_dir=OUT,
        # The KL term and its coefficient. A misspelt spec fails here, before a model is loaded.
        kl=KL,
        beta=BETA,
        # Each batch of completions is used for two updates. In the second one the policy differs from the one that was
        # sampled. The importance weight in the spec (`is:token`) corrects for that.
        num_iterations=2,
        per_device_train_batch_size=PROMPTS * GENERATIONS,
        num_generations=GENERATIONS,
        max_completion_length=LENGTH,
        learning_rate=1e-6,
        max_steps=STEPS,
        logging_steps=1,
        report_to="none",  # "wandb", "trackio", ...: the metrics below appear there too
        bf16=gpu,
        use_cpu=not gpu,
    )
    trainer = GRPOTrainer(model=MODEL, reward_funcs=correct, args=config, train_dataset=sums(2048))
    trainer.train()
    trainer.save_model()
    # Watch these metrics: `kl/value` is the KL per token. `kl/ess` is the effective share of the tokens under the
    # weights; it is 1 for fresh data, and smaller if the policy differs from the one that was sampled.
    last = [entry for entry in trainer.state.log_history if "kl/value" in entry][-1]
    print({name: round(last[name], 4) for name in ("reward", "kl/value", "kl/beta", "kl/ess") if name in last})


if __name__ == "__main__":
    main()
