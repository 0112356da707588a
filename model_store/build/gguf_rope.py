"""The RoPE of a GGUF file: llama.cpp's metadata and tensors become transformers' `rope_parameters`.

transformers itself reads only the base frequency. This module reproduces everything else that changes RoPE, or refuses
it by name.
"""

from __future__ import annotations

from math import log
from typing import Any

# Tensors with a divisor for each frequency: for rows of any length, or for rows within and beyond the original context.
_FREQUENCIES, _SHORT, _LONG = "rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight"
ROPE_TENSORS = (_FREQUENCIES, _SHORT, _LONG)


def gguf_architecture(reader: Any) -> str:
    """llama.cpp's name for the model's family."""
    return str(reader.fields["general.architecture"].contents())


def set_rope(config: Any, reader: Any) -> None:
    """Give the configuration that transformers made of a GGUF file the RoPE that the file describes.

    Raises:
        ValueError: naming the metadata that can't be reproduced.
    """
    from gguf import dequantize

    prefix = f"{gguf_architecture(reader)}.rope."
    given = {
        name.removeprefix(prefix): field.contents() for name, field in reader.fields.items() if name.startswith(prefix)
    }
    by_layer = "full_attention" in config.rope_parameters
    parameters = config.rope_parameters["full_attention"] if by_layer else config.rope_parameters
    within_window = config.rope_parameters.get("sliding_attention", parameters)
    head_width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    base = given.pop("freq_base", parameters["rope_theta"])
    if by_layer:
        within_window["rope_theta"] = given.pop("freq_base_swa", within_window["rope_theta"])
    # Metadata that changes nothing in llama.cpp as long as it has this value (None: any value).
    expected = {
        "scaling.finetuned": None,
        "scaling.alpha": 0,
        "scaling.yarn_log_multiplier": 0,
        "scaling.yarn_ext_factor": 1,
        "scaling.yarn_attn_factor": 1,
        "dimension_count": head_width,
        "dimension_count_swa": head_width,
        "freq_base_swa": base,
    }
    found = [tensor for tensor in reader.tensors if tensor.name in ROPE_TENSORS]
    divisors = {tensor.name: dequantize(tensor.data, tensor.tensor_type).tolist() for tensor in found}
    scaled = _scaled(given, divisors, config.max_position_embeddings)
    for name, value in given.items():
        if name not in expected or expected[name] not in (None, value):
            raise ValueError(f"its metadata {prefix}{name}, {value!r}, moves RoPE in a way that is not reproduced")
    # If layers with a sliding window have their own base, llama.cpp does not scale RoPE in them.
    parameters.update(rope_theta=base, **scaled)
    if "original_max_position_embeddings" in scaled and hasattr(config, "original_max_position_embeddings"):
        config.original_max_position_embeddings = scaled["original_max_position_embeddings"]


def _scaled(given: dict[str, Any], divisors: dict[str, list[float]], positions: int) -> dict[str, Any]:
    """The scaling as `rope_parameters`; takes the metadata that they reproduce out of `given`."""
    kind = given.pop("scaling.type", "linear")
    factor = given.pop("scaling.factor", 0) or given.pop("scale_linear", 0) or 1.0
    original = given.pop("scaling.original_context_length", positions)
    if kind == "none":
        factor = 1.0
    if divisors:
        if factor != 1 or divisors.keys() not in ({_FREQUENCIES}, {_SHORT, _LONG}):
            raise ValueError(f"{' and '.join(divisors)} with RoPE scaled by {factor} is not reproduced")
        if _FREQUENCIES in divisors:
            original = positions
        return {
            "rope_type": "longrope",
            "factor": 1.0,
            "short_factor": divisors.get(_SHORT) or divisors[_FREQUENCIES],
            "long_factor": divisors.get(_LONG) or divisors[_FREQUENCIES],
            "original_max_position_embeddings": original,
            "attention_factor": given.pop("scaling.attn_factor", 1.0),
        }
    if kind == "yarn" and factor != 1:
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "attention_factor": given.pop("scaling.attn_factor", 1.0) * (1 + 0.1 * log(factor)),
            "beta_fast": given.pop("scaling.yarn_beta_fast", 32.0),
            "beta_slow": given.pop("scaling.yarn_beta_slow", 1.0),
        }
    if given.get("scaling.attn_factor") == 1:
        del given["scaling.attn_factor"]
    if factor == 1:
        return {}
    if kind != "linear":
        raise ValueError(f"RoPE scaling of the type {kind!r} by {factor} is not reproduced")
    return {"rope_type": "linear", "factor": factor}
