"""Every setting, read once at start: environment, then a running `tokentrail up`, then defaults."""

from __future__ import annotations

import json
import os
import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from psycopg import ProgrammingError
from psycopg.conninfo import conninfo_to_dict
from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from schema import urls
from schema.messages import DEFAULT_QUEUE
from schema.publisher import Publisher
from worker.files import Untrusted, read_ours

#: Where `tokentrail up` keeps its servers' data and writes their addresses (mode 0600).
HOME = Path(os.environ.get("TOKENTRAIL_HOME") or ".tokentrail")

#: The repository: where `python -m worker.cli` and Celery find our modules, and Alembic its migrations.
ROOT = Path(__file__).resolve().parent.parent

#: A name as it stands in a request's Host header.
_HOST_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")


class ConfigError(Exception):
    """A setting is missing or wrong; the message says which, and what to do."""


class Settings(BaseSettings):
    """What can be set, with the environment variable `TOKENTRAIL_<NAME>` unless another is named."""

    model_config = SettingsConfigDict(env_prefix="TOKENTRAIL_", frozen=True, extra="ignore", env_ignore_empty=True)

    database_url: SecretStr | None = Field(
        None,
        validation_alias="DATABASE_URL",
        description="PostgreSQL, as postgresql://user:password@host:port/database. Not set: that of a running"
        " `tokentrail up`; `up` and `demo` start one.",
    )
    broker_url: SecretStr | None = Field(
        None,
        validation_alias="BROKER_URL",
        description="Redis or Valkey, as redis://, rediss:// or sentinel://. Not set: that of a running"
        " `tokentrail up`; `up` and `demo` start one.",
    )
    queue: str = Field(DEFAULT_QUEUE, description="The queue's name; lanes are <queue>.0, <queue>.1, …")
    transport: Literal["atomic", "stock"] = Field(
        "atomic",
        description="How workers take messages from Redis: atomic loses none; stock is kombu's own, to fall back on.",
    )
    max_amount: Annotated[int, Field(ge=1, le=10**20 - 1)] = Field(
        10**12, description="The largest amount one event may carry, in tokens."
    )
    batch_size: Annotated[int, Field(ge=1, le=10_000)] = Field(
        500, description="At most this many events are applied in one database transaction."
    )
    burn_patience: Annotated[float, Field(ge=0, le=60)] = Field(
        2.0, description="Seconds a burn that meets too small a balance waits for its accrual."
    )
    visibility_timeout: Annotated[int, Field(ge=1, le=86_400)] = Field(
        30,
        description="Seconds without a sign of life after which a worker's messages go back to the queue.",
    )
    lock_timeout: Annotated[float, Field(gt=0, le=60)] = Field(
        2.0,
        description="Seconds a batch waits for another's row locks before it goes on without the accounts that are"
        " locked. Less than `TOKENTRAIL_STATEMENT_TIMEOUT`.",
    )
    statement_timeout: Annotated[float, Field(gt=0, le=600)] = Field(
        30.0, description="Seconds any one statement of the worker may take."
    )
    idle_in_transaction_timeout: Annotated[float, Field(gt=0, le=600)] = Field(
        10.0,
        description="Seconds after which PostgreSQL, or a waiting worker, ends the session of one that holds locks and"
        " does nothing (a frozen one).",
    )
    stripes: Annotated[int, Field(ge=1, le=1000)] = Field(
        16, description="Rows the global token balance is spread over, so that workers do not wait for one."
    )
    api_host: str = Field("127.0.0.1", description="Address the read endpoint listens on.")
    allowed_hosts: str | None = Field(
        None,
        description="Names by which API and Flower may be asked, such as those that a gateway or other containers use:"
        " separated by commas. Addresses, localhost and this machine's own name always are.",
    )
    api_port: Annotated[int, Field(ge=1, le=65_535)] = Field(8000, description="Port the read endpoint listens on.")
    flower_port: Annotated[int, Field(ge=1, le=65_535)] = Field(
        5555, description="Port Flower listens on; to `tokentrail flower`, FLOWER_PORT goes before it."
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="What is logged, and above.")
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
    def _names_only(cls, names: str | None) -> str | None:
        wrong = [name for name in _listed(names) if not _HOST_NAME.fullmatch(name)]
        if wrong:
            raise ValueError(f"must be names separated by commas, without port or *, and {wrong[0]!r} is none")
        return names

    @field_validator("database_url", "broker_url", mode="before")
    @classmethod
    def _without_a_line_break(cls, url: object) -> object:
        return url.strip() if isinstance(url, str) else url  # what is read from a file ends in one

    @field_validator("database_url")
    @classmethod
    def _an_address_of_postgresql(cls, url: SecretStr | None) -> SecretStr | None:
        if url:
            _check_database(url.get_secret_value())
        return url

    @field_validator("broker_url")
    @classmethod
    def _an_address_of_redis(cls, url: SecretStr | None) -> SecretStr | None:
        if url:
            urls.check_broker(url.get_secret_value())
        return url

    def host_names(self) -> list[str]:
        """The names in `allowed_hosts`."""
        return _listed(self.allowed_hosts)

    def database(self) -> str:
        """PostgreSQL's URL, or ConfigError when there is none."""
        if self.database_url is None:
            raise _missing("database", "DATABASE_URL")
        return self.database_url.get_secret_value()

    def broker(self) -> str:
        """Redis' URL, or ConfigError when there is none."""
        if self.broker_url is None:
            raise _missing("broker", "BROKER_URL")
        return self.broker_url.get_secret_value()

    def publisher(self, lanes: int = 0) -> Publisher:
        """A publisher to the queue, or ConfigError when there is no broker or its URL cannot be used."""
        try:
            return Publisher(self.broker(), self.queue, lanes)
        except ValueError as error:
            raise ConfigError(f"BROKER_URL is not usable: {error}.") from error


def _listed(names: str | None) -> list[str]:
    return [name.strip() for name in (names or "").split(",") if name.strip()]


def _missing(what: str, variable: str) -> ConfigError:
    file = HOME / "servers.json"
    try:
        read_ours(file)
    except (Untrusted, PermissionError) as error:
        fact = error.fact if isinstance(error, Untrusted) else f"{file} belongs to another user's `tokentrail up`"
        return ConfigError(
            f"No {what}: {fact}; set {variable}, or start your own servers with `tokentrail up` in another folder"
            " (TOKENTRAIL_HOME)."
        )
    except (OSError, ValueError):
        pass
    return ConfigError(f"No {what}: set {variable}, or start the embedded servers with `tokentrail up`.")


def _check_database(url: str) -> None:
    """Raise ValueError, which repeats nothing of the URL, unless libpq can read it, and reads what was meant."""
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
    """The addresses that a running `tokentrail up` of this folder has written, else nothing."""
    try:
        found = dict(json.loads(read_ours(HOME / "servers.json")))
        pid = int(found["pid"])
    except (OSError, ValueError, KeyError, TypeError, Untrusted):  # not there, or not ours; who needs it says so
        return {}
    try:
        os.kill(pid, 0)  # of one that was killed, the addresses are nobody's
    except PermissionError:
        pass  # it runs, as another user
    except (OSError, OverflowError):
        return {}
    return found


@lru_cache(maxsize=1)
def settings() -> Settings:
    """The settings of this process.

    Raises ConfigError in one sentence that names the variable.
    """
    try:
        found = Settings()
        servers = _running_servers()
        update: dict[str, Any] = {
            name: SecretStr(servers[name])
            for name in ("database_url", "broker_url")
            if getattr(found, name) is None and name in servers
        }
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from None
    if found.lock_timeout >= found.statement_timeout:  # or every wait for a lock would look like a slow statement
        raise ConfigError(
            "TOKENTRAIL_LOCK_TIMEOUT is not usable: must be less than TOKENTRAIL_STATEMENT_TIMEOUT, which is"
            f" {found.statement_timeout} (it is {found.lock_timeout})."
        )
    return found.model_copy(update=update)


def _sentence(error: ValidationError) -> str:
    first = error.errors()[0]
    name = str(first["loc"][0])
    variable = name if name.isupper() else f"TOKENTRAIL_{name.upper()}"
    # Whatever stands in an address, however wrong that is, may be a password.
    shown = "" if variable in {"DATABASE_URL", "BROKER_URL"} else f" (it is {first['input']!r})"
    return f"{variable} is not usable: {first['msg'].removeprefix('Value error, ')}{shown}."
