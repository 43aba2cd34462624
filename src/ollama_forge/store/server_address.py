"""Where a running Ollama listens: `OLLAMA_HOST` to an address. Text in, frozen value out; nothing here connects.

Rules: envconfig/config.go:22 of Ollama v0.33, and for the client's side of 0.0.0.0 and [::] line 66.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass

from ollama_forge.errors import UsageError

DEFAULT_PORT = 11434
_SCHEME_PORTS = {"http": 80, "https": 443}
_INTEGER = re.compile(r"[+-]?[0-9]+")


@dataclass(frozen=True)
class ServerAddress:
    """An address that a client can connect to.

    Attributes:
        scheme: `http` or `https`.
        host: a name, or an IP address without brackets.
        path: what a proxy in front of Ollama wants before `/api`, without slashes at its ends.
    """

    scheme: str
    host: str
    port: int
    path: str = ""

    @property
    def url(self) -> str:
        """The address without a slash at its end."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}" + (f"/{self.path}" if self.path else "")

    @property
    def is_local(self) -> bool:
        """Whether it is this machine by name. (A tunnel or a container on a local port is local by name too.)"""
        name = self.host.lower().rstrip(".")
        if name == "localhost" or name.endswith(".localhost") or name == socket.gethostname().lower():
            return True
        try:
            return ipaddress.ip_address(name.partition("%")[0]).is_loopback
        except ValueError:
            return False


def find_address(environ: Mapping[str, str] = os.environ) -> ServerAddress:
    """The address that `OLLAMA_HOST` names, or Ollama's default."""
    return parse_address(environ.get("OLLAMA_HOST", ""))


def parse_address(text: str) -> ServerAddress:
    """Read an `OLLAMA_HOST` value as Ollama does: `host`, `host:port`, `scheme://host[:port][/path]`.

    An address that listens everywhere (0.0.0.0, [::], no host) becomes loopback; a port that is none, the default one.

    Raises:
        UsageError: a scheme other than http and https, or a user name in it.
    """
    value = text.strip().strip("\"'").strip()
    scheme, separator, rest = value.partition("://")
    default_port = DEFAULT_PORT
    if not separator:
        scheme, rest = "http", value
        if value == "ollama.com":
            scheme, rest = "https", "ollama.com:443"
    else:
        default_port = _SCHEME_PORTS.get(scheme, DEFAULT_PORT)
    rest, _, path = rest.partition("/")
    if scheme not in _SCHEME_PORTS or "@" in rest or any(character.isspace() for character in rest):
        raise UsageError(
            f"{_without_password(text)!r} is not an address of Ollama",
            why="It is written host, host:port or http(s)://host:port, without a user name.",
            next="Example: OLLAMA_HOST=http://192.168.1.5:11434",
        )
    host, port_text = _split_port(rest)
    if port_text is None:
        host, port = _bare_host(rest), default_port
    else:
        port = int(port_text) if _INTEGER.fullmatch(port_text) and len(port_text) < 10 else -1
        port = port if 0 <= port <= 65535 else default_port
    return ServerAddress(scheme, _connectable(host), port, path.strip("/"))


def _split_port(text: str) -> tuple[str, str | None]:
    """Host and port as Go's net.SplitHostPort finds them; no port where it would give an error."""
    host, separator, port = text.rpartition(":")
    if not separator:
        return text, None
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        return (host, port) if "[" not in host and "]" not in host else (text, None)
    return (host, port) if not set(":[]") & set(host) and not set("[]") & set(port) else (text, None)


def _bare_host(text: str) -> str:
    inner = text.strip("[]")
    try:
        return str(ipaddress.ip_address(inner))
    except ValueError:
        return text or "127.0.0.1"


def _connectable(host: str) -> str:
    if not host:
        return "127.0.0.1"
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.is_unspecified:
        return "127.0.0.1" if address.version == 4 else "::1"
    return str(address)


def _without_password(text: str) -> str:
    return re.sub(r"[^/@]*@", "...@", text)
