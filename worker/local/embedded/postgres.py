"""An embedded PostgreSQL: its cluster, its settings, its end."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import ClassVar, Final, Literal

import psycopg
from psycopg import sql

from worker.files import open_own
from worker.local.embedded import binaries, unprivileged
from worker.local.embedded.process import EmbeddedError, ServerProcess, cannot_run, environment, password

NAME: Final = "tokentrail"  # of the superuser and of the database

SETTINGS: Final = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",  # the path of a socket may have 107 bytes, and ours may be longer
    "max_connections": "200",
    "shared_preload_libraries": "pg_stat_statements",
}
#: For servers whose data is thrown away: nothing has to survive a crash.
NOT_DURABLE: Final = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}

#: From this version on PostgreSQL brings the locale C.UTF-8 itself: the same order on every machine.
BUILTIN_LOCALE_SINCE: Final = 17

STOP_SIGNALS: Final = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}


class PostgresServer(ServerProcess):
    """A PostgreSQL on loopback with a superuser and an empty database, both called tokentrail."""

    title: ClassVar[str] = "PostgreSQL"
    name: ClassVar[str] = "postgresql"
    setting: ClassVar[str] = "TOKENTRAIL_PG_BIN"

    @property
    def url(self) -> str:
        return self._url(NAME)

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast", grace: float = 30) -> None:
        """Shut down in one of PostgreSQL's modes: smart waits for clients, immediate is a crash."""
        self._end(STOP_SIGNALS[mode], grace)

    def kill(self) -> None:
        """SIGKILL for the server and all its processes: a crash at one instant."""
        processes = self._child_processes()
        super().kill()
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _launch(self) -> None:
        account = unprivileged.account()
        programs = unprivileged.programs(binaries.postgres_folder())
        cluster = self._cluster(programs, account)
        settings = SETTINGS | ({} if self.durable else NOT_DURABLE) | self.options
        arguments = [argument for name, value in settings.items() for argument in ("-c", f"{name}={value}")]
        self._spawn([programs / "postgres", "-D", cluster, "-p", str(self.port), *arguments], **account.popen_options())

    def _answers(self) -> bool:
        try:
            connection = psycopg.connect(self._url("postgres"), autocommit=True, connect_timeout=5)
        except psycopg.OperationalError:  # not ready; if it never will be, its process ends
            return False
        with connection:
            try:
                exists = connection.execute("SELECT FROM pg_database WHERE datname = %s", [NAME]).rowcount
                if not exists:
                    connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(NAME)))
            except psycopg.Error:
                self.kill()
                raise self.failure("cannot create its database") from None
        return True

    def _cluster(self, programs: Path, account: unprivileged.Account) -> Path:
        """The folder of the cluster, created if there is none.

        Its name has the major version in it, because only that version can use it.
        """
        major = _major_version(programs)
        here = self.folder / f"postgresql-{major}"
        cluster = unprivileged.home(self.folder) / here.name
        if here != cluster and here.exists():
            raise EmbeddedError(f"The account nobody can no longer reach {here}: give it access to that folder.")
        if not cluster.exists():
            self._create_cluster(cluster, programs, account, major)
        elif not (self.folder / "password").exists():
            raise EmbeddedError(f"{self.folder / 'password'}, the password of {cluster}, is gone: restore that file.")
        return cluster

    def _create_cluster(self, cluster: Path, programs: Path, account: unprivileged.Account, major: int) -> None:
        # Created under another name and renamed at the end: a cluster of this name is always complete.
        draft = cluster.with_name(f"{cluster.name}.half")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(0o700)
        account.own(draft)
        password_file = cluster.with_name("initial-password")
        password_file.unlink(missing_ok=True)
        with open_own(password_file, "x") as file:
            file.write(password(self.folder))
        account.own(password_file)
        locale = ["--no-locale", "--encoding=UTF8"]
        if major >= BUILTIN_LOCALE_SINCE:
            locale += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        arguments = ["--auth=scram-sha-256", f"--username={NAME}", f"--pwfile={password_file}", *locale]
        if not self.durable:
            arguments.append("--no-sync")
        initdb = self._spawn([programs / "initdb", "-D", draft, *arguments], **account.popen_options()).process
        assert initdb is not None
        code = initdb.wait()
        password_file.unlink()
        if code:
            raise self.failure("cannot be set up by initdb")
        draft.rename(cluster)

    def _url(self, database: str) -> str:
        return f"postgresql://{NAME}:{password(self.folder)}@127.0.0.1:{self.port}/{database}"

    def _child_processes(self) -> list[int]:
        """The server's processes, on Linux; elsewhere they notice by themselves that the server has ended."""
        if not self.running:
            return []
        try:
            return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
        except FileNotFoundError:
            return []


def _major_version(programs: Path) -> int:
    program = programs / "postgres"
    try:
        answer = subprocess.run(  # noqa: S603 - the operator's choice, or the wheel's
            [program, "--version"], env=environment(), capture_output=True, text=True, errors="replace", check=False
        )
    except OSError as error:
        raise cannot_run(program, error.strerror, PostgresServer.setting) from None
    version = re.search(r"\d+", answer.stdout)
    if answer.returncode or version is None:
        output = " / ".join(f"{answer.stdout}{answer.stderr}".split("\n")).strip(" /")
        reason = output or f"--version exits with code {answer.returncode}"
        raise cannot_run(program, reason, PostgresServer.setting)
    return int(version.group())
