"""One PostgreSQL of our own: its cluster, its settings, its end."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path
from typing import ClassVar, Literal

import psycopg
from psycopg import sql

from worker.files import open_ours
from worker.local.embedded import binaries, unprivileged
from worker.local.embedded.process import EmbeddedError, ServerProcess, does_not_run, environment, password

NAME = "tokentrail"  # of the superuser and of the database

SETTINGS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",  # a socket's path may have 107 bytes: ours may be longer
    "max_connections": "200",
    "shared_preload_libraries": "pg_stat_statements",
}
#: For clusters that are thrown away: nothing of them has to survive a crash.
WITHOUT_SYNCING = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}

#: From this version on the locale C.UTF-8 is part of PostgreSQL: the same order on every machine.
BUILTIN_LOCALE_SINCE = 17

STOP_SIGNALS = {"smart": signal.SIGTERM, "fast": signal.SIGINT, "immediate": signal.SIGQUIT}


class PostgresServer(ServerProcess):
    """A PostgreSQL on loopback with a superuser and an empty database, both called tokentrail."""

    title: ClassVar[str] = "PostgreSQL"
    name: ClassVar[str] = "postgresql"
    variable: ClassVar[str] = "TOKENTRAIL_PG_BIN"

    @property
    def url(self) -> str:
        return self._url(NAME)

    def stop(self, mode: Literal["smart", "fast", "immediate"] = "fast", seconds: float = 30) -> None:
        """End as PostgreSQL's manual says of `mode`: smart waits for its clients, immediate is a crash."""
        self._end(STOP_SIGNALS[mode], seconds)

    def kill(self) -> None:
        """SIGKILL for the server and every process of it: a crash at one instant."""
        processes = self._children()
        super().kill()
        for pid in processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _launch(self) -> subprocess.Popen[bytes]:
        account = unprivileged.account()
        programs = unprivileged.programs(binaries.postgres_folder())
        cluster = self._cluster(programs, account)
        settings = SETTINGS | ({} if self.durable else WITHOUT_SYNCING) | self.options
        arguments = [argument for name, value in settings.items() for argument in ("-c", f"{name}={value}")]
        return self._spawn([programs / "postgres", "-D", cluster, "-p", str(self.port), *arguments], account)

    def _answers(self) -> bool:
        try:
            with psycopg.connect(self._url("postgres"), autocommit=True, connect_timeout=5) as connection:
                found = connection.execute("SELECT FROM pg_database WHERE datname = %s", [NAME]).rowcount
                if not found:
                    connection.execute(sql.SQL("CREATE DATABASE {}").format(sql.Identifier(NAME)))
        except psycopg.errors.DiskFull:
            self.kill()  # each further try would take more, until it crashes
            raise self.failure("PostgreSQL cannot make its database") from None
        except psycopg.OperationalError:  # not yet: why not for good is in the log, which is looked at then
            return False
        return True

    def _cluster(self, programs: Path, account: unprivileged.Account) -> Path:
        """The folder of the cluster, made if there is none; its name has the major version in it,
        for a cluster can only be used by the version that made it.
        """
        major = _major(programs)
        here = self.folder / f"postgresql-{major}"
        cluster = unprivileged.home(self.folder) / here.name
        if here != cluster and here.exists():
            raise EmbeddedError(f"The account nobody can no longer reach {here}: open up its folders to it.")
        if not cluster.exists():
            self._make_cluster(cluster, programs, account, major)
        elif not (self.folder / "password").exists():
            raise EmbeddedError(f"{cluster} was made with a password that {self.folder} no longer has.")
        return cluster

    def _make_cluster(self, cluster: Path, programs: Path, account: unprivileged.Account, major: int) -> None:
        # Made beside its place and then renamed: a cluster that is there is a complete one.
        half = cluster.with_name(f"{cluster.name}.half")
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir(0o700)
        account.own(half)
        secret = cluster.with_name("initial-password")
        secret.unlink(missing_ok=True)
        with open_ours(secret, "x") as file:
            file.write(password(self.folder))
        account.own(secret)
        locale = ["--no-locale", "--encoding=UTF8"]
        if major >= BUILTIN_LOCALE_SINCE:
            locale += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
        arguments = ["--auth=scram-sha-256", f"--username={NAME}", f"--pwfile={secret}", *locale]
        if not self.durable:
            arguments.append("--no-sync")
        status = self._spawn([programs / "initdb", "-D", half, *arguments], account).wait()
        secret.unlink()
        if status:
            raise self.failure("PostgreSQL's initdb failed")
        half.rename(cluster)

    def _url(self, database: str) -> str:
        return f"postgresql://{NAME}:{password(self.folder)}@127.0.0.1:{self.port}/{database}"

    def _children(self) -> list[int]:
        """The server's processes, where the kernel lists them; elsewhere they notice its death themselves."""
        if not self.running:
            return []
        try:
            return [int(pid) for pid in Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()]
        except FileNotFoundError:
            return []


def _major(programs: Path) -> int:
    program = programs / "postgres"
    try:
        said = subprocess.run(  # noqa: S603  the operator's choice, or the wheel's
            [program, "--version"], env=environment(), check=True, capture_output=True, text=True, errors="replace"
        ).stdout
    except OSError as error:
        raise does_not_run(program, error.strerror, PostgresServer.variable) from None
    except subprocess.CalledProcessError as error:
        why = " / ".join(map(str.strip, error.stderr.strip().splitlines())) or f"it ends with status {error.returncode}"
        raise does_not_run(program, why, PostgresServer.variable) from None
    found = re.search(r"\d+", said)
    if found is None:
        raise EmbeddedError(f"{program} does not tell its version: it says {said.strip()!r}.")
    return int(found.group())
