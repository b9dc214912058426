"""Addresses of servers: whether a broker's can be read, and how one is shown without what is secret in it."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import urlsplit

SCHEMES: Final = ("redis", "rediss", "sentinel")

#: What to say of an address that cannot be read. Nothing of it is repeated: any part of it may be the password's.
UNREADABLE: Final = (
    "it cannot be read as an address: check its port, its database and its options, and write what is special in a"
    " password as %25 for %, %2F for /, %3F for ?, %23 for #, %40 for @, %3A for :, %3B for ;, %5B for [, %5D for ] and"
    " %20 for a space"
)

#: What no address holds as it is. urlsplit and libpq drop or keep some of it, and a line break breaks a line of output.
BLANK: Final = re.compile(r"[\x00-\x20\x7f]")


def check_broker(url: str) -> None:
    """Raise ValueError unless `url` can be read; what it says repeats nothing of the URL."""
    if not url.startswith(tuple(f"{scheme}://" for scheme in SCHEMES)):
        raise ValueError("must start with redis://, rediss:// or sentinel://")
    for part in url.split(";"):  # kombu cuts there too, whatever follows
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


def said(error: BaseException) -> str:
    """An error's words in one line, without what they repeat of our commands: the password is among those."""
    text = "; ".join(line.strip() for line in str(error).splitlines() if line.strip())
    text = re.split(r",? with args beginning with| : <redis", text)[0]  # Redis; Sentinel's client prints its objects
    return text.rstrip(".") or type(error).__name__


def shown(url: str) -> str:
    """The address of brokers without user, password and options, fit for a log: host:6379/0."""
    parts = [part.partition("://")[2].partition("?")[0] for part in url.split(";")]
    return ";".join(part.rpartition("@")[2] for part in parts)


def masked(url: str, mask: str) -> str:
    """An address of any server with `mask` for its password, and for its options where these may hold a secret."""
    return ";".join(_masked(part, mask) for part in re.split(r";(?=\w+://)", url))


def _masked(url: str, mask: str) -> str:
    # To the last @: whatever the password holds is before that.
    url = re.sub(
        r"://(?:([^:@/]*)(:))?.*@", lambda found: f"://{found[1] or ''}{found[2] or ''}{mask}@", url, flags=re.DOTALL
    )
    head, _, options = url.partition("?")
    secret = any(word in options.lower() for word in ("pass", "secret", "token", "key"))
    return f"{head}?{mask if secret else options}" if options else head
