"""The rollouts for all hosts: models, tokens, log-probs, rewards, and the inputs of the float64 reference.

Run it as ``python -m benchmarks.hosts.fixture FOLDER`` in any host's environment. For each scenario it writes a folder
with ``model`` (the policy that the rollouts came from), ``current`` (the policy being updated), ``reference``, and the
files that OpenRLHF's command line expects. Next to these folders it writes ``rollouts.pt`` and ``oracle.pt``.

The core's environment has no models. With the Jacobians in ``oracle.pt`` it can still compute parameter gradients: the
gradient of ``sum_t w_t log pi_t`` is ``w @ score``.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.hosts.cases import FAR, NEAR
from tests.support.openrlhf import assets

GROUP = 2
"""Number of responses per prompt."""

PROMPTS = (3, 3, 5, 5, 2, 2, 4, 4)
RESPONSES = (6, 4, 7, 5, 3, 8, 4, 6)
MODELS = {"current": 0.003, NEAR: 0.008, FAR: 0.08}
"""Scale of the noise that is added to the weights of the rollouts' policy, by model."""

FIRST_TOKEN = 4  # The tokens before it are special.


@dataclass(frozen=True)
class Rollouts:
    """The rollouts, one entry per sequence. Log-probs are of response tokens, float32, nats.

    Attributes:
        prompts, responses: token ids.
        sampler: log-probs of the inference engine.
        old: log-probs of the policy that the rollouts came from.
        current: log-probs of the policy being updated.
        reference: log-probs of the reference, by scenario.
        rewards: one per sequence.
    """

    prompts: list[Tensor]
    responses: list[Tensor]
    sampler: list[Tensor]
    old: list[Tensor]
    current: list[Tensor]
    reference: dict[str, list[Tensor]]
    rewards: list[float]

    @property
    def lengths(self) -> list[int]:
        """Return the number of response tokens of each sequence."""
        return [len(response) for response in self.responses]

    def index_of(self, tokens: list[int]) -> int:
        """Return the index of the sequence that has this response."""
        return next(i for i, response in enumerate(self.responses) if response.tolist() == tokens)

    @classmethod
    def load(cls, folder: Path) -> Rollouts:
        """Read ``rollouts.pt``."""
        return cls(**torch.load(folder / "rollouts.pt"))


def build_models(folder: Path) -> dict[str, Any]:
    """Write the scenarios' folders, and return the models in float64, by name."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

    # All hosts read the prompts, the reward function and the tokenizer from these folders.
    for scenario in (NEAR, FAR):
        assets.build(folder / scenario)
    tokenizer = AutoTokenizer.from_pretrained(folder / NEAR / "model")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    torch.manual_seed(0)
    base = Qwen2ForCausalLM(assets.model_config(dtype="float32"))
    with torch.no_grad():  # The policy must be far from uniform, so that log-ratios are not tiny.
        base.lm_head.weight.mul_(8)
    made = {}
    for name, scale in {"model": 0.0, **MODELS}.items():
        random = torch.Generator().manual_seed(11)
        model = Qwen2ForCausalLM(assets.model_config(dtype="float32"))
        model.load_state_dict(base.state_dict())
        random.manual_seed(sum(name.encode()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(scale * torch.randn(parameter.shape, generator=random))
        for path in _places(folder, name):
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)
        made[name] = AutoModelForCausalLM.from_pretrained(
            _places(folder, name)[0], attn_implementation="eager"
        ).double()
    return made


def _places(folder: Path, name: str) -> list[Path]:
    if name in (NEAR, FAR):
        return [folder / name / "reference"]
    return [folder / scenario / name for scenario in (NEAR, FAR)]


def state_logits(model: Any, prompt: Tensor, response: Tensor) -> Tensor:
    """Return the logits (T, V) of the states in which the response's tokens were drawn."""
    logits: Tensor = model(input_ids=torch.cat([prompt, response])[None]).logits[0, len(prompt) - 1 : -1]
    return logits


def log_probs(model: Any, prompts: list[Tensor], responses: list[Tensor]) -> list[Tensor]:
    """Return the log-probs of the responses' tokens, in the model's precision, with their graph."""
    return [
        state_logits(model, p, r).log_softmax(-1).gather(-1, r[:, None])[:, 0]
        for p, r in zip(prompts, responses, strict=True)
    ]


def rows(values: list[Tensor], parameters: list[Tensor]) -> Tensor:
    """Return the Jacobian (tokens, parameters) of all entries with respect to all parameters."""
    found = []
    for row in values:
        for value in row:
            grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
            flat = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, parameters, strict=True)]
            found.append(torch.cat([g.flatten() for g in flat]))
    return torch.stack(found)


def exact_kls(policy: Any, reference: Any, prompts: list[Tensor], responses: list[Tensor]) -> list[Tensor]:
    """Return KL(policy || reference) of every state, from the whole softmax, nats."""
    found = []
    for p, r in zip(prompts, responses, strict=True):
        logp, ref = state_logits(policy, p, r).log_softmax(-1), state_logits(reference, p, r).detach().log_softmax(-1)
        found.append((logp.exp() * (logp - ref)).sum(-1))
    return found


def build(folder: Path) -> None:
    """Write all files of the fixture, with the same bits each time."""
    models = build_models(folder)
    random = torch.Generator().manual_seed(7)
    prompts: list[Tensor] = []
    responses: list[Tensor] = []
    for index, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        new = torch.randint(FIRST_TOKEN, assets.VOCABULARY, (prompt,), generator=random)
        prompts.append(prompts[-1] if index % GROUP else new)
        responses.append(torch.randint(FIRST_TOKEN, assets.VOCABULARY, (response,), generator=random))
    with torch.no_grad():
        found = {name: log_probs(models[name], prompts, responses) for name in models if name != "current"}
    current = log_probs(models["current"], prompts, responses)
    sampler = [(x + 0.1 * torch.randn(x.shape, generator=random)).float() for x in found["model"]]
    parameters = list(models["current"].parameters())
    kls = exact_kls(models["current"], models[NEAR], prompts, responses)
    detached = {**found, "current": [x.detach() for x in current]}
    single = {name: [x.float() for x in values] for name, values in detached.items()}
    rollouts = Rollouts(
        prompts,
        responses,
        sampler,
        single["model"],
        single["current"],
        {scenario: single[scenario] for scenario in (NEAR, FAR)},
        torch.rand(len(PROMPTS), generator=random).tolist(),
    )
    torch.save(vars(rollouts), folder / "rollouts.pt")
    oracle = {
        "log_probs": detached,
        "sampler": [x.double() for x in sampler],
        "score": rows(current, parameters),
        "exact": [x.detach() for x in kls],
        "exact_gradient": rows(kls, parameters),
        "parameters": [(name, tuple(p.shape)) for name, p in models["current"].named_parameters()],
        "group": GROUP,
    }
    torch.save(oracle, folder / "oracle.pt")


if __name__ == "__main__":
    build(Path(sys.argv[1]))
