"""Declares every setting once: the environment variables, command-line options and documentation come from here.

python -m service.settings     prints that table
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from model_store.json_text import parse_json, unicode_problem
from service.errors import StartupError

PREFIX = "LLM2VEC_"

# The default limit of a text, even if the model can read more; callers of hosted APIs expect about this.
DEFAULT_MAX_INPUT_TOKENS = 8192

# The defaults, by device type, for the most tokens in one batch and for the seconds of a full batch.
TOKEN_BUDGET = {"cuda": 16384, "cpu": 8192}
BATCH_SECONDS = {"cuda": 0.1, "cpu": 1.5}

Switch = Literal["auto", "on", "off"]

# These come from the environment only, as every user of a machine sees its processes' arguments. They are kept as
# hashes.
SECRETS = ("api_keys", "metrics_key")

# The key that the client commands send to a server. It is no setting of the server.
KEY_VARIABLE = "EMBED_API_KEY"

_ALIASES = '{"text-embedding-3-small": "", "queries": "query"}'

_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_KEY = re.compile(r"[\x21-\x7e]+")
_ORIGIN = re.compile(r"\*|https?://[\w.-]+(:\d+)?|https?://\[[0-9a-fA-F:]+\](:\d+)?", re.ASCII)


def hash_key(key: str) -> str:
    """Hash a key: `sha256:` and hex digits. A key that is already such a hash stays as it is.

    Raises:
        ValueError: for a key that can't be sent; the message never shows the key.
    """
    if _HASH.fullmatch(key):
        return key
    if not _KEY.fullmatch(key):
        raise ValueError("a key must be of visible ASCII characters, without spaces")
    return f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"


def hash_keys(given: str | Iterable[str]) -> tuple[str, ...]:
    """The hashes of keys that are given as a list or separated by commas.

    Raises:
        ValueError: as `hash_key`, and for a string without a key, which can't be meant to open the server to everybody.
    """
    keys = given.split(",") if isinstance(given, str) else given
    hashes = tuple(hash_key(key.strip()) for key in keys if key.strip())
    if isinstance(given, str) and not hashes:
        raise ValueError("there is no key in it: write at least one, or leave the variable out")
    return hashes


class Settings(BaseSettings):
    """How the server runs. A value comes from the command line, else the environment, else its default.

    The settings stand in the order of `serve --help`, whose headings options.py names.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        env_ignore_empty=True,
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        use_attribute_docstrings=True,
    )

    model: str = "demo"
    """what to serve: a stored encoder's folder, or a recipe (name or .toml file)"""
    models_dir: Path = Path("~/.cache/llm2vec-service")
    """folder in which recipes are built and found again"""
    served_name: str = ""
    """the model's name in the API; by default the recipe's name"""
    model_aliases: Annotated[dict[str, str], NoDecode] = Field(
        {},
        description='further names of the model, each with the input type or prompt it stands for, or "" for none: '
        f"`{_ALIASES}`",
    )
    any_model: bool = False
    """accept every model name in requests, and serve this model"""
    query_instruction: str | None = None
    """instruction put before inputs of type query; by default the model's own"""
    prompts_file: Path | None = None
    """TOML file of further named prompts: `name = "instruction"` for every text, `name = { query = "…" }` for queries
    alone"""
    default_input_type: str = ""
    """input type or prompt of requests that name none; by default they get no instruction"""
    instruction_separator: str = ""
    """the part of a text before this string is the text's instruction; for clients that can only put text in front"""
    max_input_tokens: int | None = Field(None, ge=8)
    """longest input, instruction and template included; by default the model's own limit, at most 8192"""
    truncation: Literal["token", "reference"] = "token"
    """token refuses a text that is too long; reference cuts it as the official library does, to the model's own limits
    (512 tokens, 400 of them text), and says so; a text that is empty after the cut, such as a longer one without
    spaces, is refused unless empty_text is bos"""
    token_ids: Literal["auto", "model", "cl100k_base", "o200k_base", "reject"] = "auto"
    """how inputs of token ids are read: as this model's own, as OpenAI's (decoded and tokenized again), or not at all;
    auto reads ids from OpenAI's SDKs as cl100k_base, as LangChain sends them, unless cl100k_base lacks one of them, and
    all others as the model's own"""
    empty_text: Literal["error", "bos"] = "error"
    """error refuses an empty text; bos embeds it as the special tokens alone, and gives a text that is empty after
    reference truncation the official library's vector"""
    other_widths: Literal["warn", "refuse"] = "warn"
    """the answer to `dimensions` that are none of the encoder's widths, where it names any: warn gives the vectors and
    names the widths in a header, refuse gives an error"""
    device: str = "auto"
    """auto (CUDA where there is a GPU), cpu, cuda or cuda:N; several of them separated by commas, or cuda:all for every
    GPU. Each of several devices gets its own engine process"""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """arithmetic: auto is bfloat16 on GPUs of compute capability 8.0 and later and on CPUs with bf16 instructions; on
    older GPUs float16 for the families whose numbers fit into it; else float32"""
    quantization: Literal["none", "fp8", "int8"] = "none"
    """linear layers in 8 bits: fp8 on GPUs of compute capability 8.9 and later, int8 on CPUs with VNNI or AMX; vectors
    change a little and get an embedding space of their own"""
    equal_bits: bool = False
    """give a text's vector the same bits in every batch, by products of a fixed number of rows, which costs 7 to 16 %
    of the speed. For CPUs that give other bits without it, such as Intel's with AMX; the start checks it, and ends with
    the reason on a device that can't do it"""
    attention: Literal["auto", "sdpa", "torch-flash", "flash-attn"] = "auto"
    """attention kernel; auto takes the fastest one that supports the model on the device"""
    compile: Switch = "auto"
    """compile the model's layers with torch.compile at the start, which takes half a minute the first time and seconds
    later; auto does it if there is a C++ compiler"""
    cuda_graphs: Switch = "auto"
    """capture the forward pass of small batches as CUDA graphs; auto does it where graphs work and save time"""
    token_budget: int | None = Field(None, ge=8)
    """most tokens in one batch, tried out at the start on CUDA; by default 16384, on the CPU 8192"""
    batch_tokens: int | None = Field(None, ge=1)
    """tokens at which a batch is full; by default a calibration at the start finds an efficient size"""
    batch_seconds: float | None = Field(None, gt=0)
    """longest time that a full batch may take by that calibration; not used if batch_tokens is set; by default 0.1, on
    the CPU 1.5"""
    interactive_inputs: int = Field(4, ge=0)
    """most inputs of an interactive request, which goes before bulk; a request of more than half a batch's tokens is
    always bulk"""
    max_queued_tokens: int = Field(1_000_000, ge=1)
    """tokens that may wait for a device in each lane, interactive and bulk; a request that would exceed it gets 429"""
    cache_bytes: int = Field(0, ge=0)
    """memory for recent vectors, which equal texts get without being computed again; 0 keeps none"""
    tokenizer_threads: int = Field(2, ge=1)
    """threads that tokenize"""
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 for every interface, :: for IPv6 as well"""
    port: int = Field(8000, ge=0, le=65535)
    """port to listen on; 0 picks a free one"""
    frontends: int = Field(1, ge=1)
    """number of processes that speak HTTP; more than one helps if a fast device waits for its input"""
    max_inputs_per_request: int = Field(2048, ge=1)
    """most inputs in one request"""
    max_tokens_per_request: int = Field(300_000, ge=1)
    """most tokens in one request"""
    max_input_characters: int = Field(1_000_000, ge=1)
    """most characters of an input, and of an instruction, before any truncation"""
    max_body_bytes: int = Field(8 << 20, ge=1024)
    """largest request body"""
    max_bytes_in_flight: int = Field(1 << 30, ge=1024)
    """bytes of all requests and of their answers' vectors together, in each process that speaks HTTP; a request that
    would exceed it gets 429, unless it is alone"""
    max_connections: int = Field(4096, ge=1)
    """connections at once to each process that speaks HTTP; further ones get 503"""
    keep_alive_seconds: int = Field(75, ge=1)
    """how long an idle connection is kept open for the client's next request; longer than proxies keep it"""
    request_read_seconds: float = Field(60.0, gt=0)
    """how long a request may take to arrive, from its first byte to its last; then it gets 408"""
    answer_write_seconds: float = Field(60.0, gt=0)
    """seconds without the client reading anything of a waiting answer (some 64 KB or more) before its connection is
    closed"""
    overload_wait_seconds: float = Field(10.0, ge=0)
    """how long a request to the routes of text-embeddings-inference or Ollama waits for room in the queue before it
    gets 429: their clients don't try again, and one of them takes the error for a vector"""
    reject_unknown_fields: bool = False
    """answer 400 to unknown request fields, instead of naming them in a header"""
    api_keys: Annotated[tuple[str, ...], NoDecode] = Field((), repr=False)
    """keys, separated by commas, of which every request must send one; a key may be given as `sha256:` and the hex
    digits of its hash. Without keys every request is accepted"""
    api_keys_file: Path | None = None
    """file with one such key on each line; it is read again within seconds when it changes"""
    metrics_key: Annotated[tuple[str, ...], NoDecode] = Field((), repr=False)
    """key that `/metrics` needs; by default it needs none"""
    cors_origins: Annotated[tuple[str, ...], NoDecode] = ()
    """origins whose pages may read answers, such as https://app.example.org, separated by commas, or *; by default
    none"""
    playground: bool = True
    """serve a page at `/` to try texts and to see tokens, vectors and the server's state"""
    tei_metrics: bool = False
    """also give metrics under text-embeddings-inference's names, for dashboards that use them"""
    stuck_batch_seconds: float | None = Field(None, gt=0)
    """a batch that takes longer means that the device hangs: waiting requests get 503 and the process ends with status
    1; by default 120, or 20 times the expected time if that is longer"""
    start_seconds: float | None = Field(None, gt=0)
    """the process also ends if loading and warm-up take longer; by default there is no limit"""
    shutdown_grace_seconds: int = Field(30, ge=1)
    """how long requests in flight may take to finish after SIGTERM"""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """least severe log line written"""

    @field_validator("model_aliases", mode="before")
    @classmethod
    def _read_aliases(cls, value: Any) -> Any:
        try:
            found = parse_json(value) if isinstance(value, str) else value
        except ValueError as error:
            raise ValueError(f"it {error}; write {_ALIASES}, for example") from error
        if not isinstance(found, dict):
            raise ValueError(f"it is not a JSON object; write {_ALIASES}, for example")
        for name, meant in found.items():
            if not isinstance(meant, str):
                raise ValueError(f"{name!r} stands for {meant!r}, not for a string; write {_ALIASES}, for example")
        if problem := unicode_problem(found):
            raise ValueError(f"it {problem}")
        return found

    @field_validator(*SECRETS, mode="before")
    @classmethod
    def _hash_secrets(cls, value: Any) -> Any:
        return hash_keys(value)

    @field_validator("cors_origins", mode="before")
    @classmethod
    def _read_origins(cls, value: Any) -> Any:
        given = value.split(",") if isinstance(value, str) else value
        origins = tuple(origin.strip() for origin in given if origin.strip())
        if wrong := [origin for origin in origins if not _ORIGIN.fullmatch(origin)]:
            raise ValueError(f"{wrong[0]!r} is no origin: write scheme://host or scheme://host:port, without a path")
        return origins

    @property
    def several_processes(self) -> bool:
        """Whether these settings may need more than one process."""
        return self.frontends > 1 or "," in self.device or self.device == "cuda:all"


def load_settings(given: dict[str, Any]) -> Settings:
    """Settings from explicit values and the environment.

    Raises:
        StartupError: for a bad value, or an LLM2VEC_ variable that does not exist.
    """
    names = [name.upper() for name in Settings.model_fields]
    for variable in os.environ:
        name = variable.upper().removeprefix(PREFIX)
        if variable.upper().startswith(PREFIX) and name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            known = ", ".join(PREFIX + name for name in sorted(names))
            hint = f"did you mean {PREFIX}{near[0]}?" if near else f"known are {known}"
            raise StartupError(f"there is no setting {variable}: {hint}")
    try:
        return Settings(**given)
    except ValidationError as error:
        # pydantic's message and the chained error would show the given value, which may be a key.
        raise StartupError("; ".join(map(_sentence, error.errors()))) from None


def _sentence(issue: ErrorDetails) -> str:
    name = str(issue["loc"][0])
    given = "" if name in SECRETS else f" is {issue['input']!r}"
    wrong = _MEANT.get(issue["type"]) or issue["msg"].removeprefix("Value error, ").replace("Input should", "it must")
    return f"{PREFIX}{name.upper()}{given}: {wrong}"


# What a setting must be, in place of pydantic's words, by pydantic's name for the mistake.
_MEANT = {
    "int_parsing": "it must be a whole number",
    "int_from_float": "it must be a whole number",
    "float_parsing": "it must be a number",
    "bool_parsing": "it must be true or false",
}


def meaning_of(field: FieldInfo) -> str:
    """A setting's description, on one line."""
    return " ".join((field.description or "").split())


def settings_table() -> str:
    """The settings as a Markdown table, for docs/configuration.md."""
    lines = ["| variable | option | default | meaning |", "|---|---|---|---|"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, "", ()) else f"`{field.default}`"
        option = "" if name in SECRETS else f"`--{name.replace('_', '-')}`"
        lines.append(f"| `{PREFIX}{name.upper()}` | {option} | {default} | {meaning_of(field)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(settings_table())
