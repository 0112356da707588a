"""Checks that an encoder gives the right vectors: against its own at build time, and against slower ways.

A few texts and their vectors are stored with the encoder. At build time the same texts show whether packed attention
is right for the model at all: transformers' own padded forward pass, in the same direction, must agree.

Every function that checks raises `SelfTestError` if vectors differ by more than rounding explains.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModel

from model_store.build.calibration import write_calibration
from model_store.encoder.attention import AttentionError, newer_flash
from model_store.encoder.devices import DeviceError
from model_store.encoder.encoder import Encoder
from model_store.encoder.packing import PackedBatch
from model_store.encoder.pipeline import Pipeline
from model_store.encoder.pooling import Wanted
from model_store.errors import UserError
from model_store.text.tokenizer import TextTokenizer, TokenizedText

# B texts, S tokens of the longest text, D width

SELF_TEST_FILE = "self_test.json"

# (instruction, text); the third is long enough to run past a window of a few hundred tokens.
CASES = (
    ("", "A plane is taking off."),
    ("Given a web search query, retrieve relevant passages that answer the query:", "how much protein a day"),
    ("", "The river ran past the mill, and the mill ground the corn of the valley. " * 45),
    ("Retrieve semantically similar text:", "Größe und Maß – 東京 🙂"),
)

# The 1 − cosine that rounding explains: bfloat16 keeps 8 bits, and kernels and CPUs order their sums differently.
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3, torch.float32: 1e-5}

# Between two ways of computing the same 8-bit layers: a last bit decides to which of two steps a number is rounded. For
# the demo's random tokens torch.compile moves int8 vectors by up to 1.5e-2, and fp8 vectors by 3e-3.
_QUANTIZED_TOLERANCE = 5e-2


def _text_of(length: int) -> TokenizedText:
    """A text of token ids that every vocabulary has."""
    return TokenizedText([(7 * i + length) % 100 + 3 for i in range(length)], 0)


_CHECKED = [_text_of(length) for length in (3, 24, 9)]

# For equal bits: each of these is computed alone, and with all the others and as many of other lengths.
_ALONE = (1, 2, 5, 16, 24, 40, 130)
_BESIDE = (300, *range(7, 64, 2))


class SelfTestError(UserError):
    """The encoder gives other vectors than it should."""


def write_self_test(folder: Path, as_published: Path | None = None) -> None:
    """Compute the cases with the encoder in `folder`, in the dtype it is stored in, and store the vectors there.

    The same texts serve to calibrate int8.

    It runs on the GPU if there is one with room for the encoder that computes in its dtype, else on the CPU.

    With `as_published`, the folder of a checkpoint that is an encoder already, the same tokens also go through what
    transformers makes of that checkpoint by itself.

    Raises:
        SelfTestError: if packed attention does not agree with transformers' own forward for this model.
    """
    encoder, rows = _load(folder)
    vectors = _packed_vectors(encoder, rows)
    own = _padded_vectors(encoder, rows)
    _refuse_other_opinion(vectors, own, "transformers' own", encoder)
    write_calibration(encoder, rows, folder)
    if as_published:
        encoder.model.to("meta")  # makes room for the other model
        options = {"dtype": encoder.dtype, "device_map": encoder.device if encoder.device.type == "cuda" else None}
        published = AutoModel.from_pretrained(as_published, local_files_only=True, trust_remote_code=False, **options)
        theirs = _padded_vectors(replace(encoder, model=published.eval()), rows)
        _refuse_other_opinion(vectors, theirs, "that of the published checkpoint", encoder)
    document = {"cases": CASES, "vectors": vectors.tolist()}
    (folder / SELF_TEST_FILE).write_text(json.dumps(document, ensure_ascii=False))


def _refuse_other_opinion(vectors: Tensor, others: Tensor, whose: str, encoder: Encoder) -> None:
    difference = largest_difference(vectors, others)
    if not difference <= TOLERANCE[encoder.dtype]:
        raise SelfTestError(
            f"packed {encoder.manifest.attention} attention of this {encoder.manifest.model_type} differs from "
            f"{whose} (1 − cosine up to {difference:.1e}): this model can't be served"
        )


def self_test_difference(folder: Path) -> tuple[float, float]:
    """Compute the stored cases again; returns the largest 1 − cosine to the stored vectors, and the largest allowed."""
    document = json.loads((folder / SELF_TEST_FILE).read_text())
    encoder, rows = _load(folder, document["cases"])
    stored = torch.tensor(document["vectors"])
    return largest_difference(_packed_vectors(encoder, rows), stored), TOLERANCE[encoder.dtype]


def largest_difference(left: Tensor, right: Tensor) -> float:
    """The largest 1 − cosine between vectors in the same place; both are (B, D)."""
    return float((1 - torch.cosine_similarity(left.double(), right.double(), dim=-1)).max())


def check_attention(encoder: Encoder) -> None:
    """Compare a tiny packed forward with transformers' own on the encoder's device, before it serves.

    The comparison finds a text that changes its neighbour's vector, a first token that does not see the last, a layer
    that never calls attention, and a kernel that is wrong on this device.
    """
    what = f"attention kernel {encoder.kernel} on {encoder.device}"
    _refuse_other(encoder, _padded_vectors(encoder, _CHECKED), what)


def pack_checked(encoder: Encoder, equal_bits: bool) -> None:
    """Do as `Encoder.pack_weights`, and check that the vectors stay the same."""
    before = _packed_vectors(encoder, _CHECKED)
    encoder.pack_weights(equal_bits)
    _refuse_other(encoder, before, "products of packed weights")


def upgrade_flash_checked(encoder: Encoder) -> str:
    """Put a later FlashAttention in the place of torch's own, if one is installed and gives the same vectors.

    Returns its name, or "" if torch's own kernel stays.
    """
    if encoder.kernel != "torch-flash":
        return ""
    before = _packed_vectors(encoder, _CHECKED)
    for name in newer_flash(encoder.device):
        try:
            torch.nn.attention.activate_flash_attention_impl(name)
            _refuse_other(encoder, before, name)
        except Exception:  # not installed, not for this GPU, or wrong for these heads: torch's own kernel serves
            torch.nn.attention.restore_flash_attention_impl(_raise_warn=False)
        else:
            return name
    return ""


def compile_checked(encoder: Encoder) -> None:
    """Compile the layers, and check that the vectors stay the same; after any error the layers are as before."""
    before = _packed_vectors(encoder, _CHECKED)
    encoder.compile_layers()
    try:
        _refuse_other(encoder, before, "torch.compile")
    except BaseException:
        encoder.uncompile_layers()
        raise


def check_equal_bits(encoder: Encoder) -> None:
    """Check that texts have the same bits alone and among others."""
    most = encoder.manifest.max_positions
    texts, others = ([_text_of(min(length, most)) for length in lengths] for lengths in (_ALONE, _BESIDE))
    among_others = _packed_vectors(encoder, [*others, *texts])[len(others) :]
    for text, expected in zip(texts, among_others, strict=True):
        if not torch.equal(_packed_vectors(encoder, [text])[0], expected):
            raise SelfTestError(
                f"on this {encoder.device.type.upper()} a text has other bits alone than among "
                "others, even by products of a fixed number of rows: leave LLM2VEC_EQUAL_BITS out"
            )


def check_same_vectors(plain: Pipeline, faster: Pipeline) -> None:
    """Check that each captured graph gives the vectors of the pipeline without graphs."""
    wanted = [Wanted(plain.encoder.manifest.width)] * len(_CHECKED)
    expected = torch.from_numpy(plain.launch(_CHECKED, wanted).wait())
    tokens = sum(map(len, _CHECKED))
    for replay in faster.replays:
        rows = _CHECKED if replay.graph.tokens >= tokens else _CHECKED[:1]
        found = torch.from_numpy(Pipeline(plain.encoder, (replay,)).launch(rows, wanted[: len(rows)]).wait())
        what = f"the forward pass captured for {replay.graph.tokens} tokens"
        _refuse_other(plain.encoder, expected[: len(rows)], what, found)


def _refuse_other(encoder: Encoder, expected: Tensor, what: str, found: Tensor | None = None) -> None:
    """Compare the vectors that are `found`, by default the encoder's present ones of `_CHECKED`."""
    difference = largest_difference(_packed_vectors(encoder, _CHECKED) if found is None else found, expected)
    # Rounding can change the vectors of random tokens more than those of the texts that TOLERANCE was set for.
    allowed = 2 * TOLERANCE[encoder.dtype] if encoder.quantization == "none" else _QUANTIZED_TOLERANCE
    if not difference <= allowed:
        raise SelfTestError(f"{what} gives other vectors for this model (1 − cosine up to {difference:.1e})")


def _load(folder: Path, cases: Sequence[Sequence[str]] = CASES) -> tuple[Encoder, list[TokenizedText]]:
    from model_store.manifest import read_manifest  # needs pydantic, and checks of an encoder in memory do not

    dtype = read_manifest(folder).dtype
    try:
        encoder = Encoder.load(folder, dtype=dtype, attention="auto" if torch.cuda.is_available() else "sdpa")
    except (DeviceError, AttentionError, torch.OutOfMemoryError):
        encoder = Encoder.load(folder, device="cpu", dtype=dtype, attention="sdpa")
    tokenizer = TextTokenizer.load(folder, encoder.manifest)
    rows = tokenizer.encode_batch([text for _, text in cases], [instruction for instruction, _ in cases])
    limit = encoder.manifest.max_positions
    return encoder, [TokenizedText(row.token_ids[:limit], min(row.span_start, limit - 1)) for row in rows]


def _packed_vectors(encoder: Encoder, rows: list[TokenizedText]) -> Tensor:
    return encoder.encode(PackedBatch.pack(rows, encoder.manifest.pooling))


@torch.inference_mode()
def _padded_vectors(encoder: Encoder, rows: list[TokenizedText]) -> Tensor:
    """The slow twin: one padded batch through the decoder with transformers' own masks and eager attention."""
    model = encoder.model
    batch = PackedBatch.pack(rows, encoder.manifest.pooling)
    lengths = [len(row) for row in rows]
    token_ids, weights, mask = (
        torch.nn.utils.rnn.pad_sequence(list(row.split(lengths)), batch_first=True)
        for row in (batch.token_ids, batch.pooling_weights, torch.ones_like(batch.token_ids))
    )
    packed = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        output = model(token_ids.to(encoder.device), attention_mask=mask.to(encoder.device), use_cache=False)
    finally:
        model.set_attn_implementation(packed)
    hidden = output.last_hidden_state.float().cpu()
    pooled = (hidden * weights[..., None]).sum(1) / weights.sum(1)[:, None]
    return encoder.project(pooled.to(encoder.device)).cpu()
