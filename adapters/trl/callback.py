"""The trainer's public events: receipts at the start, a check before each update, beta after it, and checkpoints."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from kl_plugins.adapters.checkpoints import record, resumed
from kl_plugins.adapters.receipts import announce
from kl_plugins.adapters.trl.ranks import exchange
from kl_plugins.adapters.trl.session import Session

STATE_KEY = "kl_plugins"
"""Where spec and controller lie in ``trainer_state.json``, among the states of callbacks."""


class KLCallback(TrainerCallback):  # type: ignore[misc]
    """Drives one :class:`Session` from the trainer's events."""

    def __init__(self, session: Session) -> None:
        """Take over a session."""
        self.session = session

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log and exchange receipts, and go on from the checkpoint's beta.

        Raises:
            SpecChangedError: the checkpoint was written under another spec.
        """
        receipt = self.session.receipt()
        announce(receipt)
        exchange(receipt)
        if state.global_step > 0:
            saved = resumed(state.stateful_callbacks.get(STATE_KEY), self.session.spec)
            self.session.controller.restore(saved)
        else:
            self.session.controller.restart()
        self._save(state)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop before an update that would go without the regulariser.

        Raises:
            RuntimeError: TRL went around a hook.
        """
        needed = {"loss", "rollout"} if self.session.is_score else {"loss"}
        missing = needed - self.session.passed
        if missing:
            raise RuntimeError(
                f"kl-plugins: {self.session.spec} was not applied before update {state.global_step + 1}: the trainer "
                f"never went through TRL's own {' and '.join(sorted(missing))} code. Attach before training and detach "
                "after it; a subclass has to call super() in the methods it overrides"
            )
        self.session.passed.discard("loss")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Advance the controller, once per optimizer step."""
        accelerator = self.session.accelerator
        self.session.controller.step(lambda sums: accelerator.reduce(sums, reduction="sum"))
        self._save(state)

    def _save(self, state: Any) -> None:
        # The trainer writes this dict into every checkpoint. Restoring through transformers' own callback mechanism
        # would need a flag that is off by default, so on_train_begin reads it back itself.
        controller = self.session.controller
        saved = None if controller.schedule is None else controller.saved()
        state.stateful_callbacks[STATE_KEY] = record(self.session.spec, saved)
