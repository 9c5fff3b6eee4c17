"""HTTP whose answers have a deadline as a whole: a timeout alone starts again with every byte."""

from __future__ import annotations

import ssl
import time
from typing import Any

import httpcore2

# What httpcore2's streams are asked for to get a `Stream` itself.
STREAM = "jaxgpt2.stream"

# Bytes that are written at a time, so that time is looked at between them.
SLICE = 1 << 16


class Stream(httpcore2.NetworkStream):
    """A connection on which a request and its answer must keep ahead of a pace. The answer's headers, and what comes
    before them (1xx, without end if a server likes), have no pace, and must be there in time.

    silence: seconds that a request and its answer may take, beside their bytes. pace: bytes a second.
    """

    def __init__(self, stream: httpcore2.NetworkStream, silence: float, pace: float):
        self._stream, self._silence, self._pace = stream, silence, pace
        self._until = time.monotonic() + silence
        self._answering = False

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        self._answering = True
        return self._stream.read(max_bytes, self._left(timeout, httpcore2.ReadTimeout))

    def moved(self, count: int) -> None:
        """So many bytes were of use, and give their time."""
        self._until += count / self._pace

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        if self._answering:  # the next request
            self._answering, self._until = False, time.monotonic() + self._silence
        for start in range(0, len(buffer), SLICE):
            part = buffer[start : start + SLICE]
            self._stream.write(part, self._left(timeout, httpcore2.WriteTimeout))
            self.moved(len(part))

    def _left(self, timeout: float | None, late: type[Exception]) -> float:
        """Seconds that the next operation may take."""
        left = self._until - time.monotonic()
        if left <= 0:
            raise late("it hardly moves")
        return left if timeout is None else min(timeout, left)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        return Stream(self._stream.start_tls(ssl_context, server_hostname, timeout), self._silence, self._pace)

    def get_extra_info(self, info: str) -> Any:
        return self if info == STREAM else self._stream.get_extra_info(info)


def stream_of(response: httpcore2.Response) -> Stream:
    """What an answer comes on. Bytes of its body are to be noted with `moved`; headers have no time but `silence`."""
    return response.extensions["network_stream"].get_extra_info(STREAM)


class Backend(httpcore2.SyncBackend):
    """Connections that are `Stream`s."""

    def __init__(self, silence: float, pace: float):
        self._silence, self._pace = silence, pace

    def connect_tcp(self, *arguments: Any, **options: Any) -> httpcore2.NetworkStream:
        return Stream(super().connect_tcp(*arguments, **options), self._silence, self._pace)
