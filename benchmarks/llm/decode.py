"""Fast sampling with a cache of fixed size and, on a GPU, with one captured graph per token.

The generation of transformers launches some thousand small kernels per token, which takes 20 ms. The arithmetic of a
small model needs a twentieth of that. If all tensors have fixed shapes and addresses, a GPU can replay the kernels of a
token as one graph, also after the weights have changed in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.study.sampler import Drawn, sample

KNOWN = ("llama", "qwen2")  # model types of transformers that `Decoder` supports
ALIGNED = 8  # fused attention kernels need masks whose size is a multiple of this
WARM_UP = 3  # number of steps before a capture
CHECK_EVERY = 32  # steps between checks whether every row has ended; a check waits for the GPU


def drawer(model: Any, tokenizer: Any, rows: int, prompt_tokens: int, tokens: int) -> Decoder | Plain:
    """Return the fastest available sampler for a model.

    Args:
        model: a causal language model; its weights may change in place afterwards.
        tokenizer: tokenizer that pads on the left.
        rows: largest number of prompts per call.
        prompt_tokens: number of tokens of the longest prompt.
        tokens: largest number of tokens of a completion.
    """
    config = model.config
    if config.model_type in KNOWN and not getattr(config, "use_sliding_window", False):
        return Decoder(model, tokenizer, rows, prompt_tokens, tokens)
    return Plain(model, tokenizer, tokens)


class Plain:
    """Draws completions by the generation of transformers, for models that `Decoder` does not support."""

    def __init__(self, model: Any, tokenizer: Any, tokens: int) -> None:
        self._model, self._tokenizer, self._tokens = model, tokenizer, tokens
        self.captured = "no: not a model type that can be"

    def draw(self, prompts: list[str], generator: torch.Generator) -> Drawn:
        """Draw one completion per prompt at temperature 1."""
        return sample(self._model, self._tokenizer, prompts, self._tokens, generator)


class Decoder:
    """Draws completions at temperature 1 from the whole vocabulary, with their log-probs.

    Attributes:
        captured: `yes` if tokens are replayed from a graph, otherwise the reason why not.
    """

    def __init__(self, model: Any, tokenizer: Any, rows: int, prompt_tokens: int, tokens: int) -> None:
        config, device = model.config, model.device
        weight = model.get_input_embeddings().weight
        self._model, self._tokenizer = model, tokenizer
        self._rows, self._prompt_tokens, self._tokens = rows, prompt_tokens, tokens
        self._heads = config.num_attention_heads
        self._groups = self._heads // config.num_key_value_heads
        self._width = getattr(config, "head_dim", None) or config.hidden_size // self._heads
        self._length = -(-(prompt_tokens + tokens) // ALIGNED) * ALIGNED
        cache = (rows, self._heads, self._length, self._width)
        layers = range(config.num_hidden_layers)
        self._keys, self._values = ([weight.new_zeros(cache) for _ in layers] for _ in range(2))
        places = torch.arange(self._length, device=device)[None]
        with torch.no_grad():
            cos, sin = model.base_model.rotary_emb(weight.detach()[:1, None], places)
        self._cos, self._sin = cos[0].to(weight.dtype), sin[0].to(weight.dtype)
        whole = {"dtype": torch.long, "device": device}
        self._token, self._position = (torch.zeros(rows, 1, **whole) for _ in range(2))
        self._slot, self._index = (torch.zeros(1, **whole) for _ in range(2))
        self._visible = torch.zeros(rows, 1, 1, self._length, dtype=torch.bool, device=device)
        self._alive = torch.ones(rows, 1, dtype=torch.bool, device=device)
        self._written = torch.zeros(rows, tokens, **whole)
        self._mask = torch.zeros(rows, tokens, dtype=torch.bool, device=device)
        self._logp = torch.zeros(rows, tokens, device=device)
        self._noise = torch.ones(rows, weight.shape[0], device=device)
        self._graph: Any = None
        self.captured = "no: not on a GPU" if device.type != "cuda" else ""

    @torch.no_grad()
    def draw(self, prompts: list[str], generator: torch.Generator) -> Drawn:
        """Draw one completion per prompt.

        Args:
            prompts: at most `rows` prompts.
            generator: random number generator on the model's device.
        """
        if not self.captured:
            self._capture()
        filled = prompts + [prompts[-1]] * (self._rows - len(prompts))
        batch = self._tokenizer(
            filled, return_tensors="pt", padding="max_length", max_length=self._prompt_tokens
        ).to(self._model.device)  # fmt: skip
        self._begin(batch["input_ids"], batch["attention_mask"].bool(), generator)
        for step in range(1, self._tokens):
            self._noise.exponential_(generator=generator)
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()
            if step % CHECK_EVERY == 0 and not bool(self._alive.any()):
                break
        rows = slice(0, len(prompts))
        mask = self._mask[rows].clone()
        attention = torch.cat([batch["attention_mask"][rows], mask.to(batch["attention_mask"])], 1)
        sequences = torch.cat([batch["input_ids"][rows], self._written[rows]], 1)
        return Drawn(batch["input_ids"][rows], sequences, attention, mask, self._logp[rows].clone())

    def _begin(self, ids: Tensor, attended: Tensor, generator: torch.Generator) -> None:
        """Fill the cache with the prompts and draw the first token."""
        positions = (attended.long().cumsum(1) - 1).clamp(min=0)
        count = ids.shape[1]
        own = torch.eye(count, dtype=torch.bool, device=ids.device)  # for padding, so that no softmax row is empty
        seen = torch.zeros(len(ids), 1, count, self._length, dtype=torch.bool, device=ids.device)
        seen[..., :count] = (own.cumsum(1).T.bool() & attended[:, None] | own)[:, None]
        hidden = self._hidden(ids, positions, torch.arange(count, device=ids.device), seen)
        self._visible.zero_()
        self._visible[..., :count] = attended[:, None, None]
        self._position.copy_(positions[:, -1:])
        self._slot.fill_(count - 1)
        self._index.zero_()
        self._alive.fill_(True)
        self._written.fill_(self._tokenizer.pad_token_id)
        self._mask.zero_()
        self._logp.zero_()
        self._noise.exponential_(generator=generator)
        self._pick(hidden[:, -1])

    def _step(self) -> None:
        """Add the last drawn token to the cache and draw the next one; all tensors are changed in place."""
        self._position += 1
        self._slot += 1
        self._index += 1
        self._visible.index_fill_(3, self._slot, True)
        hidden = self._hidden(self._token, self._position, self._slot, self._visible)
        self._pick(hidden[:, -1])

    def _pick(self, hidden: Tensor) -> None:
        """Draw tokens by the Gumbel trick: take the maximum of log-probs minus the logarithm of exponential noise."""
        logp = self._model.get_output_embeddings()(hidden).float().log_softmax(-1)
        drawn = (logp - self._noise.log()).argmax(-1, keepdim=True)
        self._mask.index_copy_(1, self._index, self._alive)
        self._logp.index_copy_(1, self._index, logp.gather(1, drawn) * self._alive)
        drawn = drawn.masked_fill(~self._alive, self._tokenizer.pad_token_id)
        self._written.index_copy_(1, self._index, drawn)
        self._token.copy_(drawn)
        self._alive.logical_and_(drawn != self._tokenizer.eos_token_id)

    def _hidden(self, ids: Tensor, positions: Tensor, slots: Tensor, visible: Tensor) -> Tensor:
        """Return the (B, S, D) last hidden states, and write keys and values to their slots of the cache."""
        base = self._model.base_model
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]
        x = base.embed_tokens(ids)
        for layer, keys, values in zip(base.layers, self._keys, self._values, strict=True):
            normed, attention = _normed(layer.input_layernorm, x), layer.self_attn
            query, key, value = (
                projection(normed).unflatten(-1, (-1, self._width)).transpose(1, 2)
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            keys.index_copy_(2, slots, self._repeated(_rotated(key, cos, sin)))
            values.index_copy_(2, slots, self._repeated(value))
            mixed = functional.scaled_dot_product_attention(_rotated(query, cos, sin), keys, values, visible)
            x = x + attention.o_proj(mixed.transpose(1, 2).flatten(2))
            x = x + layer.mlp(_normed(layer.post_attention_layernorm, x))
        return _normed(base.norm, x)

    def _repeated(self, heads: Tensor) -> Tensor:
        return heads.repeat_interleave(self._groups, 1)

    def _capture(self) -> None:
        """Record one step. The present state is overwritten; `_begin` sets all of it later."""
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UP):
                    self._scratch()
                    self._step()
            torch.cuda.current_stream().wait_stream(side)
            self._scratch()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # data loaders may pin memory now
                self._step()
            self._graph, self.captured = graph, "yes"
        except RuntimeError as error:
            self.captured = f"no: {str(error).splitlines()[0]}"

    def _scratch(self) -> None:
        self._slot.zero_()
        self._index.fill_(-1)
        self._position.zero_()


def _normed(norm: Any, x: Tensor) -> Tensor:
    return functional.rms_norm(x, x.shape[-1:], norm.weight, norm.variance_epsilon)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
