"""All errors of a request or of the start. No HTTP here: http/error_responses.py maps each error to a status.

ServiceError
├── StartupError               the server refuses to start; the message names the way out
├── InvalidRequest             the caller can correct it; has a code, and a param if one field is to blame
│   ├── ContextLengthExceeded
│   ├── RequestTooLarge
│   ├── TooManyInputs
│   ├── UnsupportedEncoding    the body is compressed: its unpacked size is unknown until memory is spent on it
│   ├── RequestTimeout         the request itself took too long to arrive
│   └── ModelNotFound
├── Unauthorized               no key, or one that is not valid
├── Overloaded                 too much is queued; try again in retry_after_seconds
│   └── TooMuchInFlight        or all requests together hold too much memory
├── Unavailable                loading, draining, or the device thread is gone
│   └── DeviceLost             the device hangs or fails for good: its process must end, so that another can start
├── DeadlineExceeded           the caller's time was over before its turn came
├── ClientGone                 nobody waits for the answer any more
└── EncodingError              the device could not give this input a vector
    ├── NonFiniteEmbedding     it holds NaN or infinity, which is never sent
    └── OutOfMemory            even alone
"""

from __future__ import annotations

from typing import Self


class ServiceError(Exception):
    """The root of the tree; `code` is the stable, machine-readable name of the error."""

    code = "internal_error"
    param: str | None = None


class StartupError(ServiceError):
    code = "startup"


class InvalidRequest(ServiceError):
    def __init__(self, message: str, code: str = "invalid_request", param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


class ContextLengthExceeded(InvalidRequest):
    def __init__(self, limit: int, tokens: int, index: int, param: str = "input", at_least: bool = False) -> None:
        requested = f"at least {tokens}" if at_least else str(tokens)
        super().__init__(
            f"This model's maximum context length is {limit} tokens, however you requested {requested} tokens "
            f"(input index {index}).",
            "context_length_exceeded",
            param,
        )


class RequestTooLarge(InvalidRequest):
    def __init__(self, limit_bytes: int) -> None:
        super().__init__(
            f"the request body is larger than {limit_bytes} bytes: send fewer inputs at once", "request_too_large"
        )


class TooManyInputs(InvalidRequest):
    def __init__(self, inputs: int, most: int, param: str) -> None:
        super().__init__(f"{inputs} inputs in one request: at most {most} are taken", "too_many_inputs", param)


class UnsupportedEncoding(InvalidRequest):
    pass


class RequestTimeout(InvalidRequest):
    pass


class ModelNotFound(InvalidRequest):
    def __init__(self, asked: str, served: str) -> None:
        super().__init__(
            f"the model {asked[:100]!r} does not exist here; this server serves {served!r}", "model_not_found", "model"
        )


class Unauthorized(ServiceError):
    code = "invalid_api_key"


class Overloaded(ServiceError):
    code = "overloaded"

    def __init__(self, queued_tokens: int, retry_after_seconds: float) -> None:
        super().__init__(f"the server is overloaded: {queued_tokens} tokens are queued; try again later")
        self.queued_tokens = queued_tokens
        self.retry_after_seconds = retry_after_seconds


class TooMuchInFlight(Overloaded):
    def __init__(self, held_bytes: int, most_bytes: int) -> None:
        ServiceError.__init__(
            self,
            f"the server is overloaded: requests and answers hold {held_bytes} bytes together, of at most {most_bytes} "
            "(the setting LLM2VEC_MAX_BYTES_IN_FLIGHT); try again later",
        )
        self.retry_after_seconds = 1.0


class Unavailable(ServiceError):
    code = "server_unavailable"
    retry_after_seconds = 5.0


class DeviceLost(Unavailable):
    pass


class DeadlineExceeded(ServiceError):
    code = "timeout"

    def __init__(
        self, message: str = "the deadline passed before the request's turn came: nothing was computed"
    ) -> None:
        super().__init__(message)


class ClientGone(ServiceError):
    code = "client_gone"


class EncodingError(ServiceError):
    """The device failed on this input alone; `index` is its place in the request, once that is known."""

    code = "encoding_failed"
    index: int | None = None

    def at(self, index: int | None) -> Self:
        """A copy of the error with this index. Requests that share an input have it at different places."""
        error = type(self)(*self.args)
        error.index = index
        return error


class NonFiniteEmbedding(EncodingError):
    code = "non_finite_embedding"


class OutOfMemory(EncodingError):
    code = "out_of_memory"
