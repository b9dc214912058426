"""For root only: PostgreSQL refuses to run as root, so it runs as `nobody`, in folders which that account can reach.

Programs and data that `nobody` cannot reach (below root's home, for example) are copied to or created in
/var/lib/tokentrail: opening the parent folders would show others what root hides, and some systems delete old files
from /var/tmp.
"""

from __future__ import annotations

import importlib.metadata
import os
import pwd
import shutil
import tempfile
from pathlib import Path
from typing import Any, Final, NamedTuple

from worker.local.embedded.process import LOGS, EmbeddedError

#: A folder that belongs to root and that every account can enter.
SHARED_FOLDER: Final = Path("/var/lib/tokentrail")
#: In a data folder: a link to the folder in SHARED_FOLDER that holds the cluster instead.
LINK: Final = "postgresql-elsewhere"


class Account(NamedTuple):
    """The account that PostgreSQL runs as; None for our own."""

    uid: int | None
    gid: int | None

    def own(self, path: Path) -> None:
        """Make the account the owner of `path`."""
        if self.uid is not None and self.gid is not None:
            os.chown(path, self.uid, self.gid)

    def popen_options(self) -> dict[str, Any]:
        """The options with which Popen starts a process as this account."""
        return {} if self.uid is None else {"user": self.uid, "group": self.gid, "extra_groups": ()}


def account() -> Account:
    """The account that PostgreSQL runs as. Raises EmbeddedError for root where there is no `nobody`."""
    if os.geteuid() != 0:
        return Account(None, None)
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        raise EmbeddedError(
            "PostgreSQL refuses to run as root, and there is no account `nobody`: run this as an ordinary user, or set"
            " DATABASE_URL and BROKER_URL to other servers."
        ) from None
    return Account(nobody.pw_uid, nobody.pw_gid)


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
        raise EmbeddedError(f"The account nobody cannot run {folder / 'postgres'}: give it access to that folder.")
    return _copy_of_package(installation.parent) / installation.name / folder.name


def _copy_of_package(package: Path) -> Path:
    """A copy of `package` and its libraries that every account can read; made once."""
    copy = _shared_folder() / f"{package.name}-{importlib.metadata.version(package.name)}"
    if not copy.exists():
        draft = Path(tempfile.mkdtemp(prefix="copying-", dir=SHARED_FOLDER))
        for tree in (package, package.with_name(f"{package.name}.libs")):
            if tree.exists():
                shutil.copytree(tree, draft / tree.name, ignore=shutil.ignore_patterns("include", "*.a"))
        for path in (draft, *draft.rglob("*")):
            if not path.is_symlink():
                mode = path.stat().st_mode
                path.chmod(mode | (mode & 0o500) >> 3 | (mode & 0o500) >> 6)
        try:
            draft.rename(copy)
        except OSError:  # another process made it meanwhile
            shutil.rmtree(draft)
    return copy / package.name


def home(folder: Path) -> Path:
    """The folder for the cluster: `folder` or, if the account cannot reach that, one that `folder` links to."""
    link = folder / LINK
    if not link.is_symlink():
        if reachable(folder):
            return folder
        place = Path(tempfile.mkdtemp(prefix="data-", dir=_shared_folder()))
        place.chmod(0o711)
        link.symlink_to(place)
    place = link.resolve()
    if not place.is_dir():
        raise EmbeddedError(f"{place}, which holds the data of {folder}, is gone: restore it, or remove {link}.")
    return place


def discard(folder: Path, *, except_logs: bool = False) -> None:
    """Remove a data folder and the cluster that it links to. No error if they are gone."""
    link = folder / LINK
    if link.is_symlink():
        shutil.rmtree(link.resolve(), ignore_errors=True)
    for path in folder.glob("*") if except_logs else [folder]:
        if path.is_symlink() or path.is_file():
            path.unlink(missing_ok=True)
        elif path.name != LOGS:
            shutil.rmtree(path, ignore_errors=True)


def _shared_folder() -> Path:
    SHARED_FOLDER.mkdir(mode=0o755, exist_ok=True)
    if SHARED_FOLDER.is_symlink() or SHARED_FOLDER.stat().st_uid != 0:
        raise EmbeddedError(f"{SHARED_FOLDER} must be a folder that belongs to root.")
    SHARED_FOLDER.chmod(0o755)  # whatever the umask was
    return SHARED_FOLDER
