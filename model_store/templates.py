"""The text that LLM2Vec puts around a text before tokenizing it, by base model.

The official library chooses by the exact `_name_or_path` in the raw config.json of the MNTP repository (llm2vec 0.2.3,
`LLM2Vec.prepare_for_tokenization`). A name that is not in the table gets no template.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from model_store.architectures import Architecture

# How the pooled span is counted where instructions are left out of it. `text`: it has as many tokens as text and suffix
# have by themselves (LLM2Vec). `prompt`: it begins after as many tokens as BOS and what stands before the text have by
# themselves, and is the whole row if nothing stands there (GritLM, sentence-transformers).
SpanCount = Literal["text", "prompt"]

# Where a template's `lead` puts the instruction, and the lead that is the instruction as it was given.
_INSTRUCTION = "{instruction}"
VERBATIM = _INSTRUCTION


@dataclass(frozen=True)
class Template:
    """`prefix` + `lead` + text + `trail` + `suffix`; without an instruction, `prefix` + `bare_lead` + text + `suffix`.

    With `strip`, white space at both ends of lead + text is removed. The default `lead` is LLM2Vec's.
    """

    prefix: str = ""
    suffix: str = ""
    strip: bool = False
    lead: str = f"{_INSTRUCTION} "
    bare_lead: str = ""
    trail: str = ""

    def __post_init__(self) -> None:
        if self.lead.count(_INSTRUCTION) != 1:
            raise ValueError(f"lead must hold {_INSTRUCTION} once, where the instruction stands")

    def after_text(self, instruction: str) -> str:
        """What stands behind the text."""
        return (self.trail if instruction else "") + self.suffix

    def before_text(self, instruction: str) -> str:
        """What stands between prefix and text.

        An instruction loses white space at both ends, unless it is the whole lead. White space alone becomes what the
        lead puts beside it, or nothing if the template strips.
        """
        if not instruction:
            return self.bare_lead
        before = self.lead.replace(_INSTRUCTION, instruction if self.lead == VERBATIM else instruction.strip())
        return before.lstrip() if self.strip else before


_INST = Template("[INST] ", " [/INST]", strip=True)
_CHATML = Template("<|im_start|>user\n", "<|im_end|>", strip=True)

TEMPLATES = {
    "meta-llama/Meta-Llama-3-8B-Instruct": Template(
        "<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>", strip=True
    ),
    "mistralai/Mistral-7B-Instruct-v0.2": _INST,
    "meta-llama/Llama-2-7b-chat-hf": _INST,
    "Qwen/Qwen2-1.5B-Instruct": _CHATML,
    "Qwen/Qwen2-7B-Instruct": _CHATML,
    "google/gemma-2-9b-it": Template("<bos><start_of_turn>user\n", "<end_of_turn>", strip=True),
}

# For these bases the official library does not append the text that eos_token pooling asks for.
_WITHOUT_EOS_TEXT = ("meta-llama/Meta-Llama-3-8B-Instruct",)
_EOS_TEXT = {"meta-llama/Meta-Llama-3-8B": "<|end_of_text|>"}


def template_for(name_or_path: str, pooling: str, architecture: Architecture) -> Template:
    """The template for a base named `name_or_path`, with the end-of-text mark that `eos_token` pools."""
    template = TEMPLATES.get(name_or_path, Template())
    if pooling != "eos_token" or name_or_path in _WITHOUT_EOS_TEXT:
        return template
    eos_text = _EOS_TEXT.get(name_or_path, architecture.eos_text)
    return replace(template, suffix=template.suffix + eos_text, strip=True)
