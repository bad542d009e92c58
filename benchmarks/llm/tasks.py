"""The tasks of the language model: instructions whose results a few lines of code can verify.

`letter` asks for a sentence with many words that begin with one letter. SmolLM2-135M fulfils a part of it before
training (18 % of the words of its sentences begin with S). A policy can improve the reward by good sentences or by
empty alliteration, so the effect of a KL term is visible in the texts. `sums` asks for the sum of two digits.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

LETTER = "s"
LEAST_WORDS = 8  # a shorter sentence is counted as if it had this number of words
WORD = re.compile(r"[^\W\d_][\w']*")
NUMBER = re.compile(r"\d+")
THINGS = (
    "the sea", "a dog", "winter", "the moon", "school", "bread", "a river", "music", "the city", "a garden", "rain",
    "friends", "a train", "summer", "the forest", "a storm", "a market", "the desert", "a ship", "cooking", "a spider",
    "the night", "a castle", "sports", "a teacher", "the mountains", "a song", "snow", "a village", "the stars",
    "a kitchen", "an island", "a bridge", "a painting", "the wind", "a clock", "a horse", "the library", "a window",
    "breakfast", "a lake", "the doctor", "a letter", "autumn", "a farm", "the ocean", "a bicycle", "a dream",
    "coffee", "a bird", "the airport", "a mirror", "honey", "a tower", "the beach", "a shop", "a cat", "tea",
    "the theatre", "a road", "a flower", "the harbour", "a book", "fire",
)  # fmt: skip
HELD_OUT = 16  # number of questions at the end of a task that are not used for training


@dataclass(frozen=True)
class Task:
    """Questions and the check of an answer.

    Attributes:
        name: name on the command line.
        meaning: meaning of the reward, for tables.
        questions: the questions in plain words.
        verify: function of (question, answer) that returns a reward between 0 and 1.
    """

    name: str
    meaning: str
    questions: tuple[str, ...]
    verify: Callable[[str, str], float]


@dataclass(frozen=True)
class Prompts:
    """The questions of a task as prompts for a model.

    Attributes:
        task: the task.
        trained, held_out: prompts for training and for evaluation.
        question_of: maps each prompt to its question.
    """

    task: Task
    trained: tuple[str, ...]
    held_out: tuple[str, ...]
    question_of: dict[str, str]

    def reward(self, prompts: Sequence[str], completions: Sequence[str], **_: Any) -> list[float]:
        """Return the reward of each completion; this is TRL's reward function."""
        return [self.task.verify(self.question_of[p], c) for p, c in zip(prompts, completions, strict=True)]


def alliteration(question: str, answer: str) -> float:
    """Return the share of words that begin with the letter; a short answer counts as having `LEAST_WORDS` words."""
    words = WORD.findall(answer)
    return sum(word[0].lower() == LETTER for word in words) / max(len(words), LEAST_WORDS)


def right_sum(question: str, answer: str) -> float:
    """Return 1.0 if the last number of the answer is the sum of the numbers in the question, otherwise 0.0."""
    numbers = NUMBER.findall(answer)
    return float(bool(numbers) and int(numbers[-1][:9]) == sum(map(int, NUMBER.findall(question))))


# The pairs of digits are in an order without a pattern, so that the held-out questions are like the others.
_SUMS = tuple(f"What is {2 + n % 8} + {2 + n // 8}?" for n in sorted(range(64), key=lambda n: n * 37 % 64))
TASKS = {
    task.name: task
    for task in (
        Task(
            "letter", f"share of the words that begin with {LETTER.upper()}",
            tuple(f"Write one sentence about {thing}. Use many words that begin with the letter {LETTER.upper()}."
                  for thing in THINGS),
            alliteration,
        ),
        Task("sums", "share of answers whose last number is the sum", _SUMS, right_sum),
    )
}  # fmt: skip


def as_prompt(question: str, tokenizer: Any) -> str:
    """Return the question in the model's chat format, without a system message, which would only cost time here."""
    if "<|im_start|>" in tokenizer.get_vocab():
        return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    if tokenizer.chat_template:
        message = [{"role": "user", "content": question}]
        return str(tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False))
    return f"{question}\n"


def prompts_of(name: str, tokenizer: Any) -> Prompts:
    """Return the prompts of a task for a tokenizer.

    Raises:
        ValueError: There is no task of this name.
    """
    if name not in TASKS:
        raise ValueError(f"no task {name!r}; there is {', '.join(TASKS)}")
    task = TASKS[name]
    made = {as_prompt(question, tokenizer): question for question in task.questions}
    return Prompts(task, tuple(made)[:-HELD_OUT], tuple(made)[-HELD_OUT:], made)
