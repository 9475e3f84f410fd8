"""Whether the hub can be reached at all, asked once and quickly: without it, its client tries for half a minute before it says so."""

from __future__ import annotations

import os
import socket
from functools import cache
from urllib.parse import urlsplit

SECONDS = 3.0


@cache
def hub_reachable() -> bool:
    """Whether the hub's host accepts a connection; False when `HF_HUB_OFFLINE` is set."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True  # only the proxy can tell
    address = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection((address.hostname or "", address.port or (443 if address.scheme == "https" else 80)), SECONDS).close()
    except OSError:
        return False
    return True
