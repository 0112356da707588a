"""The bounds on a request: each just met, and just passed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from service.embedding import bounds
from service.embedding.instructions import Chosen
from service.embedding.requests import EmbedInput
from service.errors import ContextLengthExceeded, InvalidRequest, TooManyInputs

Check = Callable[[], None]


def texts(*given: str | list[int]) -> list[EmbedInput]:
    return [EmbedInput(text) for text in given]


def instructed(text: str) -> list[EmbedInput]:
    return [EmbedInput("a", Chosen(text))]


# Every bound at its last allowed value.
MET: dict[str, Check] = {
    "the fewest inputs": lambda: bounds.check_count(1, 3, "texts"),
    "the most inputs": lambda: bounds.check_count(3, 3, "texts"),
    "one character is not empty": lambda: bounds.check_not_empty(texts("a", " b\n"), "texts"),
    "one id is not empty": lambda: bounds.check_not_empty(texts([0]), "texts"),
    "the longest text": lambda: bounds.check_characters(texts("abc"), 3, "texts"),
    "the longest instruction": lambda: bounds.check_characters(instructed("abc"), 3, "texts"),
    "ids have no characters": lambda: bounds.check_characters(texts([1, 2, 3, 4]), 3, "texts"),
    "all dimensions by default": lambda: bounds.check_dimensions(None, 8, "dims"),
    "the fewest dimensions": lambda: bounds.check_dimensions(1, 8, "dims"),
    "the most dimensions": lambda: bounds.check_dimensions(8, 8, "dims"),
    "one of the widths": lambda: bounds.check_dimensions(2, 8, "dims", (2, 4, 8)),
    "all dimensions beside widths": lambda: bounds.check_dimensions(None, 8, "dims", (2, 4, 8)),
    "the most tokens of an input": lambda: bounds.check_length(5, 5, 2),
    "the most characters that may fit": lambda: bounds.check_context(texts("a" * 20), 5, 4, 1, "texts"),
    "white space at the end takes no token": lambda: bounds.check_context(texts("a" * 20 + " "), 5, 4, 1, "texts"),
    "the most ids that fit": lambda: bounds.check_context(texts([0] * 5), 5, 4, 1, "texts"),
    "unknown characters a token": lambda: bounds.check_context(texts("a" * 999), 5, None, 1, "texts"),
    "ids of unknown length": lambda: bounds.check_context(texts([0] * 999), 5, 4, None, "texts"),
    "the most tokens of a request": lambda: bounds.check_tokens(9, 9),
    "the most interactive tokens": lambda: bounds.check_interactive(20, 20),
    "the most numbers": lambda: bounds.check_numbers(1 << 26),
    "spans that cover all 16 times": lambda: bounds.check_coverage([(0, 5)] * 16, 5),
}

# Every bound at the first value past it: the check, the error's class, code and param, and the bound in its message.
PASSED: dict[str, tuple[Check, type[InvalidRequest], str, str, str]] = {
    "no inputs": (
        lambda: bounds.check_count(0, 3, "texts"),
        InvalidRequest,
        "empty_input",
        "texts",
        "texts is empty: send at least one",
    ),
    "too many inputs": (
        lambda: bounds.check_count(4, 3, "texts"),
        TooManyInputs,
        "too_many_inputs",
        "texts",
        "4 inputs in one request: at most 3 are taken",
    ),
    "an empty text": (
        lambda: bounds.check_not_empty(texts("a", ""), "texts"),
        InvalidRequest,
        "empty_input",
        "texts",
        "the input at index 1 is empty",
    ),
    "a text of white space": (
        lambda: bounds.check_not_empty(texts(" \t\n"), "texts"),
        InvalidRequest,
        "empty_input",
        "texts",
        "the input at index 0 is empty",
    ),
    "no ids": (
        lambda: bounds.check_not_empty(texts("a", [7], []), "texts"),
        InvalidRequest,
        "empty_input",
        "texts",
        "the input at index 2 is empty",
    ),
    "a text with too many characters": (
        lambda: bounds.check_characters(texts("a", "abcd"), 3, "texts"),
        InvalidRequest,
        "request_too_large",
        "texts",
        "the texts of index 1 has 4 characters: at most 3 are taken",
    ),
    "an instruction with too many characters": (
        lambda: bounds.check_characters(instructed("abcd"), 3, "texts"),
        InvalidRequest,
        "request_too_large",
        "instruction",
        "the instruction of index 0 has 4 characters: at most 3 are taken",
    ),
    "no dimensions": (
        lambda: bounds.check_dimensions(0, 8, "dims"),
        InvalidRequest,
        "invalid_dimensions",
        "dims",
        "dims is 0: this model has 1 to 8",
    ),
    "too many dimensions": (
        lambda: bounds.check_dimensions(9, 8, "dims"),
        InvalidRequest,
        "invalid_dimensions",
        "dims",
        "dims is 9: this model has 1 to 8",
    ),
    "none of the widths": (
        lambda: bounds.check_dimensions(3, 8, "dims", (2, 4, 8)),
        InvalidRequest,
        "invalid_dimensions",
        "dims",
        "dims is 3: this model's vectors are meant to have 2, 4, 8 dimensions (the setting LLM2VEC_OTHER_WIDTHS)",
    ),
    "above all widths": (
        lambda: bounds.check_dimensions(9, 8, "dims", (2, 4, 8)),
        InvalidRequest,
        "invalid_dimensions",
        "dims",
        "dims is 9: this model's vectors are meant to have 2, 4, 8 dimensions (the setting LLM2VEC_OTHER_WIDTHS)",
    ),
    "too many tokens in an input": (
        lambda: bounds.check_length(6, 5, 2, "texts"),
        ContextLengthExceeded,
        "context_length_exceeded",
        "texts",
        "maximum context length is 5 tokens, however you requested 6 tokens (input index 2).",
    ),
    "too many characters to fit": (
        lambda: bounds.check_context(texts("a", "a" * 21), 5, 4, 1, "texts"),
        ContextLengthExceeded,
        "context_length_exceeded",
        "texts",
        "maximum context length is 5 tokens, however you requested at least 6 tokens (input index 1).",
    ),
    "too many ids to fit": (
        lambda: bounds.check_context(texts([0] * 6), 5, 4, 1, "texts"),
        ContextLengthExceeded,
        "context_length_exceeded",
        "texts",
        "maximum context length is 5 tokens, however you requested at least 6 tokens (input index 0).",
    ),
    "too many tokens in a request": (
        lambda: bounds.check_tokens(10, 9),
        InvalidRequest,
        "request_too_large",
        "input",
        "10 tokens in one request: at most 9 are taken",
    ),
    "too many interactive tokens": (
        lambda: bounds.check_interactive(21, 20),
        InvalidRequest,
        "request_too_large",
        "priority",
        "21 tokens in a request with priority interactive: at most 20, half a batch, are taken so",
    ),
    "too many numbers": (
        lambda: bounds.check_numbers((1 << 26) + 1),
        InvalidRequest,
        "request_too_large",
        "input",
        "the answer would have 67108865 numbers, of at most 67108864",
    ),
    "spans that overlap too often": (
        lambda: bounds.check_coverage([*[(0, 5)] * 16, (4, 5)], 5),
        InvalidRequest,
        "request_too_large",
        "spans",
        "the spans hold 81 tokens together, of a text of 5: at most 16 times as many are taken",
    ),
}


@pytest.mark.parametrize("case", MET)
def test_a_bound_that_is_just_met_refuses_nothing(case: str) -> None:
    MET[case]()


@pytest.mark.parametrize("case", PASSED)
def test_a_bound_that_is_just_passed_refuses_with_its_code_and_param(case: str) -> None:
    check, kind, code, param, message = PASSED[case]
    with pytest.raises(InvalidRequest) as refused:
        check()
    assert type(refused.value) is kind
    assert (refused.value.code, refused.value.param) == (code, param)
    assert message in str(refused.value)
