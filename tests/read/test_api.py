"""The HTTP API: a real server on a loopback port, asked over HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from urllib.parse import quote, urlencode, urlsplit

import httpx2
import psycopg
import pytest
from jsonschema import Draft202012Validator
from pydantic import SecretStr
from structlog.testing import capture_logs

from schema.canonical import read_json
from tests.kit.events import accrual, burn
from tests.kit.proxy import OldPostgreSQL
from tests.kit.wait import eventually
from tests.read.conftest import running
from worker.config import Settings
from worker.ledger.apply import apply_batch
from worker.ledger.deliveries import Delivery
from worker.listening import ListenError, listen
from worker.migration import migrate
from worker.read.api import serve
from worker.read.database import Database
from worker.schema_version import known_revision

ROOT = Path(__file__).parents[2]
HISTORY = "/api/account/transaction-history"
RECEIPTS = "/api/account/receipts"


def schema_of(client, path, status="200", media_type="application/json"):
    """The validator for what /openapi.json promises here."""
    document = client.get("/openapi.json").json()
    schema = document["paths"][path]["get"]["responses"][status]["content"][media_type]["schema"]
    return Draft202012Validator(
        {**schema, "components": document["components"]}, format_checker=Draft202012Validator.FORMAT_CHECKER
    )


def assert_problem(client, answer, status, parameter=None):
    """One sentence in the promised form, and nothing of a traceback."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.headers["cache-control"] == "no-store"
    problem = answer.json()
    documented = schema_of(client, HISTORY, "422", "application/problem+json")
    documented.validate(problem)
    assert problem["status"] == status
    assert problem.get("parameter") == parameter
    assert re.fullmatch(r"[^\n]{10,400}\.", problem["detail"]), problem["detail"]
    assert "Traceback" not in answer.text
    return problem


# The history


def test_history_answers_the_documented_url_in_the_documented_form(client, settle):
    given = {"order": "o-1", "price": read_json("0.1000000000000000000000001"), "items": [1, 2.5]}
    settle(
        accrual("alice", "100.000000000000000001", "pay-1", occurred_at="2026-01-31T13:00:00+01:00", metadata=given),
        burn("alice", "0.50", "use-1"),
    )

    answer = client.get(f"{HISTORY}?userId=alice&page=1&limit=10")

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    body = json.loads(answer.text, parse_float=Decimal)
    schema_of(client, HISTORY).validate(answer.json())
    newest, oldest = body["transactions"]
    created = [transaction.pop("createdAt") for transaction in (newest, oldest)]
    assert created[0] >= created[1]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{6})?Z", moment) for moment in created)
    assert newest == {
        "userId": "alice",
        "sequence": 2,
        "type": "burn",
        "amount": "0.5",
        "balanceBefore": "100.000000000000000001",
        "balanceAfter": "99.500000000000000001",
        "action": "render",
        "metadata": None,
        "idempotencyKey": "use-1",
        "occurredAt": None,
    }
    assert oldest == {
        "userId": "alice",
        "sequence": 1,
        "type": "accrual",
        "amount": "100.000000000000000001",
        "balanceBefore": "0",
        "balanceAfter": "100.000000000000000001",
        "source": "payroll",
        "metadata": {"order": "o-1", "price": Decimal("0.1000000000000000000000001"), "items": [1, Decimal("2.5")]},
        "idempotencyKey": "pay-1",
        "occurredAt": "2026-01-31T12:00:00Z",
    }
    assert body["pagination"] == {"page": 1, "limit": 10, "total": 2, "totalPages": 1}


def test_history_without_page_and_limit_is_the_ten_newest(client, settle):
    settle(*(accrual("u", 1, f"k{n}") for n in range(12)))
    body = client.get(HISTORY, params={"userId": "u"}).json()
    assert [transaction["sequence"] for transaction in body["transactions"]] == [*range(12, 2, -1)]
    assert body["pagination"] == {"page": 1, "limit": 10, "total": 12, "totalPages": 2}


@pytest.mark.parametrize(
    "user",
    ["a/b", "a+b", "a b", "50%", "a&b=c", "ünïcødé ✓ 𝄞", "'; DROP TABLE account; --", "x" * 128, "𝄞" * 128, "\t"],
)
def test_history_takes_any_user_id(client, settle, user):
    settle(accrual(user, 1, "k"))
    for query in (f"userId={quote(user, safe='')}", httpx2.QueryParams({"userId": user})):
        body = client.get(f"{HISTORY}?{query}").json()
        assert [transaction["userId"] for transaction in body["transactions"]] == [user]


@pytest.mark.parametrize("page", ["2", "0001000", str(10**30), "9" * 100])
def test_history_behind_the_last_page_is_empty(client, settle, page):
    settle(accrual("u", 1, "k"))
    answer = client.get(f"{HISTORY}?userId=u&page={page}")
    assert answer.status_code == 200
    assert answer.json()["transactions"] == []
    assert answer.json()["pagination"] == {"page": int(page), "limit": 10, "total": 1, "totalPages": 1}


def test_pages_stay_whole_while_a_worker_writes(client, settle, database_url):
    settle(accrual("u", 1, "k0"))
    stop = threading.Event()

    def write():
        with psycopg.connect(database_url, autocommit=True) as own:
            for n in range(1, 10_000):
                apply_batch(own, [Delivery.of(accrual("u", 1, f"k{n}"))], stripe=1)
                if stop.is_set():
                    return

    writer = threading.Thread(target=write)
    writer.start()
    try:
        totals = []
        for _ in range(60):
            page = client.get(f"{HISTORY}?userId=u&limit=5").json()
            total = page["pagination"]["total"]
            sequences = [transaction["sequence"] for transaction in page["transactions"]]
            assert sequences == [*range(total, max(total - 5, 0), -1)]
            totals.append(total)
        assert totals == sorted(totals)
        assert totals[-1] > totals[0]
    finally:
        stop.set()
        writer.join()


def test_history_of_a_hundred_large_records_is_exact(client, settle):
    metadata = {"text": "ü" * 8000, "number": read_json("1.000000000000000000000000000000001")}
    settle(*(accrual("u", 1, f"k{n}", metadata=metadata) for n in range(100)))
    answer = client.get(f"{HISTORY}?userId=u&limit=100")
    body = json.loads(answer.text, parse_float=Decimal)["transactions"]
    assert len(body) == 100
    assert all(transaction["metadata"] == metadata for transaction in body)


# Bad input


@pytest.mark.parametrize(
    ("query", "parameter"),
    [
        ("", "userId"),
        ("userId=", "userId"),
        ("userId", "userId"),
        ("page=1&limit=10", "userId"),
        (f"userId={quote('𝄞') * 129}", "userId"),
        ("userId=a%00b", "userId"),
        ("userId=%ED%A0%80", "userId"),
        ("userId=%FF", "userId"),
        ("userId=a&userId=a", "userId"),
        *(
            (f"userId=u&page={page}", "page")
            for page in ("0", "-1", "1.0", "abc", "", "+1", "%2B1", "1_0", "1e3", "0x10")
        ),
        ("userId=u&page=%D9%A1", "page"),
        ("userId=u&page=" + "9" * 101, "page"),
        ("userId=u&page=" + "9" * 10_000, "page"),
        ("userId=u&page=1&page=1", "page"),
        *((f"userId=u&limit={limit}", "limit") for limit in ("0", "101", "", "-5", str(10**30), "null", "%00")),
        ("userId=u&limit=1&limit=1000", "limit"),
        ("userId=u&offset=3", "offset"),
        ("userId=u&=3", ""),
        ("userId=u&%FF=3", r"\udcff"),
        ("userId=u&%C3%BC%0A=3", r"\xfc\n"),
    ],
)
def test_bad_parameter_is_refused_by_name_in_one_sentence(client_without_database, query, parameter):
    answer = client_without_database.get(f"{HISTORY}?{query}")
    problem = assert_problem(client_without_database, answer, 422, parameter)
    assert problem["detail"].startswith(parameter)
    assert problem["detail"].isascii()
    assert problem["type"] == "about:blank"
    assert problem["instance"] == HISTORY


@pytest.mark.parametrize(
    ("path", "name", "meant"),
    [(HISTORY, "userid", "userId"), (HISTORY, "user_id", "userId"), (RECEIPTS, "Idempotency_Key", "idempotencyKey")],
)
def test_misspelt_parameter_is_answered_with_the_right_one(client_without_database, path, name, meant):
    query = {"userId": "u", "idempotencyKey": "k"} if path == RECEIPTS else {"userId": "u"}
    answer = client_without_database.get(path, params=query | {name: "x"})
    assert f"did you mean {meant}?" in assert_problem(client_without_database, answer, 422, name)["detail"]


@pytest.mark.parametrize("path", ["/api", HISTORY + "/", "/docs", "/redoc", "/%00", "/%ED%A0%80", "/" + "x" * 3000])
def test_unknown_path_is_a_problem_that_names_the_known_ones(client_without_database, path):
    problem = assert_problem(client_without_database, client_without_database.get(path), 404)
    assert HISTORY in problem["detail"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "BREW"])
@pytest.mark.parametrize("path", [HISTORY, "/healthz", "/openapi.json"])
def test_other_methods_are_a_problem_that_names_the_allowed_ones(client_without_database, method, path):
    answer = client_without_database.request(method, path, content=b"{")
    assert_problem(client_without_database, answer, 405)
    assert answer.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    "path", [f"{HISTORY}?userId=u", f"{HISTORY}?userId=u&page=0", "/healthz", "/readyz", "/openapi.json", "/nothing"]
)
def test_head_is_get_without_the_body(client, path):
    head, get = client.head(path), client.get(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert dict(head.headers) | {"date": ""} == dict(get.headers) | {"date": ""}


@pytest.mark.parametrize("request_line", [b"nonsense", b"GET " + b"/" * 100_000, b"GET /\xff\xfe HTTP/1.1"])
def test_what_is_no_http_gets_a_400_and_the_server_lives(client_without_database, request_line):
    with socket.create_connection(
        (client_without_database.base_url.host, client_without_database.base_url.port), timeout=10
    ) as line:
        line.sendall(request_line + b"\r\n\r\n")
        first = line.recv(1000)
    assert first.startswith(b"HTTP/1.1 400")
    assert b"Traceback" not in first
    assert client_without_database.get("/healthz").status_code == 200


# The description


def test_openapi_describes_every_endpoint(client):
    document = client.get("/openapi.json").json()
    assert document["paths"].keys() == {
        HISTORY,
        "/api/account/rejections",
        "/api/account/receipts",
        "/",
        "/healthz",
        "/readyz",
    }
    history = document["paths"][HISTORY]["get"]
    parameters = {parameter["name"]: parameter for parameter in history["parameters"]}
    assert parameters.keys() == {"userId", "page", "limit"}
    assert [name for name, parameter in parameters.items() if parameter["required"]] == ["userId"]
    assert parameters["limit"]["schema"]["maximum"] == 100
    assert parameters["limit"]["schema"]["default"] == 10
    assert parameters["page"]["schema"]["minimum"] == 1
    assert history["responses"].keys() == {"200", "422", "503"}
    assert "HTTPValidationError" not in document["components"]["schemas"]
    transactions = document["components"]["schemas"]
    assert {"source", "metadata", "occurredAt"} <= set(transactions["AccrualTransaction"]["required"])
    assert "action" not in transactions["AccrualTransaction"]["properties"]


def test_root_lists_the_endpoints(client_without_database):
    answer = client_without_database.get("/")
    assert answer.status_code == 200
    schema_of(client_without_database, "/").validate(answer.json())
    addresses = answer.json()["addresses"]
    assert "newest first" in addresses[HISTORY]
    described = client_without_database.get("/openapi.json").json()["paths"]
    assert addresses.keys() == described.keys() | {"/openapi.json"}


# Health, and outages


def test_healthz_and_readyz_with_a_migrated_database(client):
    for path, status in (("/healthz", "ok"), ("/readyz", "ready")):
        answer = client.get(path)
        assert (answer.status_code, answer.json()) == (200, {"status": status})
        schema_of(client, path).validate(answer.json())


def test_not_ready_until_the_database_is_migrated(empty_database_url):
    with running(empty_database_url) as client:
        problem = assert_problem(client, client.get("/readyz"), 503)
        assert "tokentrail migrate" in problem["detail"]
        problem = assert_problem(client, client.get(f"{HISTORY}?userId=u"), 503)
        assert "tokentrail migrate" in problem["detail"]

        migrate(empty_database_url, "0001")
        problem = assert_problem(client, client.get("/readyz"), 503)
        assert "0001" in problem["detail"]
        assert known_revision() in problem["detail"]

        migrate(empty_database_url)
        assert client.get("/readyz").status_code == 200
        assert client.get(f"{HISTORY}?userId=u").status_code == 200


def test_ready_with_a_schema_newer_than_this_code(client, connection):
    connection.execute("UPDATE alembic_version SET version_num = '9999'")
    assert client.get("/readyz").status_code == 200


def test_not_ready_with_a_postgresql_that_is_too_old(database_url):
    with OldPostgreSQL(database_url) as old, running(old.url) as client:
        problem = assert_problem(client, client.get("/readyz"), 503)
    assert problem["detail"] == "PostgreSQL 14 is too old: tokentrail needs 15 or newer."


def test_api_starts_without_a_database_logs_that_once_and_recovers(database_url, servers):
    missing = urlsplit(database_url)._replace(path="/tokentrail_not_there_yet").geturl()
    with capture_logs() as logs, running(missing) as client:
        assert client.get("/healthz").status_code == 200
        for path in ("/readyz", f"{HISTORY}?userId=u", "/readyz"):
            answer = client.get(path)
            assert_problem(client, answer, 503)
            assert int(answer.headers["retry-after"]) > 0
        unavailable, available = "database not available, answering 503 until it is", "database available again"
        assert [line["event"] for line in logs] == [unavailable]
        assert 'database "tokentrail_not_there_yet" does not exist' in logs[0]["reason"], "the server's own reason"

        with psycopg.connect(servers.database_url, autocommit=True) as connection:
            connection.execute("CREATE DATABASE tokentrail_not_there_yet")
            try:
                migrate(missing)
                eventually(lambda: client.get("/readyz").status_code == 200)
                assert client.get(f"{HISTORY}?userId=u").status_code == 200
                assert [line["event"] for line in logs] == [unavailable, available]
            finally:
                connection.execute("DROP DATABASE tokentrail_not_there_yet WITH (FORCE)")


def api_backends(connection, state=None):
    rows = connection.execute(
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'tokentrail api' AND datname = current_database()"
        " AND state = COALESCE(%s, state)",
        [state],
    )
    return [pid for (pid,) in rows]


def test_lost_connections_are_replaced_before_a_reader_notices(client, connection, database_url):
    """However many the pool holds: all of them die when the server is restarted."""
    for _ in range(3):
        with ThreadPoolExecutor(6) as readers:
            with psycopg.connect(database_url) as stranger:
                stranger.execute("LOCK TABLE account")
                asked = [readers.submit(client.get, f"{HISTORY}?userId=u") for _ in range(6)]
                eventually(lambda: len(api_backends(connection, "active")) == 6)
            assert [each.result().status_code for each in asked] == [200] * 6
        eventually(lambda: len(api_backends(connection, "idle")) == len(api_backends(connection)))
        for pid in api_backends(connection):
            connection.execute("SELECT pg_terminate_backend(%s, 5000)", (pid,))
        assert client.get(f"{HISTORY}?userId=u").status_code == 200


def test_locked_tables_cost_a_bounded_wait_and_then_a_503(client, connection):
    with connection.transaction():
        connection.execute("LOCK TABLE alembic_version")
        connection.execute("LOCK TABLE account")
        assert_problem(client, client.get("/readyz"), 503)
        assert_problem(client, client.get(f"{HISTORY}?userId=u"), 503)
        assert client.get("/healthz").status_code == 200
    assert client.get(f"{HISTORY}?userId=u").status_code == 200
    assert client.get("/readyz").status_code == 200


def test_frozen_connection_is_closed_and_the_next_one_answers(client, connection):
    """SIGSTOP: the server process accepts bytes and never answers, not even to a request to cancel."""
    assert client.get("/readyz").status_code == 200
    frozen = api_backends(connection)
    try:
        for pid in frozen:
            os.kill(pid, signal.SIGSTOP)
        assert client.get(f"{HISTORY}?userId=u").status_code == 200
    finally:
        for pid in frozen:
            os.kill(pid, signal.SIGCONT)


def test_bug_is_logged_and_answered_without_a_traceback(client, connection, settle):
    """An accrual without its detail row, which the ledger never writes."""
    settle(accrual("u", 1, "k"))
    connection.execute("SET session_replication_role = replica")
    connection.execute("DELETE FROM accrual_record")
    with capture_logs() as logs:
        problem = assert_problem(client, client.get(f"{HISTORY}?userId=u"), 500)
    assert "accrual" not in problem["detail"]
    assert [(line["event"], line["log_level"]) for line in logs] == [("request failed, this is a bug", "error")]


def test_connections_of_the_api_cannot_write(database_url):
    async def write():
        database = Database(database_url)
        async with database.opened():
            await database.read(lambda connection: connection.execute("INSERT INTO account (user_id) VALUES ('u')"))

    with pytest.raises(psycopg.errors.ReadOnlySqlTransaction):
        asyncio.run(write())


# The server


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1:8000",
        "192.0.2.7",
        "[::1]",
        "[2001:db8::1]:8000",
        "localhost",
        "LocalHost.:8000",
        "tokentrail.localhost:8000",
        socket.gethostname(),
    ],
)
@pytest.mark.parametrize("path", ["/", "/healthz", "/nowhere"])
def test_api_is_asked_by_address_or_by_a_name_of_its_own(client_without_database, host, path):
    answer = client_without_database.get(path, headers={"Host": host})
    assert answer.status_code == (404 if path == "/nowhere" else 200), answer.text


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8000",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "evil-localhost",
        "127.0.0.1@evil.example",
        "[evil.example]",
        "::1",
        "localhost:8000:x",
        "",
        "xn--" + 200 * "x",
    ],
)
@pytest.mark.parametrize("path", ["/", "/healthz", "/readyz", "/openapi.json", f"{HISTORY}?userId=u", "/nowhere"])
def test_api_answers_no_page_whose_name_is_made_to_point_here(client_without_database, host, path):
    answer = client_without_database.get(path, headers={"Host": host})
    problem = assert_problem(client_without_database, answer, 421)
    assert "TOKENTRAIL_ALLOWED_HOSTS" in problem["detail"]


def test_api_is_asked_by_the_names_that_the_setting_lists_and_the_one_it_listens_on(database_url, monkeypatch):
    monkeypatch.setenv("TOKENTRAIL_ALLOWED_HOSTS", " ledger.example,API. ")
    monkeypatch.setenv("TOKENTRAIL_API_HOST", "me")
    with running(database_url) as client:
        for host, status in {"ledger.example:80": 200, "api": 200, "me": 200, "other.example": 421}.items():
            assert client.get("/readyz", headers={"Host": host}).status_code == status, host


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /healthz HTTP/1.0\r\n\r\n", b"200"),  # a balancer's probe: every browser says whom it asks
        (b"GET /healthz HTTP/1.0\r\nHost: evil.example\r\n\r\n", b"421"),
        (b"GET /healthz HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n", b"400"),
        (b"GET http://evil.example/healthz HTTP/1.1\r\nHost: evil.example\r\n\r\n", b"421"),
    ],
)
def test_api_is_asked_by_one_name(client_without_database, request_, status):
    address = client_without_database.base_url.host, client_without_database.base_url.port
    with socket.create_connection(address, timeout=10) as line:
        line.sendall(request_)
        assert line.recv(4096).split()[1] == status


SERVE = """
import sys
from pydantic import SecretStr
from worker.config import Settings
from worker.read.api import serve
serve(Settings(DATABASE_URL=SecretStr(sys.argv[1])), "127.0.0.1", int(sys.argv[2]))
"""


def get_receipts(port, query):
    """With the standard library's client, which does not limit a query's length."""
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=30)) as connection:
        connection.request("GET", f"{RECEIPTS}?{urlencode(query)}")
        answer = connection.getresponse()
        return answer.status, json.load(answer)


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_serve_finishes_requests_in_progress_at_a_signal(database_url, connection, stop):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, database_url, str(port)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as client:

            def ready():
                with contextlib.suppress(httpx2.TransportError):
                    return client.get("/readyz").status_code == 200

            eventually(ready)

            # The longest query that is allowed is answered, a longer one refused in a sentence.
            keys = [("idempotencyKey", f"{number:03}" + "\U0001f4b0" * 197) for number in range(101)]
            status, body = get_receipts(port, [("userId", "u"), *keys[:100]])
            assert (status, [each["status"] for each in body["receipts"]]) == (200, ["unknown"] * 100)
            status, body = get_receipts(port, [("userId", "u"), *keys])
            assert (status, body["detail"][:34]) == (422, "idempotencyKey is given 101 times:")

            answers = []
            waiting = (
                "SELECT FROM pg_locks l JOIN pg_database d ON d.oid = l.database"
                " WHERE NOT granted AND datname = current_database()"
            )
            with connection.transaction():
                connection.execute("LOCK TABLE account")
                reader = threading.Thread(target=lambda: answers.append(client.get(f"{HISTORY}?userId=u")))
                reader.start()
                eventually(lambda: connection.execute(waiting).fetchall())
                process.send_signal(stop)
                with pytest.raises(subprocess.TimeoutExpired):
                    process.wait(0.3)
            reader.join()
            assert answers[0].status_code == 200
        output, _ = process.communicate(timeout=20)
    finally:
        process.kill()
        process.wait()
    assert process.returncode in (0, -stop)
    assert f"http://127.0.0.1:{port}" in output
    assert "Traceback" not in output


def test_listening_socket_allows_tcp_nodelay():
    """Asyncio sets it only on sockets that are TCP by number; else a response waits 40 ms for an acknowledgement."""
    with listen("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        accepted, _ = listener.accept()
        with accepted:
            assert accepted.proto == socket.IPPROTO_TCP


def test_address_that_cannot_be_listened_on(database_url):
    settings = Settings(DATABASE_URL=SecretStr(database_url))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ListenError, match=rf"^Cannot listen on port {port} of 127.0.0.1: .*or port\.$"):
            serve(settings, "127.0.0.1", port)
    for host in ("no.such.host.invalid", "192.0.2.1", "a" * 70):
        with pytest.raises(ListenError, match=r"^Cannot listen on port 1 of .* Choose another host"):
            serve(settings, host, 1)
