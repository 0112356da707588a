"""`train`: a configuration in, an adapter in its output_dir out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import TrainerCallback, TrainingArguments, get_scheduler, set_seed
from transformers.integrations import get_available_reporting_integrations

from model_store.architectures import architecture_of
from model_store.build.build import base_name
from model_store.build.sources import Source, resolve
from model_store.build.tokenizer_files import eos_token, write_tokenizer
from model_store.encoder.devices import choose_dtype
from model_store.evaluation.command import EmbedTexts
from model_store.manifest import TOKENIZER_FILE, Role
from model_store.templates import template_for
from model_store.text.tokenizer import TextTokenizer
from model_store.training.config import MntpConfig, SimcseConfig, SupervisedConfig, TrainingConfig, TrainingConfigError
from model_store.training.decoder import TrainableDecoder, load_trainable
from model_store.training.examples import ContrastiveBatches, ExampleDataset, MaskedBatches, Masking, TokenRows
from model_store.training.form import form_of
from model_store.training.published import Published
from model_store.training.resume import begin
from model_store.training.stages import ContrastiveEncoder, MaskedNextToken
from model_store.training.teacher import local_teacher, teacher_vectors
from model_store.training.texts import Examples, read_examples
from model_store.training.trainer import ContrastiveTrainer, MntpTrainer, PackedTrainer, StopAfter

# The default length of a row in tokens, as in the official scripts.
_DEFAULT_LENGTH = {"mntp": 1024, "simcse": 512, "supervised": 512}

# Texts that one call tokenizes.
_TOKENIZED_TOGETHER = 1000

# The keys among the arguments that transformers' class does not have.
_NOT_OF_TRANSFORMERS = ("warmup_ratio", "overwrite_output_dir", "resume_from_checkpoint")


# A server's address, then the arguments of `EmbedTexts`.
EmbedByServer = Callable[[str, Sequence[str], str | None, Role | None], NDArray[np.float32]]


def train(
    config: TrainingConfig,
    resume: bool = False,
    callbacks: Sequence[TrainerCallback] = (),
    embed_by_server: EmbedByServer | None = None,
) -> Path:
    """Train an adapter and save it in `config.output_dir`. Returns that folder.

    Under torchrun or `accelerate launch` it is one process of several. With `resume` it goes on from the newest
    complete checkpoint in output_dir, if there is one, and reaches the same result as an uninterrupted run. The Trainer
    calls the `callbacks`. `embed_by_server` asks the server of a `teacher_url`.

    Raises:
        TrainingConfigError, TrainingDataError: and the errors of the readers of base and adapters.
    """
    try:
        arguments = training_arguments(config)
        examples = read_examples(config, arguments)
        checkpoint = begin(config, arguments, examples.train, resume)
        with ExitStack() as sources:
            with arguments.main_process_first(desc="fetching the base"):
                base = sources.enter_context(resolve(config.base))
                first = None if isinstance(config, MntpConfig) else config.peft_model_name_or_path
                before = (sources.enter_context(resolve(first)),) if first else ()
            trainer = prepare(config, arguments, examples, base, before, embed_by_server)
            for callback in callbacks:
                trainer.add_callback(callback)
            # Each process draws its own dropout. A checkpoint restores the state of its generators.
            torch.manual_seed(arguments.seed + arguments.process_index)
            trainer.train(resume_from_checkpoint=checkpoint)
            if arguments.do_eval and arguments.eval_strategy == "no":
                trainer.evaluate()
            trainer.save_model()
            trainer.save_state()
    except TrainingConfigError as error:
        raise TrainingConfigError(f"{config.file}: {error}" if config.file else str(error)) from error
    return config.output_dir


def prepare(
    config: TrainingConfig,
    arguments: TrainingArguments,
    examples: Examples,
    base: Source,
    before: tuple[Source, ...],
    embed_by_server: EmbedByServer | None = None,
) -> PackedTrainer:
    """Do everything before the first step: write the tokenizer to output_dir, and make the trainer."""
    form = form_of(config, base, before)
    with arguments.main_process_first(desc="writing the tokenizer"):
        if arguments.process_index == 0:
            write_tokenizer(base, before, config.output_dir)
    tokenizer = Tokenizer.from_file(str(config.output_dir / TOKENIZER_FILE))
    set_seed(arguments.seed)
    decoder = load_trainable(
        base,
        before,
        choose_dtype(config.torch_dtype, arguments.device),
        arguments.device,
        rank=config.lora_r,
        lora_dropout=config.lora_dropout,
        attention_dropout=config.simcse_dropout if isinstance(config, SimcseConfig) else 0.0,
        gradient_checkpointing=config.gradient_checkpointing,
        with_head=isinstance(config, MntpConfig),
        attention=form.attention,
    )
    positions = decoder.config.max_position_embeddings
    length = config.max_seq_length or min(_DEFAULT_LENGTH[config.stage], positions)
    if length > positions:
        raise TrainingConfigError(f"max_seq_length is {length}, but {config.base} reads {positions} tokens: lower it")
    published = Published(base, before, decoder.base_config, form)
    if isinstance(config, MntpConfig):
        trainer = _mntp(config, arguments, decoder, published, tokenizer, examples, length)
    else:
        trainer = _contrastive(config, arguments, decoder, published, tokenizer, examples, length, embed_by_server)
    if config.stop_after_n_steps is not None:
        trainer.add_callback(StopAfter(config.stop_after_n_steps))
    return trainer


def training_arguments(config: TrainingConfig) -> TrainingArguments:
    """The arguments that transformers gets from a configuration.

    Raises:
        TrainingConfigError: for values that contradict each other, or that this machine does not support.
    """
    given = {key: value for key, value in config.arguments.items() if key not in _NOT_OF_TRANSFORMERS}
    ratio = config.arguments.get("warmup_ratio")
    if ratio and not given.get("warmup_steps"):
        given["warmup_steps"] = ratio  # transformers reads a value below 1 as a ratio
    try:
        arguments = TrainingArguments(
            **{
                "output_dir": str(config.output_dir),
                "optim": "adamw_torch",
                "report_to": ["tensorboard"],
                "dataloader_pin_memory": torch.cuda.is_available(),
                **given,
                "remove_unused_columns": False,
                "dataloader_drop_last": True,
                "ddp_find_unused_parameters": False,
                "ddp_broadcast_buffers": False,
            }
        )
        _try_schedule(arguments)
    except (ValueError, TypeError, ImportError) as error:
        raise TrainingConfigError(" ".join(str(error).replace("--", "").split())) from error
    usable = get_available_reporting_integrations()
    if missing := [name for name in arguments.report_to if name not in usable]:
        raise TrainingConfigError(
            f'report_to is "{missing[0]}", which is not installed here: write {" or ".join([*usable, "none"])}'
        )
    if arguments.n_gpu > 1:
        raise TrainingConfigError(
            f"there are {arguments.n_gpu} GPUs: run torchrun --nproc-per-node {arguments.n_gpu} -m service train …, or "
            "set CUDA_VISIBLE_DEVICES to one of them"
        )
    return arguments


def _try_schedule(arguments: TrainingArguments) -> None:
    """Make the schedule once as a check: some need lr_scheduler_kwargs, and the Trainer makes it after the model."""
    kind, given = arguments.lr_scheduler_type, arguments.lr_scheduler_kwargs
    nothing = torch.optim.SGD([torch.zeros(1)], lr=arguments.learning_rate)
    try:
        get_scheduler(kind, nothing, num_warmup_steps=0, num_training_steps=1, scheduler_specific_kwargs=given)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"lr_scheduler_type {kind.value} does not go with lr_scheduler_kwargs {json.dumps(given)}: {error}"
        ) from error


def _mntp(
    config: MntpConfig,
    arguments: TrainingArguments,
    decoder: TrainableDecoder,
    published: Published,
    tokenizer: Tokenizer,
    texts: Examples,
    length: int,
) -> PackedTrainer:
    mask_token, mixed = _mask_token(config, tokenizer, decoder.config), config.data_collator_type == "default"
    special = [token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    untouched = np.isin(np.arange(decoder.config.vocab_size), special)
    masking = Masking(mask_token, config.mlm_probability, mixed, untouched, arguments.seed)
    rows = [_tokenize(tokenizer, part, arguments) for part in (texts.train, texts.held_out)]
    if config.line_by_line:
        examples, held_out = (TokenRows([row[:length] for row in part]) for part in rows)
    else:
        examples, held_out = (TokenRows.in_blocks(part, length) for part in rows)
    stage, one_group = MaskedNextToken(decoder), [""] * len(examples)
    return MntpTrainer(stage, arguments, examples, held_out, MaskedBatches(masking), one_group, published)


def _mask_token(config: MntpConfig, tokenizer: Tokenizer, model: Any) -> int:
    """The id of the token that replaces hidden tokens.

    Raises:
        TrainingConfigError: if the base has no such token.
    """
    tokens = {"blank": "_", "mask": "<mask>", "eos": eos_token(config.output_dir)}
    token = tokens[config.mask_token_type]
    if token is None:  # then only the base's configuration names the end of a text
        eos = model.eos_token_id
        found = eos[0] if isinstance(eos, list) else eos
    else:
        found = tokenizer.token_to_id(token)
    if found is None or found >= model.vocab_size:
        raise TrainingConfigError(
            f'{config.base} has no token for mask_token_type "{config.mask_token_type}": use one of blank, eos, mask'
        )
    return int(found)


def _tokenize(tokenizer: Tokenizer, texts: list[str], arguments: TrainingArguments) -> list[NDArray[np.int32]]:
    """Tokenize whole texts in threads, with special tokens. Texts without tokens are left out."""
    parts = [texts[start : start + _TOKENIZED_TOGETHER] for start in range(0, len(texts), _TOKENIZED_TOGETHER)]
    bar = tqdm(total=len(texts), desc="tokenizing", unit="text", disable=arguments.disable_tqdm or None)

    def encode(part: list[str]) -> list[NDArray[np.int32]]:
        return [np.array(encoding.ids, dtype=np.int32) for encoding in tokenizer.encode_batch_fast(part)]

    rows: list[NDArray[np.int32]] = []
    with bar, ThreadPoolExecutor() as pool:
        for part in pool.map(encode, parts):
            rows += [row for row in part if len(row)]
            bar.update(len(part))
    return rows


def _contrastive(
    config: SimcseConfig | SupervisedConfig,
    arguments: TrainingArguments,
    decoder: TrainableDecoder,
    published: Published,
    tokenizer: Tokenizer,
    data: Examples,
    length: int,
    embed_by_server: EmbedByServer | None,
) -> PackedTrainer:
    name, architecture = base_name(published.base, published.before), architecture_of(decoder.config.model_type)
    form = published.form
    template = form.template or template_for(name, form.pooling, architecture)
    reader = TextTokenizer(
        tokenizer, template, form.skip_instruction, decoder.config.vocab_size, span_count=form.span_count
    )
    _check_widths(config, decoder.config.hidden_size, arguments)
    teacher = None
    if isinstance(config, SupervisedConfig) and config.has_teacher:
        needed = decoder.config.hidden_size if config.distillation_loss == "EmbedDistillLoss" else None
        reference = config.teacher_url or str(config.teacher_model)
        load = partial(_load_teacher, config, arguments, embed_by_server)
        with arguments.main_process_first(desc="asking the teacher"):
            texts = [*data.train, *data.held_out]
            teacher = teacher_vectors(texts, reference, load, config.output_dir, needed)
    return ContrastiveTrainer(
        ContrastiveEncoder(decoder),
        arguments,
        ExampleDataset(data.train),
        ExampleDataset(data.held_out),
        ContrastiveBatches(reader, form.pooling, length, config.gradient_cache_chunk_size, teacher),
        [each.group for each in data.train],
        published,
        objective=config.objective,
        dropout_in_evaluation=isinstance(config, SimcseConfig),
        pairs=data.pairs,
    )


def _check_widths(config: SimcseConfig | SupervisedConfig, whole: int, arguments: TrainingArguments) -> None:
    dims = config.matryoshka_dims or [whole]
    if max(dims) > whole:
        raise TrainingConfigError(
            f"matryoshka_dims has {max(dims)}, but the vectors of {config.base} have {whole} dimensions: leave it out"
        )
    if whole not in dims and arguments.process_index == 0:
        print(f"matryoshka_dims lacks the whole width, {whole}: vectors that are not cut are not trained as such")


def _load_teacher(
    config: SupervisedConfig, arguments: TrainingArguments, embed_by_server: EmbedByServer | None
) -> EmbedTexts:
    if config.teacher_model:
        return local_teacher(config.teacher_model, arguments.device)
    if embed_by_server is None:
        raise TrainingConfigError("teacher_url is asked through the command: llm2vec-service train")
    return partial(embed_by_server, str(config.teacher_url))
