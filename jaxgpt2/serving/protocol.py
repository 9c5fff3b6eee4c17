"""What client and server say to each other.

A client uploads evaluation keys once, opens a session for one circuit and one set of keys, and sends batches of calls.
What a call returns stays in the session, under the number that the client gave the call, for later calls; only the
results that the batch asks for travel. A batch has an identity: sent again, it is answered again and not run again.

Batches and answers are MessagePack; everything else is JSON. Encrypted arrays are byte strings that only `fhe`'s
circuits look into.
"""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgpack
from pydantic import BaseModel, ConfigDict, FailFast, Field, StringConstraints, ValidationError

from jaxgpt2.errors import InputError

MSGPACK = "application/vnd.msgpack"

# Calls of a batch: a token takes a handful, a whole prompt may come at once.
MAX_CALLS = 1000

# Inputs of a call, and items of any other list.
MAX_INPUTS, MAX_ITEMS = 10_000, 20 * MAX_CALLS

# Lists, maps and what is in them, of a whole message: a prompt of a thousand calls has 90,000.
MAX_PARTS = 500_000

Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Identity = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
Number = Annotated[int, Field(ge=0, lt=2**31)]


class BadRequest(InputError):
    """Bytes or fields that are no request of this protocol."""


class Message(BaseModel, frozen=True):
    """A part of a request: exactly these fields, of exactly these types."""

    model_config = ConfigDict(extra="forbid", strict=True)


class Result(Message, frozen=True):
    """One result of a call of the session."""

    call: Number
    output: Number


class Call(Message, frozen=True):
    """A function to run.

    inputs: in the function's order, each an index of the batch's uploads, or a result of an earlier call.
    """

    id: Number
    function: Annotated[str, Field(max_length=200)]
    inputs: Annotated[list[Number | Result], Field(max_length=MAX_INPUTS), FailFast()]


class Batch(Message, frozen=True):
    """Calls to run in order.

    request: the batch's identity, drawn by the client.
    results: what the answer shall hold, each once.
    forget: results of earlier batches that no later call will take.
    """

    request: Identity
    calls: Annotated[list[Call], Field(max_length=MAX_CALLS), FailFast()]
    uploads: Annotated[list[bytes], Field(max_length=MAX_ITEMS), FailFast()]
    results: Annotated[list[Result], Field(max_length=MAX_ITEMS), FailFast()]
    forget: Annotated[list[Result], Field(max_length=MAX_ITEMS), FailFast()] = []


class Answer(Message, frozen=True):
    """The results that a batch asked for, in its order."""

    results: Annotated[list[bytes], FailFast()]


class NewSession(Message, frozen=True):
    """circuit: its id; keys: SHA-256 of the evaluation keys that were uploaded."""

    circuit: Digest
    keys: Digest


class SessionOpened(Message, frozen=True):
    """expires_after: seconds without a request."""

    session: Identity
    expires_after: float


class KeyStatus(Message, frozen=True):
    """How much of a set of evaluation keys has arrived, in bytes."""

    received: int
    complete: bool


class Problem(Message, frozen=True):
    """Why a request was refused: a word for programs, a line for people."""

    code: str
    detail: str


M = TypeVar("M", bound=Message)

_RESULT = Result.model_fields.keys()


def pack(message: Message) -> bytes:
    data = msgpack.packb(message.model_dump(exclude_defaults=True))
    assert data is not None
    return data


def unpack(kind: type[M], data: bytes | bytearray) -> M:
    """Raises BadRequest, one line that quotes nothing of the data.

    What is in it is counted while it is read. It is read in small steps, so that other threads are not kept waiting.
    """
    left = MAX_PARTS

    def counted(container: Any) -> Any:
        nonlocal left
        left -= 1 + len(container)
        if left < 0:
            raise BadRequest(f"the request has more than {MAX_PARTS} parts")
        return container

    def built(fields: dict[Any, Any]) -> Any:
        """Results are by far the most of a batch."""
        return Result.model_validate(counted(fields)) if fields.keys() == _RESULT else counted(fields)

    try:
        content = msgpack.unpackb(
            data, object_hook=built, list_hook=counted, max_array_len=MAX_ITEMS, max_map_len=10, max_ext_len=0,
            max_str_len=1000,
        )  # fmt: skip
    except BadRequest:
        raise
    except ValidationError as error:
        raise BadRequest(describe(error)) from None
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise BadRequest(f"this is no MessagePack: {type(error).__name__}") from None
    return read(kind, content)


def read(kind: type[M], content: Any) -> M:
    """Raises BadRequest, one line that quotes nothing of the content."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise BadRequest(describe(error)) from None


def describe(error: ValidationError) -> str:
    """The first thing wrong, without the value that was wrong."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    place = ".".join(str(part) for part in first["loc"])[:100]
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    return f"{place or 'the request'}: {first['msg']}{more}"
