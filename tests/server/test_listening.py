"""Addresses that cannot be had are said before anything is loaded."""

import socket

import pytest

from megatron_ee.errors import FieldError
from megatron_ee.server.listening import open_socket


def test_a_free_port_is_taken() -> None:
    with open_socket("127.0.0.1", 0) as own:
        assert own.getsockname()[1] > 0


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid", "a\u00e4" * 99])
def test_an_address_that_is_nobodys(host: str) -> None:
    with pytest.raises(FieldError, match=r"^serving\.host: "):
        open_socket(host, 0)


def test_a_port_that_is_taken() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(FieldError, match=r"^serving\.port: .*in use"):
            open_socket("127.0.0.1", taken.getsockname()[1])
