"""How many tokens an input and a batch may have, on one kind of device."""

from __future__ import annotations

from model_store.manifest import Manifest
from service.batching.cost_model import CostModel
from service.batching.scheduling import BatchLimits
from service.errors import StartupError
from service.settings import BATCH_SECONDS, DEFAULT_MAX_INPUT_TOKENS, PREFIX, TOKEN_BUDGET, Settings


class Limits:
    """The token limits of the settings, with the defaults for one model and device type filled in.

    Raises:
        StartupError: for limits that contradict each other or the model, naming what to change.
    """

    def __init__(self, settings: Settings, manifest: Manifest, device_type: str) -> None:
        reads = manifest.max_positions
        self.max_input_tokens = settings.max_input_tokens or min(DEFAULT_MAX_INPUT_TOKENS, reads)
        if self.max_input_tokens > reads:
            raise StartupError(
                f"max_input_tokens is {self.max_input_tokens}, but {manifest.name} reads {reads} tokens: "
                f"lower {PREFIX}MAX_INPUT_TOKENS to at most {reads}"
            )
        self.token_budget = settings.token_budget or max(TOKEN_BUDGET[device_type], self.max_input_tokens)
        if self.token_budget < self.max_input_tokens:
            raise StartupError(
                f"the model reads {self.max_input_tokens} tokens but token_budget is {self.token_budget}: raise "
                f"{PREFIX}TOKEN_BUDGET to at least {self.max_input_tokens} or lower {PREFIX}MAX_INPUT_TOKENS"
            )
        if settings.batch_tokens is not None and settings.batch_tokens > self.token_budget:
            raise StartupError(
                f"batch_tokens is {settings.batch_tokens} but token_budget is {self.token_budget}: lower "
                f"{PREFIX}BATCH_TOKENS or raise {PREFIX}TOKEN_BUDGET to at least {settings.batch_tokens}"
            )
        self.batch_tokens = settings.batch_tokens  # None: the calibration finds it
        self._batch_seconds = settings.batch_seconds or BATCH_SECONDS[device_type]

    def for_batches(self, cost: CostModel) -> BatchLimits:
        full = self.batch_tokens or cost.batch_tokens(self._batch_seconds, self.token_budget)
        return BatchLimits(full, self.token_budget)
