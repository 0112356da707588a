"""Golden fixtures: tiny checkpoints laid out as hub repositories, and the vectors the official library gives for them.

Runs in an environment of its own (`make golden`) with llm2vec 0.2.3 and the transformers it pins, never in the
project's. Everything is seeded, so that two runs on one machine write the same bytes.

The official chain, `LLM2Vec.from_pretrained(mntp, peft_model_name_or_path=second, merge_peft=True)`, is run as its
README has it: transformers follows the MNTP repository's adapter_config.json to the base, the library merges MNTP,
then the second adapter. Only the base's name is swapped for the folder it lies in, in a scratch copy.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch.nn.functional import cosine_similarity, normalize

GOLDEN = Path(__file__).parent / "golden"

MAX_LENGTH = 64
DOC_MAX_LENGTH = 48
WIDTH = 32

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query:"
_CORPUS = [
    INSTRUCTION,
    "how much protein should a female eat in a day and where is it found",
    "a plane is taking off while a man is playing a flute by the river",
    "the river ran past the mill, and the mill ground the corn of the valley",
    "the summit is the highest point of a mountain",
    "a text with leading and trailing spaces, several lines and a special token inside",
    "user",
]
_LONG = (
    "the river ran past the mill and the mill ground the corn of the valley while a man is playing a flute "
    "where the highest point of a mountain is found in a day and a plane is taking off by the river "
)


@dataclass(frozen=True)
class Family:
    """One set of checkpoints. `name` is the `_name_or_path` of the MNTP config.json, which chooses the template."""

    name: str
    tokenizer: str
    model_type: str
    config: dict[str, Any]
    special: str
    layout: str = "safetensors"
    remote_code_beside: bool = True
    adapter_dtype: torch.dtype = torch.float32
    extra_controls: dict[str, dict[str, Any]] = field(default_factory=dict)


_SMALL = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}

# Wavelengths on both sides of, and between, the two that the scaling asks about.
_LLAMA3_ROPE = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "rope_theta": 500.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}

# Where a family with the same model_type has its remote code beside config.json already, config.json names another
# repository's, as hub repositories do too: mypy refuses two modules of one name.
FAMILIES = {
    "llama": Family("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3", "llama", {}, "<|eot_id|>"),
    "llama-rope": Family(
        "meta-llama/Meta-Llama-3.1-8B-Instruct",
        "llama-3",
        "llama",
        _LLAMA3_ROPE,
        "<|eot_id|>",
        remote_code_beside=False,
        extra_controls={"unscaled_rope": {"rope_scaling": None}},
    ),
    "llama-2": Family(
        "meta-llama/Llama-2-7b-chat-hf",
        "llama-2",
        "llama",
        {"num_key_value_heads": 4},
        "</s>",
        layout="bin",
        remote_code_beside=False,
    ),
    "mistral": Family(
        "mistralai/Mistral-7B-Instruct-v0.2",
        "llama-2",
        "mistral",
        {"sliding_window": 8},
        "</s>",
        layout="sharded",
        adapter_dtype=torch.bfloat16,
    ),
    "qwen2": Family("Qwen/Qwen2-1.5B-Instruct", "qwen2", "qwen2", {}, "<|im_end|>"),
    "qwen2-bos": Family("Qwen/Qwen2-0.5B", "qwen2-bos", "qwen2", {}, "<|im_end|>", remote_code_beside=False),
    "gemma": Family(
        "google/gemma-2b",
        "gemma",
        "gemma",
        {"head_dim": 16, "num_key_value_heads": 1, "tie_word_embeddings": True},
        "<eos>",
    ),
}

# The family that also comes merged, and with an adapter trained on the causal-LM wrapper.
_MORE_LAYOUTS = "llama"

_BI_MODEL = {"llama": "LlamaBiModel", "mistral": "MistralBiModel", "qwen2": "Qwen2BiModel", "gemma": "GemmaBiModel"}
_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def inputs(special: str) -> list[dict[str, str]]:
    """What is encoded: {"id", "instruction", "text"} each. No text holds the separator, which the library splits on."""
    unicode = "naïve cafe\u0301 東京 Ελλ 🙂👩\u200d🚀"
    lines = "two lines\nand a third\n\n after a gap\n"
    spaces = "  leading and trailing spaces  "
    return [
        {"id": name, "instruction": instruction, "text": text}
        for name, instruction, text in (
            ("plain", "", "how much protein should a female eat"),
            ("query", INSTRUCTION, "how much protein should a female eat"),
            ("outer_spaces", "", spaces),
            ("outer_spaces_query", INSTRUCTION, spaces),
            ("spaced_instruction", f"  {INSTRUCTION} \n", "summit define"),
            ("blank_instruction", "   ", "summit define"),
            ("inner_spaces", "", "several   spaces    inside a  text"),
            ("lines", "", lines),
            ("lines_query", INSTRUCTION, lines),
            ("unicode", "", unicode),
            ("unicode_query", INSTRUCTION, "naïve 🙂 東"),
            ("special", "", f"a text with {special} inside"),
            ("special_ends_query", INSTRUCTION, f"{special}a special token{special}"),
            ("one_character", "", "a"),
            ("one_character_query", INSTRUCTION, "a"),
            ("punctuation", "", "3.14 is $42 (50%), isn't it? [x] {y} #7 & 2024!"),
            ("over_doc_limit", "", _LONG),
            ("over_doc_limit_query", INSTRUCTION, _LONG),
            ("over_row_limit", "", _LONG * 3),
            ("over_row_limit_query", f"{INSTRUCTION} {INSTRUCTION}", _LONG[:110]),
            ("no_spaces_over_limit", "", "riverandmill" * 12),
        )
    ]


# ---------------------------------------------------------------- tokenizers


def _byte_level(digits: str, merges: int) -> Tokenizer:
    """BPE over bytes with the splitting pattern that Llama 3 and Qwen2 share but for runs of digits."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def _byte_fallback(specials: list[str], unknown: str, merges: int) -> Tokenizer:
    """BPE over characters with "▁" for a space, and bytes for what it has no character for, as SentencePiece's."""
    trained = Tokenizer(models.BPE())
    # Merges must not run over words, which the finished tokenizer does not split.
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    pieces = [*specials, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(
        vocab_size=len(pieces) + 40 + merges, special_tokens=pieces, show_progress=False, initial_alphabet=["▁"]
    )
    trained.train_from_iterator(_CORPUS, trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = Tokenizer(
        models.BPE(
            model["vocab"],
            [tuple(merge.split(" ")) for merge in model["merges"]],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    tokenizer.add_special_tokens([AddedToken(special, normalized=False) for special in specials])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _bos(tokenizer: Tokenizer, token: str) -> Any:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token} $B", special_tokens=[(token, tokenizer.token_to_id(token))]
    )


def make_tokenizer(kind: str) -> Any:
    """A transformers tokenizer (of the class real repositories name) over a tiny tokenizer of the same build."""
    transformers = import_module("transformers")
    if kind == "llama-3":
        tokenizer = _byte_level(r"\p{N}{1,3}", 130)
        names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
        tokenizer.add_special_tokens([AddedToken(f"<|{name}|>", normalized=False) for name in names])
        tokenizer.post_processor = processors.Sequence(
            [processors.ByteLevel(trim_offsets=True), _bos(tokenizer, "<|begin_of_text|>")]
        )
        return transformers.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<|begin_of_text|>",
            eos_token="<|eot_id|>",
            clean_up_tokenization_spaces=True,
            model_input_names=["input_ids", "attention_mask"],
        )
    if kind == "llama-2":
        tokenizer = _byte_fallback(["<unk>", "<s>", "</s>"], "<unk>", 150)
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        return transformers.LlamaTokenizerFast(tokenizer_object=tokenizer, legacy=False)
    if kind == "gemma":
        tokenizer = _byte_fallback(["<pad>", "<eos>", "<bos>", "<unk>"], "<unk>", 150)
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
        return transformers.GemmaTokenizerFast(tokenizer_object=tokenizer)
    tokenizer = _byte_level(r"\p{N}", 130)
    tokenizer.normalizer = normalizers.NFC()
    chat_marks = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    tokenizer.add_special_tokens([AddedToken(mark, normalized=False) for mark in chat_marks])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    if kind == "qwen2-bos":
        tokenizer.post_processor = _bos(tokenizer, "<|im_start|>")
    return transformers.Qwen2TokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>" if kind == "qwen2-bos" else None,
        clean_up_tokenization_spaces=False,
    )


# ---------------------------------------------------------------- checkpoints


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _randomize(model: Any, generator: torch.Generator) -> None:
    """Weights so large that what a token attends to shows in the vectors; norms and biases take part too.

    As in trained models a token's embedding is large beside what a layer adds to it, and attention is no hard choice of
    one token: were it otherwise, bfloat16 would show its rounding many times over.
    """
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        scale = _scale(name) if parameter.dim() > 1 else 0.1
        centre = 1.0 if "norm" in name and type(model).__name__.startswith(("Llama", "Mistral", "Qwen2")) else 0.0
        parameter.data.copy_(centre + scale * noise)


def _scale(name: str) -> float:
    """The standard deviation of a matrix's random entries."""
    return 0.6 if "embed" in name else 0.1 if "q_proj" in name or "k_proj" in name else 0.2


def write_base(folder: Path, family: Family, tokenizer: Any, generator: torch.Generator) -> None:
    """A base as its owner publishes it: with its output head, and no word of LLM2Vec."""
    transformers = import_module("transformers")
    bos = tokenizer.bos_token_id
    config = transformers.CONFIG_MAPPING[family.model_type](
        **{**_SMALL, **family.config},
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.eos_token_id if bos is None else bos,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        torch_dtype="float32",
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    _randomize(model, generator)
    model.save_pretrained(
        folder,
        safe_serialization=family.layout != "bin",
        max_shard_size="100KB" if family.layout == "sharded" else "1GB",
    )
    (folder / "generation_config.json").unlink()
    tokenizer.save_pretrained(folder)


def write_adapter(folder: Path, family: Family, base: Path, generator: torch.Generator, parent: str) -> None:
    """A LoRA adapter of random A and B for the inner model; its config names the base by its hub name."""
    peft, bi_models = import_module("peft"), import_module("llm2vec.models")
    model_class = getattr(bi_models, _BI_MODEL[family.model_type])
    model = model_class.from_pretrained(base, torch_dtype=torch.float32)
    # task_type stays null: the library trains the bare model, for which peft has no task.
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules=_TARGETS))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(0.75 * _scale(name) * torch.randn(parameter.shape, generator=generator))
    adapted.to(family.adapter_dtype).save_pretrained(folder)
    (folder / "README.md").unlink()
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = family.name
    config["target_modules"] = _TARGETS  # peft writes a set, in the order of the moment
    config["auto_mapping"] = {
        "base_model_class": _BI_MODEL[family.model_type],
        "parent_library": f"llm2vec.models.bidirectional_{family.model_type}",
    }
    if parent:
        config["auto_mapping"] = {"base_model_class": parent, "parent_library": f"modeling_{family.model_type}_encoder"}
    _write_json(folder / "adapter_config.json", config)


def write_mntp(folder: Path, family: Family, base: Path, tokenizer: Any, generator: torch.Generator) -> None:
    """An MNTP repository: adapter, tokenizer, the base's config under its hub name, and remote code for others."""
    encoder_class = f"{family.model_type.capitalize()}EncoderModel"
    write_adapter(folder, family, base, generator, encoder_class)
    tokenizer.save_pretrained(folder)
    module = f"modeling_{family.model_type}_encoder"
    repository = "" if family.remote_code_beside else f"McGill-NLP/LLM2Vec-{family.name.partition('/')[2]}-mntp--"
    config = {
        "_name_or_path": family.name,
        **json.loads((base / "config.json").read_text()),
        "architectures": [encoder_class],
        "auto_map": {"AutoModel": f"{repository}{module}.{encoder_class}"},
    }
    _write_json(folder / "config.json", config)
    if family.remote_code_beside:
        (folder / f"{module}.py").write_text('raise RuntimeError("remote code must never run")\n')


def write_causal_lm_adapter(folder: Path, mntp: Path) -> None:
    """The MNTP adapter as if it were trained on the causal-LM wrapper: one more `model.` in each name."""
    folder.mkdir()
    tensors = load_file(mntp / "adapter_model.safetensors")
    prefix = "base_model.model."
    renamed = {f"{prefix}model.{name.removeprefix(prefix)}": tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = json.loads((mntp / "adapter_config.json").read_text())
    config["auto_mapping"] = None
    config["task_type"] = "CAUSAL_LM"
    _write_json(folder / "adapter_config.json", config)


# ---------------------------------------------------------------- the official library


@contextmanager
def _local_mntp(home: Path, **base_config: Any) -> Iterator[Path]:
    """A scratch copy of mntp/ whose adapter names the base by its folder, as the library is to find it offline."""
    with tempfile.TemporaryDirectory() as scratch:
        mntp, base = Path(scratch) / "mntp", home / "base"
        shutil.copytree(home / "mntp", mntp)
        if base_config:
            base = Path(scratch) / "base"
            shutil.copytree(home / "base", base)
            config = json.loads((base / "config.json").read_text())
            _write_json(base / "config.json", config | base_config)
        adapter = json.loads((mntp / "adapter_config.json").read_text())
        _write_json(mntp / "adapter_config.json", adapter | {"base_model_name_or_path": str(base)})
        yield mntp


def official(family: Family, source: Path, second: Path | None, bidirectional: bool = True, merge: bool = True) -> Any:
    """LLM2Vec as its README loads it, in float32 on the CPU.

    Qwen2BiModel is the exception. It only sets `is_causal` on its attention modules, which sdpa and eager never
    read: both go by the mask, and this class alone inherits Qwen2Model's causal one. So it runs causally, but under
    flash-attention, for which it was written. What it means to compute comes from giving it the mask function that
    the library wrote for LlamaBiModel, which has the same signature.
    """
    llm2vec, bi_models = import_module("llm2vec"), import_module("llm2vec.models")
    model = llm2vec.LLM2Vec.from_pretrained(
        str(source),
        peft_model_name_or_path=None if second is None else str(second),
        merge_peft=merge,
        enable_bidirectional=bidirectional,
        torch_dtype=torch.float32,
        max_length=MAX_LENGTH,
        doc_max_length=DOC_MAX_LENGTH,
    )
    if family.model_type == "qwen2" and bidirectional:
        inner = model.model
        inner._update_causal_mask = MethodType(bi_models.LlamaBiModel._update_causal_mask, inner)
    return model.eval()


def vectors(model: Any, texts: list[dict[str, str]], batch_size: int = 1) -> torch.Tensor:
    """(inputs, WIDTH) float32, not normalised. One text to a batch unless asked, so that no padding takes part.

    The library pads on the left. Rows then sit at later positions, which RoPE does not see but for rounding;
    last_token and eos_token take the last position, which is never padding; bos_token looks for the BOS id, which
    is not the padding's (the library pads with EOS).
    """
    pairs = [[each["instruction"], each["text"]] for each in texts]
    encoded = model.encode(pairs, batch_size=batch_size, convert_to_numpy=True, show_progress_bar=False)
    assert encoded.shape == (len(texts), WIDTH), encoded.shape
    return torch.from_numpy(encoded)


def rows(model: Any, texts: list[dict[str, str]]) -> list[dict[str, Any]]:
    """What the library reads of each input: {"given", "token_ids", "n", "cut"}.

    `given` is the string that is tokenized, `n` the number of tokens that are pooled with skip_instruction, `cut`
    whether a limit changed the row or n.
    """

    def read(text: dict[str, str]) -> tuple[str, list[int], int]:
        prepared = model.prepare_for_tokenization(model._convert_to_str(text["instruction"], text["text"]))
        features = model.tokenize([prepared])
        assert prepared.count("!@#$%^&*()") == 1
        return (
            prepared.replace("!@#$%^&*()", ""),
            features["input_ids"][0].tolist(),
            int(features["embed_mask"].sum()),
        )

    found = []
    for text in texts:
        given, token_ids, n = read(text)
        model.max_length = model.doc_max_length = 1 << 20
        whole = read(text)
        model.max_length, model.doc_max_length = MAX_LENGTH, DOC_MAX_LENGTH
        cut = (given, token_ids, n) != whole
        found.append({"given": given, "token_ids": token_ids, "n": n, "cut": cut})
    return found


def _causal_lm_adapter_agrees(home: Path) -> None:
    """peft, on the wrapper the adapter is for, must come to the weights that mntp/ gives the inner model."""
    peft, transformers = import_module("peft"), import_module("transformers")
    wrapper = transformers.AutoModelForCausalLM.from_pretrained(home / "base")
    wrapped = peft.PeftModel.from_pretrained(wrapper, home / "causal-lm-adapter").merge_and_unload().model.state_dict()
    inner = transformers.AutoModel.from_pretrained(home / "base")
    merged = peft.PeftModel.from_pretrained(inner, home / "mntp").merge_and_unload().state_dict()
    assert merged.keys() == wrapped.keys()
    assert all(torch.equal(merged[name], wrapped[name]) for name in merged)


def generate(key: str, home: Path, seed: int) -> None:
    """One family's checkpoints and vectors, in `home`; prints what was checked."""
    family = FAMILIES[key]
    generator = torch.Generator().manual_seed(seed)
    tokenizer = make_tokenizer(family.tokenizer)
    base, mntp, second = home / "base", home / "mntp", home / "second"
    write_base(base, family, tokenizer, generator)
    write_mntp(mntp, family, base, tokenizer, generator)
    write_adapter(second, family, base, generator, "")

    texts = inputs(family.special)
    with _local_mntp(home) as source:
        model = official(family, source, second)
        causal = official(family, source, second, bidirectional=False)
        if key == _MORE_LAYOUTS:
            write_causal_lm_adapter(home / "causal-lm-adapter", mntp)
            _causal_lm_adapter_agrees(home)
            unmerged = official(family, source, second, merge=False)
            unmerged.tokenize(["a"])  # a used tokenizer is saved with its limits, a trap for whoever reads it
            unmerged.save(str(home / "merged"), merge_before_save=True)
    without_mntp = official(family, base, second)
    without_mntp.model.config._name_or_path = family.name

    assert model.model.config._name_or_path == family.name
    tensors, described, batch_difference = {}, {}, 0.0
    choices = [("mean", True), ("mean", False), ("weighted_mean", True), ("last_token", True), ("eos_token", True)]
    if tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        choices.append(("bos_token", True))
    read = {}
    for pooling, skip in choices:
        model.pooling_mode, model.skip_instruction = pooling, skip
        name = pooling if skip else f"{pooling}_whole_row"
        kind = "eos_token" if pooling == "eos_token" else "plain"
        read[kind] = rows(model, texts)
        tensors[name] = vectors(model, texts)
        described[name] = {"pooling": pooling, "skip_instruction": skip, "rows": kind, "control": False}
        # With nothing to pool the library pools the padding too.
        pooled = torch.tensor([row["n"] > 0 for row in read[kind]])
        batched = vectors(model, texts, batch_size=8)[pooled]
        difference = (normalize(batched) - normalize(tensors[name][pooled])).abs().max().item()
        assert difference < 1e-5, (key, name, difference)
        batch_difference = max(batch_difference, difference)

    controls = {"without_mntp": without_mntp, "causal": causal}
    for name, change in family.extra_controls.items():
        with _local_mntp(home, **change) as source:
            controls[name] = official(family, source, second)
    for name, control in controls.items():
        tensors[name] = vectors(control, texts)
        described[name] = {"pooling": "mean", "skip_instruction": True, "rows": "plain", "control": True}
    # A row of one token is the same in every attention, and a span of none or of all is the whole row.
    telling = torch.tensor([1 < row["n"] < len(row["token_ids"]) for row in read["plain"]])
    for name in (*controls, "mean_whole_row"):
        cosines = cosine_similarity(tensors[name], tensors["mean"], dim=-1)[telling]
        print(f"  {key}: {name} is at cosine {cosines.median():.3f} (median), {cosines.max():.4f} (highest) to mean")
    if key == _MORE_LAYOUTS:
        assert torch.equal(vectors(official(family, home / "merged", None), texts), tensors["mean"])

    cut = sum(row["cut"] for row in read["plain"])
    print(f"{key}: {len(texts)} inputs, {cut} cut; batches of 8 differ by at most {batch_difference:.1e} (normalised)")
    save_file(tensors, home / "vectors.safetensors")
    _write_json(
        home / "vectors.json",
        {
            "family": key,
            "name_or_path": family.name,
            "versions": {name: version(name) for name in ("llm2vec", "transformers", "peft", "tokenizers")},
            "truncation": "reference",
            "max_length": MAX_LENGTH,
            "doc_max_length": DOC_MAX_LENGTH,
            "tensors": described,
            "inputs": texts,
            "rows": read,
        },
    )


def main() -> None:
    """Write every family, or those named on the command line, over what is there."""
    # Nothing here comes from a network, and a tokenizer's thread pool can only add noise.
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", TRANSFORMERS_VERBOSITY="error")
    torch.set_num_threads(1)
    import_module("transformers").utils.logging.disable_progress_bar()
    for seed, key in enumerate(FAMILIES):
        if len(sys.argv) > 1 and key not in sys.argv[1:]:
            continue
        home = GOLDEN / key
        shutil.rmtree(home, ignore_errors=True)
        home.mkdir(parents=True)
        generate(key, home, seed)


if __name__ == "__main__":
    main()
