"""The settings, read once per process: from the environment, then from a running `tokentrail up`, then defaults."""

from __future__ import annotations

import json
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from schema import urls
from schema.messages import DEFAULT_QUEUE, MAX_AMOUNT
from worker.errors import TokentrailError
from worker.files import UntrustedFileError, read_own

if TYPE_CHECKING:
    from schema.publisher import Publisher

#: Where `tokentrail up` keeps its servers' data and writes their addresses (mode 0600).
HOME = Path(os.environ.get("TOKENTRAIL_HOME") or ".tokentrail")

#: The repository: where `python -m worker.cli` and Celery find our modules, and Alembic its migrations.
ROOT = Path(__file__).resolve().parent.parent

#: A name in a request's Host header.
_HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")


class ConfigError(TokentrailError):
    """A setting is missing or wrong; the message names it and says what to do."""

    exit_code: ClassVar = 2


class Settings(BaseSettings):
    """One field per setting, from the environment variable `TOKENTRAIL_<NAME>` unless the field names another."""

    model_config = SettingsConfigDict(env_prefix="TOKENTRAIL_", frozen=True, extra="ignore", env_ignore_empty=True)

    database_url: SecretStr | None = Field(
        None,
        validation_alias="DATABASE_URL",
        description="PostgreSQL, as postgresql://user:password@host:port/database. Not set: the server of a running"
        " `tokentrail up`; `up` and `demo` start one.",
    )
    broker_url: SecretStr | None = Field(
        None,
        validation_alias="BROKER_URL",
        description="Redis or Valkey, as redis://, rediss:// or sentinel://. Not set: the server of a running"
        " `tokentrail up`; `up` and `demo` start one.",
    )
    queue: str = Field(DEFAULT_QUEUE, description="The queue's name; lanes are <queue>.0, <queue>.1, …")
    transport: Literal["atomic", "stock"] = Field(
        "atomic",
        description="How workers fetch messages from Redis: atomic loses none; stock, the fallback, is kombu's own.",
    )
    max_amount: Annotated[int, Field(ge=1, le=10**20 - 1)] = Field(
        MAX_AMOUNT, description="The largest amount one event may carry, in tokens."
    )
    batch_size: Annotated[int, Field(ge=1, le=10_000)] = Field(
        500, description="At most this many events are applied in one database transaction."
    )
    burn_patience: Annotated[float, Field(ge=0, le=60)] = Field(
        2.0, description="Seconds a burn with an insufficient balance waits for its accrual."
    )
    visibility_timeout: Annotated[int, Field(ge=1, le=86_400)] = Field(
        30,
        description="Seconds without a heartbeat after which a worker's messages go back to the queue.",
    )
    lock_timeout: Annotated[float, Field(gt=0, le=60)] = Field(
        2.0,
        description="Seconds a batch waits for row locks before it goes on without the locked accounts. Less than"
        " `TOKENTRAIL_STATEMENT_TIMEOUT`.",
    )
    statement_timeout: Annotated[float, Field(gt=0, le=600)] = Field(
        30.0, description="Seconds one statement of the worker may take."
    )
    idle_in_transaction_timeout: Annotated[float, Field(gt=0, le=600)] = Field(
        10.0,
        description="Seconds after which PostgreSQL, or a waiting worker, ends a session that holds locks and does"
        " nothing (of a frozen worker).",
    )
    stripes: Annotated[int, Field(ge=1, le=1000)] = Field(
        16, description="Rows the global token balance is spread over, so that workers do not wait for one row lock."
    )
    api_host: str = Field("127.0.0.1", description="Address the read endpoint listens on.")
    allowed_hosts: str | None = Field(
        None,
        description="Further host names that API and Flower answer to, separated by commas, such as those of a"
        " gateway or of containers. IP addresses, localhost and this machine's name are always accepted.",
    )
    api_port: Annotated[int, Field(ge=1, le=65_535)] = Field(8000, description="Port the read endpoint listens on.")
    flower_port: Annotated[int, Field(ge=1, le=65_535)] = Field(
        5555, description="Port Flower listens on; `tokentrail flower` prefers FLOWER_PORT."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="Lowest level that is logged.")
    log_format: Literal["auto", "json", "console"] = Field(
        "auto", description="auto: console on a terminal, else json."
    )
    pg_bin: Path | None = Field(None, description="Folder of initdb and postgres, instead of the embedded ones.")
    valkey_server: Path | None = Field(
        None, description="A valkey-server or redis-server, instead of the embedded one."
    )

    @field_validator("log_level", "log_format", mode="before")
    @classmethod
    def _in_any_case(cls, value: object, info: ValidationInfo) -> object:
        if not isinstance(value, str):
            return value
        return value.upper() if info.field_name == "log_level" else value.lower()

    @field_validator("allowed_hosts")
    @classmethod
    def _are_host_names(cls, names: str | None) -> str | None:
        wrong = [name for name in _split(names) if not _HOST_NAME.fullmatch(name)]
        if wrong:
            raise ValueError(f"must be names separated by commas, without port or *, and {wrong[0]!r} is none")
        return names

    @field_validator("database_url", "broker_url", mode="before")
    @classmethod
    def _without_a_line_break(cls, url: object) -> object:
        return url.strip() if isinstance(url, str) else url  # a URL read from a file ends in one

    @field_validator("database_url")
    @classmethod
    def _is_a_postgresql_url(cls, url: SecretStr | None) -> SecretStr | None:
        if url:
            _check_postgresql(url.get_secret_value())
        return url

    @field_validator("broker_url")
    @classmethod
    def _is_a_redis_url(cls, url: SecretStr | None) -> SecretStr | None:
        if url:
            urls.check_broker(url.get_secret_value())
        return url

    @model_validator(mode="after")
    def _lock_wait_ends_before_the_statement(self) -> Self:
        if self.lock_timeout >= self.statement_timeout:  # else every wait for a lock would look like a slow statement
            raise ValueError(
                "TOKENTRAIL_LOCK_TIMEOUT is not usable: must be less than TOKENTRAIL_STATEMENT_TIMEOUT, which is"
                f" {self.statement_timeout} (it is {self.lock_timeout})."
            )
        return self

    def host_names(self) -> list[str]:
        """The names in `allowed_hosts`."""
        return _split(self.allowed_hosts)

    def database(self) -> str:
        """PostgreSQL's URL. Raises ConfigError when there is none."""
        if self.database_url is None:
            raise _missing("database", "DATABASE_URL")
        return self.database_url.get_secret_value()

    def broker(self) -> str:
        """Redis' URL. Raises ConfigError when there is none."""
        if self.broker_url is None:
            raise _missing("broker", "BROKER_URL")
        return self.broker_url.get_secret_value()

    def publisher(self, lanes: int = 0) -> Publisher:
        """A publisher to the queue. Raises ConfigError when there is no broker, or when its URL cannot be used."""
        from schema.publisher import Publisher  # noqa: PLC0415 - most commands need no Redis client

        try:
            return Publisher(self.broker(), self.queue, lanes)
        except ValueError as error:
            raise ConfigError(f"BROKER_URL is not usable: {error}.") from error


def _split(names: str | None) -> list[str]:
    return [name.strip() for name in (names or "").split(",") if name.strip()]


def _missing(server: str, variable: str) -> ConfigError:
    file = HOME / "servers.json"
    try:
        read_own(file)
    except (UntrustedFileError, PermissionError) as error:
        other = f"{file} belongs to another user's `tokentrail up`"
        fact = error.fact if isinstance(error, UntrustedFileError) else other
        return ConfigError(
            f"No {server}: {fact}; set {variable}, or start your own servers with `tokentrail up` in another folder"
            " (TOKENTRAIL_HOME)."
        )
    except (OSError, ValueError):
        pass
    return ConfigError(f"No {server}: set {variable}, or start the embedded servers with `tokentrail up`.")


def _check_postgresql(url: str) -> None:
    """Raise ValueError unless libpq can parse the URL as it was meant. The message repeats nothing of the URL."""
    from psycopg import ProgrammingError  # noqa: PLC0415 - without a DATABASE_URL nothing needs psycopg
    from psycopg.conninfo import conninfo_to_dict  # noqa: PLC0415

    if not url.startswith(("postgresql://", "postgres://")):
        raise ValueError("must start with postgresql://")
    try:
        parts = conninfo_to_dict(url)
    except ProgrammingError:
        raise ValueError(urls.UNREADABLE) from None
    ports = str(parts.get("port", "")).split(",")
    database = url.partition("://")[2].partition("/")[2].partition("?")[0]
    # A password with / or @ in it spills over into host, port and database.
    spilt = ("@" in url.partition("?")[0] and "@" in str(parts.get("host", ""))) or "@" in database
    if spilt or urls.BLANK.search(url) or not all(port.isdigit() for port in ports if port):
        raise ValueError(urls.UNREADABLE)


def _running_servers() -> dict[str, Any]:
    """The URLs that a running `tokentrail up` has written to TOKENTRAIL_HOME; empty if none runs."""
    try:
        servers = dict(json.loads(read_own(HOME / "servers.json")))
        pid = int(servers["pid"])
    except (OSError, ValueError, KeyError, TypeError, UntrustedFileError):  # no such file, or another user's
        return {}
    try:
        os.kill(pid, 0)  # a killed `up` leaves its file behind
    except PermissionError:
        pass  # it runs, as another user
    except (OSError, OverflowError):
        return {}
    return servers


@lru_cache(maxsize=1)
def load_settings() -> Settings:
    """The settings of this process, read at the first call.

    Raises ConfigError in one sentence that names the variable.
    """
    try:
        settings = Settings()
        servers = _running_servers()
        urls_of_servers: dict[str, Any] = {
            name: SecretStr(servers[name])
            for name in ("database_url", "broker_url")
            if getattr(settings, name) is None and name in servers
        }
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from None
    return settings.model_copy(update=urls_of_servers)


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    message = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:  # a rule that spans settings: its message is a whole sentence
        return message
    name = str(first["loc"][0])
    variable = name if name.isupper() else f"TOKENTRAIL_{name.upper()}"
    # Any part of a URL, however wrong, may be the password.
    value = "" if variable in {"DATABASE_URL", "BROKER_URL"} else f" (it is {first['input']!r})"
    return f"{variable} is not usable: {message}{value}."
