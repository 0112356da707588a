"""The form of the encoder that an adapter is trained for: the configuration's, else that of its base's own files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model_store.architectures import Attention
from model_store.build.description import description_of
from model_store.build.sources import Source
from model_store.pooling_modes import PoolingMode
from model_store.recipe import ENCODER_DEFAULTS
from model_store.templates import SpanCount, Template
from model_store.training.config import MntpConfig, TrainingConfig, TrainingConfigError


@dataclass(frozen=True)
class Form:
    """How the encoder attends, pools and places instructions; without a `template` the base's name chooses it.

    `widths` are those that vectors are trained to be cut to.
    """

    attention: Attention
    pooling: PoolingMode
    skip_instruction: bool
    span_count: SpanCount
    template: Template | None
    widths: tuple[int, ...] = ()


def form_of(config: TrainingConfig, base: Source, before: Sequence[Source]) -> Form:
    """The form to train, which `build` gives to the encoder of the base and the adapters.

    Raises:
        TrainingConfigError: if the base's files describe an encoder that can't be trained so, or without being asked.
        DescriptionError, CheckpointError: as `description_of`.
    """
    asked: Attention | None = None
    if config.bidirectional is not None:
        asked = "bidirectional" if config.bidirectional else "causal"
    described = description_of([*before[-1:], base], asked)
    if described.head:
        raise TrainingConfigError(
            f"{config.base} has linear layers behind pooling, which training would leave out: give a base without them"
        )
    fields = {**ENCODER_DEFAULTS, "template": None, **described.fields}
    if isinstance(config, MntpConfig) and asked is None and fields["attention"] == "causal":
        raise TrainingConfigError(
            f"the files of {config.base} say that it attends causally, and MNTP teaches a decoder to attend in both "
            "directions: set bidirectional true, or false for MNTP with causal attention"
        )
    pooling = None if isinstance(config, MntpConfig) else config.pooling_mode
    return Form(
        attention=asked or fields["attention"],
        pooling=pooling or fields["pooling"],
        skip_instruction=fields["skip_instruction"],
        span_count=fields["span_count"],
        template=fields["template"],
        widths=() if isinstance(config, MntpConfig) else tuple(config.matryoshka_dims or ()),
    )
