"""Settings for all tests."""

import ipaddress
import socket
import sys

import pytest


pytest_plugins = ["hub_fixtures"]


def _is_local(address):
    # Sockets of files have a path
    if not isinstance(address, tuple):
        return True
    try:
        return ipaddress.ip_address(address[0]).is_loopback
    except ValueError:
        return address[0] in ("localhost", "")


@pytest.fixture(scope="session", autouse=True)
def no_network():
    """Connections to other machines fail at once."""
    connect, look_up = socket.socket.connect, socket.getaddrinfo

    def connect_here(self, address):
        if not _is_local(address):
            raise OSError(f"tests use no network, but {address} was asked for")
        return connect(self, address)

    def look_up_here(host, *args, **kwargs):
        if host is not None and not _is_local((host if isinstance(host, str) else host.decode(),)):
            raise OSError(f"tests use no network, but {host!r} was asked for")
        return look_up(host, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(socket.socket, "connect", connect_here)
        patched.setattr(socket, "getaddrinfo", look_up_here)
        yield


@pytest.fixture(autouse=True)
def warnings_are_said_again():
    """A process says a warning about data once; a test counts as a process."""
    checks = sys.modules.get("vpt_peft.data.checks")
    if checks is not None:
        checks.warn_once.cache_clear()
