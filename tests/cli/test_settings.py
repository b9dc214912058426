"""Settings: URLs that can be read and that cannot, rules that span settings, and what `tokentrail settings` shows."""

from __future__ import annotations

import json
import os

import pytest
from pydantic import ValidationError

from schema.broker import connect
from schema.urls import UNREADABLE, mask_secrets
from worker import config
from worker.config import ConfigError, Settings, load_settings


@pytest.fixture(autouse=True)
def _read_anew():
    load_settings.cache_clear()


@pytest.mark.parametrize(
    ("variable", "url"),
    [
        ("DATABASE_URL", "postgresql://u:hu%zzsh@127.0.0.1:1/d"),
        ("DATABASE_URL", "postgresql://u:hu sh@127.0.0.1:1/d"),
        ("DATABASE_URL", "postgresql://u:p@hush@127.0.0.1:1/d"),
        ("DATABASE_URL", "postgresql://u:hu/sh@127.0.0.1:1/d"),
        ("DATABASE_URL", "postgresql://u:12/hush@127.0.0.1:1/d"),
        ("DATABASE_URL", "postgresql://u:hush@127.0.0.1:port/d"),
        ("DATABASE_URL", "postgresql://u:hush@127.0.0.1:1/d?hush=1"),
        ("DATABASE_URL", "postgresql://u:hu\nsh@127.0.0.1:1/d"),
        ("DATABASE_URL", "postgresql://localhost:1/2#hush@127.0.0.1:1/d"),
        ("BROKER_URL", "redis://:hu;sh@127.0.0.1:1/0"),
        ("BROKER_URL", "redis://:12;hush@127.0.0.1:1/0"),
        ("BROKER_URL", "redis://:hu/sh@127.0.0.1:1/0"),
        ("BROKER_URL", "redis://:12/hush@127.0.0.1:1/0"),
        ("BROKER_URL", "redis://:hu?sh@127.0.0.1:1/0"),
        ("BROKER_URL", "redis://:12?hush@127.0.0.1:1/0"),
        ("BROKER_URL", "redis://:12#hush@127.0.0.1:1/0"),
        ("BROKER_URL", "redis://:hush@127.0.0.1:port/0"),
        ("BROKER_URL", "redis://:hu\nsh@127.0.0.1:1/0"),
        ("BROKER_URL", "redis://:12?hush=1@127.0.0.1:1/0"),
        ("BROKER_URL", "redis://:hush@127.0.0.1:1/zero"),
    ],
)
def test_url_that_cannot_be_read_is_refused_without_repeating_it(monkeypatch, variable, url):
    """The parsers may take any part of the password for host, port or option."""
    monkeypatch.setenv(variable, url)
    with pytest.raises(ConfigError) as raised:
        load_settings()
    assert str(raised.value) == f"{variable} is not usable: {UNREADABLE}."


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://u:p%40%2F@h/d",
        "postgresql://u:p#?;[]:@h/d",
        "postgresql:///d?host=/run/postgresql",
        "postgresql:///d?host=%40abstract",
        "postgresql://u@[::1]:5432/d?sslmode=require",
        "postgres://u:p@h1:1,h2:2/d?target_session_attrs=primary&application_name=a@b",
        "postgresql://h",
        "postgresql://u:p@h/d\n",
    ],
)
def test_database_url_that_can_be_read(url):
    assert Settings(DATABASE_URL=url).database() == url.strip()


@pytest.mark.parametrize(
    "url",
    [
        "redis://",
        "redis://h",
        "redis://:p%40%2F%3B@h:6379/15",
        "redis://u:p@ss@[::1]:6379",
        "rediss://u:p@h:1/0?ssl_cert_reqs=CERT_REQUIRED",
        "sentinel://a:1;sentinel://:p@b/0?master_name=x",
        "redis://h:1/0\n",
    ],
)
def test_broker_url_that_can_be_read(url):
    assert Settings(BROKER_URL=url).broker() == url.strip()
    connect(url.strip()).close()


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("postgresql://me:hush@h:1/d", "postgresql://me:***@h:1/d"),
        ("postgresql://me:h#u;s?h@h:1/d", "postgresql://me:***@h:1/d"),
        ("postgresql://me:12@h:1/d?sslpassword=hush", "postgresql://me:***@h:1/d?***"),
        ("redis://:hu@sh@h:1/0", "redis://:***@h:1/0"),
        ("sentinel://a:1;sentinel://:hush@b:2/0?master_name=x", "sentinel://a:1;sentinel://:***@b:2/0?master_name=x"),
        ("redis://h:1/0", "redis://h:1/0"),
        ("postgresql://u:hu\nsh@h:1/d", "postgresql://u:***@h:1/d"),
    ],
)
def test_password_is_masked(url, masked):
    assert mask_secrets(url, "***") == masked


@pytest.mark.parametrize("limits", [(2.0, 2.0), (2.0, 1.0), (30.0, 30.0)])
def test_lock_timeout_must_be_less_than_statement_timeout(limits):
    """Else every wait for a lock would look like a slow statement."""
    lock, statement = limits
    with pytest.raises(ValidationError, match="must be less than TOKENTRAIL_STATEMENT_TIMEOUT"):
        Settings(lock_timeout=lock, statement_timeout=statement)


def test_settings_shows_where_values_come_from_and_no_secret(tokentrail):
    given = {
        "DATABASE_URL": "postgresql://me:hush@db.example/tokens?sslpassword=hush",
        "TOKENTRAIL_BATCH_SIZE": "7",
    }
    servers = config.HOME / "servers.json"
    servers.touch(0o600)
    servers.write_text(json.dumps({"broker_url": "redis://:hush@127.0.0.1:1/0", "pid": os.getpid()}))
    try:
        code, out, _ = tokentrail("settings", "--json", **given)
        assert code == 0
        assert "hush" not in out + tokentrail("settings").out
    finally:
        servers.unlink()
    settings = {name: (each["value"], each["from"]) for name, each in json.loads(out).items()}
    assert settings["DATABASE_URL"] == ("postgresql://me:********@db.example/tokens?********", "environment")
    assert settings["BROKER_URL"] == ("redis://:********@127.0.0.1:1/0", "tokentrail up")
    assert settings["TOKENTRAIL_BATCH_SIZE"] == (7, "environment")
    assert settings["TOKENTRAIL_QUEUE"] == ("tokens", "default")
