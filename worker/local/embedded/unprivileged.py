"""PostgreSQL refuses to run as root: as whom it runs then, and in which folder that account can work.

An ordinary user needs none of this. For root, PostgreSQL alone runs as `nobody`. What `nobody` cannot
reach (below root's home, for one) is copied or made in /var/lib/tokentrail instead: opening up the parent
folders would show others what root meant to hide, and /var/tmp is emptied of old files on some systems.
"""

from __future__ import annotations

import importlib.metadata
import os
import pwd
import shutil
import tempfile
from pathlib import Path
from typing import NamedTuple

from worker.local.embedded.process import LOGS, EmbeddedError

#: Root's own folder for what nobody must reach.
SHELTER = Path("/var/lib/tokentrail")
#: In a data folder: a link to the place in SHELTER where its PostgreSQL really is.
ELSEWHERE = "postgresql-elsewhere"


class Account(NamedTuple):
    """As whom a server runs; fields of None are ourselves."""

    uid: int | None
    gid: int | None
    groups: tuple[int, ...] | None

    def own(self, path: Path) -> None:
        """Make the account the owner of `path`."""
        if self.uid is not None and self.gid is not None:
            os.chown(path, self.uid, self.gid)


def account() -> Account:
    """Whom PostgreSQL runs as. Raises EmbeddedError for a root without a `nobody`."""
    if os.geteuid() != 0:
        return Account(None, None, None)
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        raise EmbeddedError(
            "PostgreSQL refuses to run as root and there is no account `nobody` to run it as:"
            " run as an ordinary user, or set both DATABASE_URL and BROKER_URL."
        ) from None
    return Account(nobody.pw_uid, nobody.pw_gid, ())


def reachable(path: Path) -> bool:
    """Whether the account can enter or run `path`."""
    if os.geteuid() != 0:
        return True
    path = path.resolve()
    return all(each.stat().st_mode & 0o001 for each in (path, *path.parents))


def programs(folder: Path) -> Path:
    """The folder of PostgreSQL's programs or, when the account cannot run those, a copy of them."""
    if reachable(folder / "postgres"):
        return folder
    installation = folder.parent
    if not (installation / "share").is_dir() or not (installation.parent / "__init__.py").is_file():
        raise EmbeddedError(f"The account nobody cannot run {folder / 'postgres'}: open up its folders to it.")
    return _copy_of_package(installation.parent) / installation.name / folder.name


def _copy_of_package(package: Path) -> Path:
    """`package` (and the libraries that lie beside it), as a copy that everyone may read; made once."""
    copy = _shelter() / f"{package.name}-{importlib.metadata.version(package.name)}"
    if not copy.exists():
        half = Path(tempfile.mkdtemp(prefix="copying-", dir=SHELTER))
        for tree in (package, package.with_name(f"{package.name}.libs")):
            if tree.exists():
                shutil.copytree(tree, half / tree.name, ignore=shutil.ignore_patterns("include", "*.a"))
        for path in (half, *half.rglob("*")):
            if not path.is_symlink():
                mode = path.stat().st_mode
                path.chmod(mode | (mode & 0o500) >> 3 | (mode & 0o500) >> 6)
        try:
            half.rename(copy)
        except OSError:  # another process was first
            shutil.rmtree(half)
    return copy / package.name


def home(folder: Path) -> Path:
    """Where in `folder`, or instead of it, the account can keep a cluster; the same at every call."""
    link = folder / ELSEWHERE
    if not link.is_symlink():
        if reachable(folder):
            return folder
        place = Path(tempfile.mkdtemp(prefix="data-", dir=_shelter()))
        place.chmod(0o711)
        link.symlink_to(place)
    place = link.resolve()
    if not place.is_dir():
        raise EmbeddedError(f"The data of {folder} was in {place}, which is gone: bring it back, or remove {link}.")
    return place


def discard(folder: Path, *, except_logs: bool = False) -> None:
    """Remove a data folder and what is kept elsewhere for it. What is gone already is no error."""
    link = folder / ELSEWHERE
    if link.is_symlink():
        shutil.rmtree(link.resolve(), ignore_errors=True)
    for path in folder.glob("*") if except_logs else [folder]:
        if path.is_symlink() or path.is_file():
            path.unlink(missing_ok=True)
        elif path.name != LOGS:
            shutil.rmtree(path, ignore_errors=True)


def _shelter() -> Path:
    SHELTER.mkdir(mode=0o755, exist_ok=True)
    if SHELTER.is_symlink() or SHELTER.stat().st_uid != 0:
        raise EmbeddedError(f"{SHELTER} must be a folder that belongs to root.")
    SHELTER.chmod(0o755)  # whatever the umask was
    return SHELTER
