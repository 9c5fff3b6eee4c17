"""What a server gives its clients at most."""

from dataclasses import dataclass

MEGABYTE = 10**6


@dataclass(frozen=True)
class Limits:
    """Sizes are in bytes, times in seconds.

    body: of a batch. keys: all evaluation keys on disk. keys_per_client: sets of them. keys_in_memory: sets that a
    worker holds ready. sessions, sessions_per_client: open at once. session_size: ciphertexts of a session. idle:
    until a session that nobody uses is gone. queue: batches that wait. requests, requests_per_client: uploads and
    batches in flight. calls_per_minute: functions that a client may run, None for no limit. job: a batch's time.
    grace: how long requests may take to end when the server stops.
    """

    body: int = 64 * MEGABYTE
    keys: int = 20_000 * MEGABYTE
    keys_per_client: int = 4
    keys_in_memory: int = 2
    sessions: int = 1000
    sessions_per_client: int = 16
    session_size: int = 1000 * MEGABYTE
    idle: float = 3600.0
    queue: int = 64
    requests: int = 128
    requests_per_client: int = 16
    calls_per_minute: int | None = None
    job: float = 600.0
    grace: int = 60
