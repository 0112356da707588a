"""How many tokens a batch may have after some have run out of device memory: a pure policy.

A batch that runs out halves it at once, as long as halving can help; many in a row that do not give some of it back,
step by step, so that memory which something else took for a while is used again. (The additive-increase,
multiplicative-decrease rule of TCP, for the same reason: what is free can only be found out by trying.) No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Batches in a row without trouble before the next step up, and how many steps lead from nothing to all.
CLEAN_BATCHES = 32
STEPS = 8

# Below this smaller batches save no memory worth the name: the weights and one long text need more.
LEAST_TOKENS = 512


@dataclass
class MemoryBudget:
    """The token budget in use, of `most` tokens at first."""

    most: int
    tokens: int = field(init=False)
    _clean: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.tokens = self.most

    @property
    def least(self) -> int:
        """It never falls below this."""
        return min(LEAST_TOKENS, self.most)

    def ran_out(self, tokens: int, inputs: int) -> None:
        """A batch of so many tokens and inputs ran out of memory.

        What one input alone needs no budget can lessen, and a batch larger than the budget was put together before it
        was last lessened: neither says anything new.
        """
        self._clean = 0
        if inputs > 1 and tokens <= self.tokens:
            self.tokens = max(tokens // 2, self.least)

    def went_well(self) -> None:
        """A batch had memory enough."""
        if self.tokens == self.most:
            return
        self._clean += 1
        if self._clean == CLEAN_BATCHES:
            self._clean = 0
            self.tokens = min(self.tokens + max(self.most // STEPS, 1), self.most)
