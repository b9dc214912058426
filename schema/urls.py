"""URLs of servers: the rules of a broker's URL, and URLs without their secrets."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urlsplit

SCHEMES: Final = ("redis", "rediss", "sentinel")

#: The message for a URL that cannot be read. It repeats nothing of the URL: any part of it may belong to the password.
UNREADABLE: Final = (
    "it cannot be read as an address: check its port, its database and its options, and write what is special in a"
    " password as %25 for %, %2F for /, %3F for ?, %23 for #, %40 for @, %3A for :, %3B for ;, %5B for [, %5D for ] and"
    " %20 for a space"
)

#: Blanks and control characters. urlsplit and libpq drop some of them, and a line break breaks a line of output.
BLANK: Final = re.compile(r"[\x00-\x20\x7f]")


def check_broker(url: str) -> None:
    """Raise ValueError, whose message repeats nothing of the URL, unless `url` can be read."""
    if not url.startswith(tuple(f"{scheme}://" for scheme in SCHEMES)):
        raise ValueError("must start with redis://, rediss:// or sentinel://")
    for part in url.split(";"):  # as kombu does
        try:
            parts = urlsplit(part)
            _ = parts.port
        except ValueError:
            raise ValueError(UNREADABLE) from None
        options = [each for each in parts.query.split("&") if each]
        if (
            parts.scheme not in SCHEMES
            or BLANK.search(part)
            or re.fullmatch(r"/?[0-9]*/?", parts.path) is None
            or parts.fragment
            or "@" in parts.query
            or not all("=" in each for each in options)
        ):
            raise ValueError(UNREADABLE)


def public_address(url: str) -> str:
    """A broker's URL without user, password and options, for logs and errors: host:6379/0."""
    parts = [part.partition("://")[2].partition("?")[0] for part in url.split(";")]
    return ";".join(part.rpartition("@")[2] for part in parts)


def mask_secrets(url: str, mask: str) -> str:
    """Any server's URL with `mask` instead of its password, and of its options where these may hold a secret."""
    return ";".join(_mask_one(part, mask) for part in re.split(r";(?=\w+://)", url))


def _mask_one(url: str, mask: str) -> str:
    # Up to the last @: a password may hold others.
    url = re.sub(
        r"://(?:([^:@/]*)(:))?.*@", lambda match: f"://{match[1] or ''}{match[2] or ''}{mask}@", url, flags=re.DOTALL
    )
    head, _, options = url.partition("?")
    secret = any(word in options.lower() for word in ("pass", "secret", "token", "key"))
    return f"{head}?{mask if secret else options}" if options else head
