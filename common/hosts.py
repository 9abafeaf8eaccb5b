"""This host on the network: its address, its interfaces, a free port."""

import socket

import psutil


def own_address() -> str:
    """An address under which other hosts reach this one: its name's, or the first one that is not local."""
    try:
        address = socket.gethostbyname(socket.gethostname())
    except OSError:
        address = "127.0.0.1"
    if not address.startswith("127."):
        return address
    for entries in psutil.net_if_addrs().values():
        for entry in entries:
            if entry.family == socket.AF_INET and not entry.address.startswith("127."):
                return str(entry.address)
    return address


def free_port() -> int:
    """A TCP port of this host that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])


def interface_towards(host: str) -> str | None:
    """The network interface that leads to a host; gloo would take the one that this host's name stands for."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, entries in psutil.net_if_addrs().items():
        if any(entry.address == own for entry in entries):
            return str(name)
    return None
