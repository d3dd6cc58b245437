"""What must not leave this machine: secrets, paths of its disk, and addresses of its network."""

import ipaddress
import os
import re
from pathlib import Path

from huggingface_hub import get_token


SECRET = re.compile(
    r"(token|password|passwd|secret|credentials?|api_?key)$|(^|_)(key|pat|auth|secret_access_key)$", re.IGNORECASE
)
HUB_TOKEN = re.compile(r"\bhf_\w{8,}")
# Two components at least: `/` and `/think` are no paths. What comes before tells a path from a URL or a fraction.
ABSOLUTE_PATH = re.compile(r"(?:file://|(?<![\w./~]))/(?!/)(?:[\w.@+~-]+/)+[\w.@+~*-]*")
ADDRESS = re.compile(r"\b(https?://)(\[[\da-fA-F:]+\]|[\w.-]+)(:\d+)?")
SHORTEST_SECRET = 8


def without_tokens(text: str, token: str | None = None) -> str:
    """
    `text` with every secret this process knows replaced by `***`.

    Those are Hub tokens, whoever's, and the values of environment variables whose name says that they hold a secret.

    Args:
        text (`str`):
            Any text.
        token (`str`, *optional*):
            One more secret.
    """
    known = [value for name, value in os.environ.items() if SECRET.search(name)]
    for secret in sorted({(value or "").strip() for value in (*known, get_token(), token)}, key=len, reverse=True):
        if len(secret) >= SHORTEST_SECRET:
            text = text.replace(secret, "***")
    return HUB_TOKEN.sub("***", text)


def public_text(text: str, token: str | None = None) -> str:
    """
    `text` as strangers may read it: without secrets, without absolute paths, and without addresses of a network of one's own.

    A path below the current directory becomes relative to it; of any other one the last component stays.
    """
    text = ADDRESS.sub(lambda match: f"{match[1]}***" if is_own_host(match[2]) else match[0], text)
    return ABSOLUTE_PATH.sub(lambda match: _public_path(match[0]), without_tokens(text, token))


def is_own_host(host: str) -> bool:
    """Whether a host is of a network of one's own, and no provider's."""
    try:
        return not ipaddress.ip_address(host.strip("[]")).is_global
    except ValueError:
        return "." not in host or host.endswith((".local", ".internal", ".lan", ".localhost"))


def _public_path(path: str) -> str:
    path = path.removeprefix("file://")
    relative = os.path.relpath(path)
    return Path(path).name if relative.startswith("..") else relative
