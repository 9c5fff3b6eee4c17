"""The socket of a server."""

import socket

import pytest

from jaxgpt2.serving.address import listen_on


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_answers_do_not_wait_for_acknowledgements(host):
    if host == "::1" and not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    with (
        listen_on(host, 0) as listener,
        socket.create_connection(listener.getsockname()[:2]),
        listener.accept()[0] as accepted,
    ):
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
