"""Who a server's clients are, and how much of it each may use at once."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import limits as rates
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from jaxgpt2.serving.files import APIError
from jaxgpt2.serving.limits import Limits

# Whoever has no token is this client, where the server asks for none.
ANYBODY = "anybody"

# The client of this name may read /metrics, which tell of all clients, and nothing else.
METRICS = "metrics"

# Bytes of bodies that are here at once, of all clients; half as many of one. A body alone may be larger.
MOST_HELD = 10**9


class Accounts:
    """tokens: client's name by the SHA-256 of its token; None asks for none."""

    def __init__(self, tokens: Mapping[str, str] | None, limits: Limits):
        self.tokens, self.limits = tokens, limits
        self.in_flight: Counter[str] = Counter()
        self.held: Counter[str] = Counter()
        self.rates = MovingWindowRateLimiter(MemoryStorage())

    def client(self, token: str | None) -> str:
        """Whose token this is. Raises APIError."""
        if self.tokens is None:
            return ANYBODY
        name = None if token is None else self.tokens.get(hashlib.sha256(token.encode()).hexdigest())
        if name is None:
            raise APIError(401, "unauthorized", "this server wants a bearer token that it knows")
        return name

    def user(self, token: str | None) -> str:
        """The same, where it is no token for /metrics. Raises APIError."""
        name = self.client(token)
        if name == METRICS:
            raise APIError(403, "metrics_only", "this token reads /metrics, and no more")
        return name

    def check_reads_metrics(self, token: str | None) -> None:
        """Raises APIError unless whoever has this token may read /metrics."""
        if self.client(token) != METRICS and self.tokens is not None:
            raise APIError(403, "metrics_only", f"/metrics is for the client named {METRICS}")

    @contextlib.contextmanager
    def room(self, client: str) -> Iterator[Callable[[int], None]]:
        """Room for a body that comes. Yields what takes so many bytes more of it, until the end, and raises APIError if
        other bodies leave none."""
        taken = 0

        def take(size: int) -> None:
            nonlocal taken
            others, own = self.held.total() - taken, self.held[client] - taken
            taken += size
            self.held[client] += size
            if (others and others + taken > MOST_HELD) or (own and own + taken > MOST_HELD // 2):
                raise APIError(503, "busy", "the bodies of other requests leave no room for this one", retry_after=1)

        try:
            yield take
        finally:
            self.held[client] -= taken
            if not self.held[client]:
                del self.held[client]

    @contextlib.contextmanager
    def admitted(self, client: str) -> Iterator[None]:
        """One more request in flight. Raises APIError if there are too many."""
        if self.in_flight[client] >= self.limits.requests_per_client:
            raise APIError(429, "in_flight", "too many requests of this client at once", retry_after=1)
        if self.in_flight.total() >= self.limits.requests:
            raise APIError(503, "busy", "too many requests at once", retry_after=1)
        self.in_flight[client] += 1
        try:
            yield
        finally:
            self.in_flight[client] -= 1
            if not self.in_flight[client]:
                del self.in_flight[client]

    def count_calls(self, client: str, calls: int) -> None:
        """Raises APIError if the client has run too many functions lately."""
        limit = self.limits.calls_per_minute
        if limit is None or not calls:
            return
        rate = rates.RateLimitItemPerMinute(limit)
        if calls > limit:
            raise APIError(422, "rate", f"a batch of {calls} calls, and this server runs {limit} in a minute")
        if not self.rates.hit(rate, client, cost=calls):
            reset = self.rates.get_window_stats(rate, client).reset_time - time.time()
            raise APIError(429, "rate", f"this server runs {limit} functions a minute for a client", max(reset, 1))
