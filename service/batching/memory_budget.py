"""How many tokens a batch may have after batches have run out of device memory: a pure policy.

A batch that runs out of memory halves the budget at once, as long as halving can help. Many good batches in a row raise
it again, step by step, so that memory that another program held for a while is used again. (The additive-increase,
multiplicative-decrease rule of TCP, for the same reason: only trying shows how much is free.) No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# Good batches in a row before the next step up, and the number of steps from zero to the whole budget.
CLEAN_BATCHES = 32
STEPS = 8

# Below this size smaller batches save too little memory: the weights and one long text need more.
LEAST_TOKENS = 512


@dataclass
class MemoryBudget:
    """The token budget in use; it begins at `most` tokens."""

    most: int
    tokens: int = field(init=False)
    _clean: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.tokens = self.most

    def ran_out(self, tokens: int, inputs: int) -> None:
        """Note that a batch of this many tokens and inputs ran out of memory.

        Two kinds of batch tell nothing new: no budget lowers the need of a single input, and a batch larger than the
        budget was composed before the budget was last lowered.
        """
        self._clean = 0
        if inputs > 1 and tokens <= self.tokens:
            self.tokens = max(tokens // 2, min(LEAST_TOKENS, self.most))

    def went_well(self) -> None:
        if self.tokens == self.most:
            return
        self._clean += 1
        if self._clean == CLEAN_BATCHES:
            self._clean = 0
            self.tokens = min(self.tokens + max(self.most // STEPS, 1), self.most)
