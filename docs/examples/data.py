"""Write the examples' task for all three hosts: add three numbers. Nothing is downloaded.

    python data.py                 # writes ./data
    python data.py --out FOLDER --rows 2048

Each host wants its own columns, so there is one folder per host. To train on data of yours, write the same columns.
"""

import argparse
import json
import random
from pathlib import Path

import pandas

QUESTION = "What is {}? Think step by step, and end with the result."


def sums(rows: int, seed: int) -> list[tuple[str, str]]:
    """Return pairs of a question and its answer."""
    random_numbers = random.Random(seed)
    terms = [[random_numbers.randint(10, 99) for _ in range(3)] for _ in range(rows)]
    return [(QUESTION.format("+".join(map(str, numbers))), str(sum(numbers))) for numbers in terms]


def chat(question: str) -> list[dict[str, str]]:
    """Return a conversation of one message; the hosts apply the model's chat template to it."""
    return [{"role": "user", "content": question}]


def write_trl(folder: Path, name: str, pairs: list[tuple[str, str]]) -> None:
    """Make a row for TRL: `prompt`, and the columns that the reward function takes by name, here `answer`."""
    rows = [{"prompt": chat(question), "answer": answer} for question, answer in pairs]
    pandas.DataFrame(rows).to_parquet(folder / f"{name}.parquet")


def write_verl(folder: Path, name: str, pairs: list[tuple[str, str]]) -> None:
    """Make a row for veRL: `prompt`, and `data_source` and `reward_model`, which veRL passes to the reward function."""
    rows = [
        {
            "data_source": "sums",
            "prompt": chat(question),
            "ability": "math",
            "reward_model": {"style": "rule", "ground_truth": answer},
            "extra_info": {"index": index},
        }
        for index, (question, answer) in enumerate(pairs)
    ]
    pandas.DataFrame(rows).to_parquet(folder / f"{name}.parquet")


def write_openrlhf(folder: Path, name: str, pairs: list[tuple[str, str]]) -> None:
    """Make a row for OpenRLHF, with the keys that `--data.input_key` and `--data.label_key` name."""
    rows = [{"input": chat(question), "label": answer} for question, answer in pairs]
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    """Write a training and a test file per host."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("data"))
    parser.add_argument("--rows", type=int, default=2048)
    options = parser.parse_args()
    for host, write in (("trl", write_trl), ("verl", write_verl), ("openrlhf", write_openrlhf)):
        folder = options.out / host
        folder.mkdir(parents=True, exist_ok=True)
        write(folder, "train", sums(options.rows, seed=0))
        write(folder, "test", sums(max(options.rows // 16, 4), seed=1))
    print(f"wrote {options.rows} prompts per host under {options.out}")


if __name__ == "__main__":
    main()
