"""CoNLL columns, spans and word vectors; the sentences were written for these tests."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from model_store.evaluation.files import DatasetError
from model_store.evaluation.local import LocalEncoder
from model_store.evaluation.words import Words, read_conll, span_f1
from tests.tiny import build_tiny, tiny_model

CONLL_2000 = "# # B-NP\nAnna NNP B-NP\nruns VBZ B-VP\n\nOn IN B-PP\nMonday NNP B-NP\n"
CONLL_2003 = "-DOCSTART- -X- -X- O\n\nAnna NNP B-NP B-PER\nruns VBZ B-VP O\n"
CONLL_U = (
    "# text = Don't run\n1-2\tDon't\t_\t_\t_\t_\t_\t_\t_\t_\n1\tDo\tdo\tAUX\tVB\t_\t3\taux\t_\t_\n"
    "2\tn't\tnot\tPART\tRB\t_\t3\tadvmod\t_\t_\n3\trun\trun\tVERB\tVB\t_\t0\troot\t_\t_\n3.1\tx\tx\tX\tX\t_\t_\t_\t_\t_\n\n"
)
NUMBERED = "# text = Anna runs\n1\tAnna\tB-PER\t-\t-\n2\truns\tO\t-\t-\n\n"
TWO = "#hashtag\tO\nof 5 %\tO\nAnna\tB-person\n"


@pytest.mark.parametrize(
    ("content", "words", "tags"),
    [
        (
            CONLL_2000,
            [("#", "Anna", "runs"), ("On", "Monday")],
            {"part of speech": ("#", "NNP", "VBZ"), "chunk": ("B-NP", "B-NP", "B-VP")},
        ),
        (
            CONLL_2003,
            [("Anna", "runs")],
            {"part of speech": ("NNP", "VBZ"), "chunk": ("B-NP", "B-VP"), "entity": ("B-PER", "O")},
        ),
        (CONLL_U, [("Do", "n't", "run")], {"part of speech": ("AUX", "PART", "VERB")}),
        (NUMBERED, [("Anna", "runs")], {"entity": ("B-PER", "O")}),
        (TWO, [("#hashtag", "of 5 %", "Anna")], {"tag": ("O", "O", "B-person")}),
    ],
)
def test_the_layouts_are_told_by_their_columns(
    tmp_path: Path, content: str, words: list[tuple[str, ...]], tags: dict[str, tuple[str, ...]]
) -> None:
    # "# # B-NP" at the top of a file can't be told from a comment; anywhere else it can.
    before = "Anna NNP B-NP\n\n" if content is CONLL_2000 else ""
    (tmp_path / "a").write_text(before + content)
    found = read_conll(tmp_path / "a")[1 if before else 0 :]
    assert [sentence.words for sentence in found] == words
    assert found[0].tags == tags


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("Anna NNP B-NP\nruns VBZ\n", "line 2: 2 columns, not 3 as before"),
        ("Anna\n", "line 1: 1 columns, not one of 2, 3, 4, 5, 10"),
        ("\n\n", "holds no sentence"),
    ],
)
def test_a_bad_file_names_the_line(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a").write_text(content)
    with pytest.raises(DatasetError, match=message):
        read_conll(tmp_path / "a")


def test_train_and_test_must_have_the_same_tags(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(CONLL_2000)
    (tmp_path / "b").write_text(NUMBERED)
    with pytest.raises(DatasetError, match=r"a has part of speech, chunk, but .*b has entity"):
        Words(tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("expected", "found", "score"),
    [
        ("B-A I-A O B-B", "B-A I-A O B-B", 1),
        ("B-A I-A O B-B", "B-A O O B-B", 0.5),  # one of two, each way
        ("B-A I-A", "B-A B-A", 0),  # two spans, neither the right one
        ("B-A I-A O I-B", "I-A I-A O B-B", 1),  # I- begins a span where nothing does
        ("B-A I-A I-B", "B-A I-A B-B", 1),  # and where the type changes
        ("B-A O O", "B-A B-A B-A", 0.5),  # precision 1/3, recall 1
        ("O O", "O O", 1),
        ("B-A-B O", "B-A-B O", 1),
    ],
)
def test_span_f1(expected: str, found: str, score: float) -> None:
    assert span_f1([expected.split()], [found.split()]) == pytest.approx(score)


def test_spans_end_with_their_sentence() -> None:
    assert span_f1([["B-A"], ["I-A"]], [["B-A"], ["B-A"]]) == 1


@pytest.mark.parametrize("bos", [True, False])
def test_word_vectors_are_means_of_their_tokens(tmp_path: Path, bos: bool) -> None:
    """One sentence at a time through the base itself, its tokens found by hand."""
    build_tiny(tmp_path / "encoder", bos=bos)
    model = tiny_model("llama", head=True).model
    encoder = LocalEncoder.load(tmp_path / "encoder", (), "cpu", "float32")
    sentences = [["Größe", "and", "mill"], ["river"], ["A", "plane", "is", "taking", "off", "."] * 5]
    found = encoder.embed_words(sentences)
    tokenizer = encoder.tokenizer._tokenizer
    expected: dict[str, list[torch.Tensor]] = {"same_token": [], "next_token": []}
    for words in sentences:
        # Byte-level BPE splits before spaces, so a sentence's tokens are those of its words with the space in front.
        ids = [
            tokenizer.encode(f" {word}" if n else word, add_special_tokens=False).ids for n, word in enumerate(words)
        ]
        row = [1] * bos + [token for word in ids for token in word]
        with torch.inference_mode():
            hidden = model(torch.tensor([row]), use_cache=False, is_causal=False).last_hidden_state[0]
        begin = int(bos)
        for word in ids:
            end = begin + len(word)
            expected["same_token"].append(hidden[begin:end].mean(0))
            expected["next_token"].append(hidden[max(begin - 1, 0) : max(end - 1, 1)].mean(0))
            begin = end
    for setting, vectors in expected.items():
        torch.testing.assert_close(torch.from_numpy(found[setting]), torch.stack(vectors), atol=1e-5, rtol=1e-4)


def test_a_sentence_too_long_is_refused(tmp_path: Path) -> None:
    build_tiny(tmp_path / "encoder")
    encoder = LocalEncoder.load(tmp_path / "encoder", (), "cpu", "float32")
    with pytest.raises(ValueError, match="the model reads 512: leave out 'mill mill"):
        encoder.embed_words([["mill"] * 600])


class OneHot:
    """A word's vector says which word it is; under `blind` it says nothing."""

    def __init__(self, vocabulary: list[str]) -> None:
        self._vocabulary = vocabulary

    def embed_words(self, sentences: Sequence[Sequence[str]]) -> dict[str, NDArray[np.float32]]:
        words = [word for sentence in sentences for word in sentence]
        vectors = np.eye(len(self._vocabulary), dtype=np.float32)[[self._vocabulary.index(word) for word in words]]
        return {"seen": vectors, "blind": np.zeros_like(vectors)}


def test_probes_read_tags_off_vectors(tmp_path: Path) -> None:
    (tmp_path / "train").write_text("Anna B-PER\nruns O\n\nEva B-PER\nsleeps O\nin O\nRome B-LOC\n")
    (tmp_path / "test").write_text("Eva B-PER\nruns O\nin O\nRome B-LOC\n")
    words = Words(tmp_path / "train", tmp_path / "test")
    scores = words.evaluate("m", OneHot(["Anna", "runs", "Eva", "sleeps", "in", "Rome"]))
    assert {(score.metric, score.setting): score.value for score in scores} == {
        ("accuracy", "seen"): 1.0,
        ("span F1", "seen"): 1.0,
        ("accuracy", "blind"): 0.5,  # all O
        ("span F1", "blind"): 0.0,
    }
    assert {score.task for score in scores} == {"words, test, tag"}


def test_the_limit_is_of_training_sentences(tmp_path: Path) -> None:
    (tmp_path / "train").write_text("a X\nb Y\n\nc X\na Y\n")
    (tmp_path / "test").write_text("a X\nb Y\n\nb Y\n")
    asked: list[int] = []

    class Counting(OneHot):
        def embed_words(self, sentences: Sequence[Sequence[str]]) -> dict[str, NDArray[np.float32]]:
            asked.append(len(sentences))
            return super().embed_words(sentences)

    Words(tmp_path / "train", tmp_path / "test", limit=1).evaluate("m", Counting(["a", "b", "c"]))
    assert asked == [1, 2]
