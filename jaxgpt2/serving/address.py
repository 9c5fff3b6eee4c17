"""The address that a server listens on."""

import socket

from jaxgpt2.errors import InputError


def listen_on(host: str, port: int) -> socket.socket:
    """A socket that listens; whoever connects waits until it is served. port: 0 takes a free one.

    Raises:
        InputError: the port is taken, or the address is not this machine's.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Headers and body are two writes, and the second one would wait for an acknowledgement of the first.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.bind((host, port))
        listener.listen()
    except (OSError, UnicodeError) as error:
        listener.close()
        reason = getattr(error, "strerror", None) or "that is no address"
        raise InputError(f"cannot listen on {host}, port {port}: {reason.lower()}") from None
    return listener
