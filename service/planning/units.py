"""Figures as people read them."""

from __future__ import annotations

_SCALES = [(1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M")]
_SIZES = {"bytes": "B", "FLOP": "FLOP", "FLOP/s": "FLOP/s"}


def readable(value: float, unit: str) -> str:
    if unit in _SIZES:
        scale, prefix = next(((scale, prefix) for scale, prefix in _SCALES if value >= scale), (1.0, ""))
        return f"{_digits(value / scale)} {prefix}{_SIZES[unit]}"
    if unit == "s":
        return f"{_digits(value)} s" if value >= 1 else f"{_digits(value * 1000)} ms"
    if unit == "share":
        return f"{value:.0%}"
    return _digits(value)


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"
