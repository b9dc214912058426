"""Files and folders of this user only: what another account may have planted is neither followed nor trusted."""

from __future__ import annotations

import errno
import os
import pwd
import stat
from pathlib import Path
from typing import IO, Any, Final

from worker.errors import TokentrailError

_OTHERS_WRITE: Final = stat.S_IWGRP | stat.S_IWOTH
#: What open() with O_NOFOLLOW fails with for a symbolic link; the second on BSD.
_IS_LINK: Final = (errno.ELOOP, errno.EMLINK)


class UntrustedFileError(TokentrailError):
    """Another account may have made or changed a file; the message says why, and what to do."""

    def __init__(self, fact: str, advice: str) -> None:
        super().__init__(f"{fact}: {advice}.")
        self.fact = fact


def make_own_folder(path: Path, mode: int) -> None:
    """Make a folder, whatever the umask. One that exists must belong to this user, and only this user may write in it.

    Raises UntrustedFileError. A symbolic link to the folder is accepted if this user or root made it.
    """
    try:
        path.mkdir(0o700, parents=True)
    except FileExistsError:
        if not path.is_dir():
            raise
    else:
        path.chmod(mode)
        return
    user, link_owner, status = os.geteuid(), path.lstat().st_uid, path.stat()
    if status.st_uid != user or link_owner not in {user, 0}:
        owner = _user_name(status.st_uid if status.st_uid != user else link_owner)
        raise UntrustedFileError(f"{path} belongs to {owner}", "choose your own folder (TOKENTRAIL_HOME)")
    if status.st_mode & _OTHERS_WRITE:
        raise UntrustedFileError(
            f"Other users can write in {path}",
            f"check that all files in it are yours, then run `chmod -R go-w {path}`, or choose another folder"
            " (TOKENTRAIL_HOME)",
        )


def open_own(path: Path, mode: str) -> IO[Any]:
    """Open a file of this user as open() does; a new one is readable for this user only.

    Raises UntrustedFileError for a symbolic link, another user's file, one that others can write to, and for anything
    but a regular file.
    """
    return open(path, mode, opener=_open)


def read_own(path: Path) -> str:
    """The text of a file of this user. Raises UntrustedFileError as `open_own` does."""
    with open_own(path, "r") as file:
        return str(file.read())


def _open(name: str, flags: int) -> int:
    # Does not wait for the other end of a planted pipe, and truncates only after the checks.
    safe_flags = (flags & ~os.O_TRUNC) | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        descriptor = os.open(name, safe_flags, 0o600)
    except OSError as error:
        if error.errno in _IS_LINK:
            raise _untrusted(f"{name} is a symbolic link") from None
        raise
    try:
        _check(name, os.fstat(descriptor))
        if flags & os.O_TRUNC:
            os.ftruncate(descriptor, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check(name: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise _untrusted(f"{name} is not a regular file")
    if status.st_uid != os.geteuid():
        raise _untrusted(f"{name} belongs to {_user_name(status.st_uid)}")
    if status.st_mode & _OTHERS_WRITE:
        raise _untrusted(f"Other users can write to {name}")


def _untrusted(fact: str) -> UntrustedFileError:
    advice = "remove it, because another user may have planted it, or choose another folder (TOKENTRAIL_HOME)"
    return UntrustedFileError(fact, advice)


def _user_name(uid: int) -> str:
    try:
        return f"the user {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"the user with the number {uid}"
