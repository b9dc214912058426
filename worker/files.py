"""Files and folders that are ours alone: what another account may have planted is neither followed nor believed."""

from __future__ import annotations

import errno
import os
import pwd
import stat
from pathlib import Path
from typing import IO, Any, Final

_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
#: Of a symbolic link that is not to be followed; BSDs say the second.
_LINKED: Final = (errno.ELOOP, errno.EMLINK)


class Untrusted(Exception):
    """Another account may have made or changed it; the message says why, and what to do."""

    def __init__(self, fact: str, advice: str) -> None:
        super().__init__(f"{fact}: {advice}.")
        self.fact = fact


def own_folder(path: Path, mode: int) -> None:
    """Make a folder, whatever the umask; one that is there must be ours, with none but us to write in it.

    Raises Untrusted. A symbolic link to it is fine where we or root have made that.
    """
    try:
        path.mkdir(0o700, parents=True)
    except FileExistsError:
        if not path.is_dir():
            raise
    else:
        path.chmod(mode)
        return
    us, link, found = os.geteuid(), path.lstat().st_uid, path.stat()
    if found.st_uid != us or link not in {us, 0}:
        owner = _named(found.st_uid if found.st_uid != us else link)
        raise Untrusted(f"{path} belongs to {owner}", "choose a folder of your own (TOKENTRAIL_HOME)")
    if found.st_mode & _OTHERS_WRITE:
        raise Untrusted(
            f"Others than you can write in {path}",
            f"look whether all in it is yours, then `chmod -R go-w {path}`, or choose another folder (TOKENTRAIL_HOME)",
        )


def open_ours(path: Path, mode: str) -> IO[Any]:
    """Open a file of ours as open() does, made readable for us alone where `mode` makes it.

    Raises Untrusted for a symbolic link, another's file, one that others can write to, or what is no file.
    """
    return open(path, mode, opener=_open)


def read_ours(path: Path) -> str:
    """The text of a file of ours. Raises Untrusted as `open_ours` does."""
    with open_ours(path, "r") as file:
        return str(file.read())


def _open(name: str, flags: int) -> int:
    # Never waits for the other end of a planted pipe, and cuts nothing off before it is known to be ours.
    safely = (flags & ~os.O_TRUNC) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(name, safely, 0o600)
    except OSError as error:
        if error.errno in _LINKED:
            raise _untrusted(f"{name} is a symbolic link") from None
        raise
    try:
        _look_at(name, os.fstat(descriptor))
        if flags & os.O_TRUNC:
            os.ftruncate(descriptor, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _look_at(name: str, found: os.stat_result) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise _untrusted(f"{name} is no file")
    if found.st_uid != os.geteuid():
        raise _untrusted(f"{name} belongs to {_named(found.st_uid)}")
    if found.st_mode & _OTHERS_WRITE:
        raise _untrusted(f"Others than you can write to {name}")


def _untrusted(fact: str) -> Untrusted:
    advice = "remove it, for somebody else may have planted it, or choose another folder (TOKENTRAIL_HOME)"
    return Untrusted(fact, advice)


def _named(uid: int) -> str:
    try:
        return f"the user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"the user with the number {uid}"
