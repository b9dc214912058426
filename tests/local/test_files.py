"""Files and folders that another account may have planted: refused, never followed, and left as they are."""

from __future__ import annotations

import json
import os

import pytest

from tests.kit.cli import assert_one_line, run
from worker import config
from worker.files import UntrustedFileError, make_own_folder, open_own, read_own

ONLY_ROOT = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another account")

#: What may be at a path instead of our own file, and what the error says of it.
PLANTED = {
    "link": "is a symbolic link",
    "pipe": "is not a regular file",
    "writable": "Other users can write to",
    "another's": "belongs to the user nobody",
}
KINDS = [pytest.param(kind, marks=ONLY_ROOT) if kind == "another's" else kind for kind in PLANTED]
NOBODY = 65_534


def plant(path, kind, text="precious"):
    """Put a thing of this kind at `path`; returns the file whose content is at stake."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    target = path.with_name("target") if kind == "link" else path
    if kind == "pipe":
        os.mkfifo(path, 0o600)
        return None
    target.write_text(text)
    target.chmod(0o666 if kind == "writable" else 0o644)
    if kind == "link":
        path.symlink_to(target)
    if kind == "another's":
        os.chown(path, NOBODY, NOBODY)
    return target


@pytest.mark.parametrize("mode", ["r", "w", "a+"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_planted_file_is_neither_read_nor_changed(tmp_path, kind, mode):
    target = plant(tmp_path / "file", kind)
    expected = OSError if kind == "pipe" and mode == "w" else UntrustedFileError  # nobody reads from the pipe
    with pytest.raises(expected) as error:
        open_own(tmp_path / "file", mode)
    assert expected is OSError or PLANTED[kind] in str(error.value)
    assert target is None or target.read_text() == "precious"


def test_own_files_are_read_and_written_and_private(tmp_path):
    before = os.umask(0)
    try:
        with open_own(tmp_path / "file", "w") as file:
            file.write("a long text")
        with open_own(tmp_path / "file", "w") as file:
            file.write("text")
    finally:
        os.umask(before)
    assert read_own(tmp_path / "file") == "text"
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("kind", ["writable", pytest.param("another's", marks=ONLY_ROOT)])
def test_a_folder_that_others_can_change_is_refused(tmp_path, kind):
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(0o775 if kind == "writable" else 0o755)
    if kind == "another's":
        os.chown(folder, NOBODY, NOBODY)
    with pytest.raises(UntrustedFileError, match=r"folder.*TOKENTRAIL_HOME"):
        make_own_folder(folder, 0o700)


@ONLY_ROOT
def test_a_link_to_our_folder_that_another_user_made_is_refused(tmp_path):
    (tmp_path / "ours").mkdir(mode=0o700)
    (tmp_path / "link").symlink_to("ours")
    make_own_folder(tmp_path / "link", 0o700)
    os.lchown(tmp_path / "link", NOBODY, NOBODY)
    with pytest.raises(UntrustedFileError, match="belongs to the user nobody"):
        make_own_folder(tmp_path / "link", 0o700)


@pytest.mark.parametrize("name", ["up.lock", "data/password", "data/valkey.lock", "data/logs/guard.log"])
def test_up_opens_none_of_its_files_through_a_link(tmp_path, name):
    target = plant(tmp_path / "home" / name, "link")
    for folder in (tmp_path / "home", tmp_path / "home" / "data"):
        if folder.exists():
            folder.chmod(0o700)
    result = run("up", TOKENTRAIL_HOME=str(tmp_path / "home"))
    assert_one_line(result, 1, f"{tmp_path / 'home' / name} is a symbolic link")
    assert target.read_text() == "precious"


def test_up_refuses_a_folder_that_others_can_write_in(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home").chmod(0o777)
    assert_one_line(run("up", TOKENTRAIL_HOME=str(tmp_path / "home")), 1, f"Other users can write in {tmp_path}/home")


@pytest.mark.parametrize("kind", KINDS)
def test_commands_do_not_trust_planted_addresses(tokentrail, servers, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(config, "HOME", tmp_path / "home")
    plant(
        tmp_path / "home" / "servers.json", kind, json.dumps({"database_url": servers.database_url, "pid": os.getpid()})
    )
    assert_one_line(tokentrail("supply"), 2, "No database: ", PLANTED[kind], "DATABASE_URL")
