"""A rollout engine whose first samples and whose weights are compared with the model that is trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from reinforcepp.errors import RolloutError
from reinforcepp.rollout.engine import RolloutEngine
from reinforcepp.rollout.self_check import check_samples
from reinforcepp.rollout.weight_sync_check import check_sync
from reinforcepp.runtime.terminal import warn_once
from reinforcepp.types import Completion, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(eq=False)
class CheckedEngine:
    """Owns the rollout engine of a run.

    Attributes:
        engine: generates the completions.
        tokenizer: the policy's tokenizer.
        fallback: starts the engine that replaces one whose samples don't match the model; None if the user chose the engine.
    """

    engine: RolloutEngine
    tokenizer: PreTrainedTokenizerBase
    fallback: Callable[[], RolloutEngine] | None = None
    _weights_checked: bool = field(default=False, init=False)
    _samples_checked: bool = field(default=False, init=False)

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        model: PreTrainedModel,
        engine_for: Callable[[PreTrainedModel], RolloutEngine],
    ) -> list[Completion]:
        """Return completions of ``prompts``; those of the first batch are checked.

        Args:
            prompts: this rank's prompts. A rank without prompts calls the engine too, because all ranks can share it.
            sampling: the sampling parameters.
            model: the model whose weights the engine has.
            engine_for: returns the engine, or a copy of it that generates with the given model.

        Raises:
            RolloutError: the engine's samples don't match the model, and the user chose this engine.
        """
        try:
            completions = engine_for(model).generate(prompts, sampling)
            if not self._samples_checked and completions:
                check_samples(self.engine, model, completions, sampling)
                self._samples_checked = True
        except RolloutError as error:
            if self._samples_checked or self.fallback is None:
                raise
            self.engine.close()
            self.engine, self.fallback = self.fallback(), None
            warn_once(f"Completions come from {self.engine.name}: {error}")
            return self.generate(prompts, sampling, model, engine_for)
        return completions

    def load_weights(self, model: PreTrainedModel, *, check: bool) -> None:
        """Load weights into the engine; the first time, and if ``check``, check that it generates with them."""
        self.engine.load_weights(model)
        if (check or not self._weights_checked) and not self.engine.shares_trainer_forward:
            check_sync(self.engine, model, self.tokenizer)
        self._weights_checked = True
