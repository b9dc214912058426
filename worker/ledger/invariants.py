"""What must always be true: a sentence, and a query for the rows that break it. Tests and benchmarks run all of them;
docs/concepts.md shows how to run them from a shell.

Plain SQL on purpose: the proof shares no code with the ledger that it checks, except for the forms in `chain.py`, and
each query can be pasted into psql. Each reads whole tables; none takes a lock.
"""

# ruff: noqa: S608 - the queries are put together from constants alone
from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from psycopg import Connection
from psycopg.rows import dict_row

from schema.tables import APPEND_ONLY

from .chain import PAYLOAD_FORM, RECORD_FORM, REJECTION_FORM, VERSION

_SIGNED: Final = "CASE type WHEN 'accrual' THEN amount ELSE -amount END"

_GUARDED: Final = ", ".join([*(f"('{table}', 'append_only')" for table in APPEND_ONLY), "('account', 'keep_account')"])

INVARIANTS: Final[Mapping[str, str]] = {
    "a balance is its opening balance plus the sum of its records": f"""
        SELECT user_id, balance, opening_balance, moved
        FROM account FULL JOIN (
            SELECT user_id, sum({_SIGNED}) AS moved FROM transaction_record GROUP BY user_id
        ) r USING (user_id)
        WHERE (sequence > 0 OR moved IS NOT NULL)
            AND (balance = opening_balance + coalesce(moved, 0)) IS NOT TRUE
    """,
    "an account's records are numbered 1, 2, 3 … without a gap, and its sequence counts them": """
        SELECT user_id, sequence, records, first, last
        FROM account FULL JOIN (
            SELECT user_id, count(*) AS records, min(sequence) AS first, max(sequence) AS last
            FROM transaction_record GROUP BY user_id
        ) r USING (user_id)
        WHERE sequence IS DISTINCT FROM coalesce(records, 0) OR first <> 1 OR last <> records
    """,
    "an account's rejections are numbered 1, 2, 3 … without a gap, and counted": """
        SELECT user_id, rejections, rows, first, last
        FROM account FULL JOIN (
            SELECT user_id, count(*) AS rows, min(number) AS first, max(number) AS last
            FROM rejected_event GROUP BY user_id
        ) r USING (user_id)
        WHERE rejections IS DISTINCT FROM coalesce(rows, 0) OR first <> 1 OR last <> rows
    """,
    "a record begins with the balance its predecessor ended with, the first one with the opening balance": """
        SELECT user_id, r.sequence, balance_before, expected
        FROM (
            SELECT t.user_id, t.sequence, balance_before,
                lag(balance_after, 1, opening_balance) OVER (PARTITION BY t.user_id ORDER BY t.sequence) AS expected
            FROM transaction_record t LEFT JOIN account a ON a.user_id = t.user_id
        ) r
        WHERE balance_before IS DISTINCT FROM expected
    """,
    "a record ends with its beginning plus or minus its amount, which is positive, and never below zero": f"""
        SELECT user_id, sequence, type, amount, balance_before, balance_after
        FROM transaction_record
        WHERE (amount > 0 AND balance_before >= 0 AND balance_after >= 0 AND balance_after = balance_before + {_SIGNED})
            IS NOT TRUE
    """,
    "no balance is below zero": """
        SELECT user_id, balance FROM account WHERE balance < 0
    """,
    "times never run backwards along an account's records": """
        SELECT user_id, sequence, created_at, previous
        FROM (
            SELECT user_id, sequence, created_at,
                lag(created_at) OVER (PARTITION BY user_id ORDER BY sequence) AS previous
            FROM transaction_record
        ) r
        WHERE created_at < previous
    """,
    "times never run backwards along an account's rejections": """
        SELECT user_id, number, created_at, previous
        FROM (
            SELECT user_id, number, created_at,
                lag(created_at) OVER (PARTITION BY user_id ORDER BY number) AS previous
            FROM rejected_event
        ) r
        WHERE created_at < previous
    """,
    "an account's last moment is that of its latest record or rejection": """
        SELECT user_id, last_recorded_at, latest
        FROM account FULL JOIN (
            SELECT user_id, max(created_at) AS latest
            FROM (SELECT user_id, created_at FROM transaction_record
                  UNION ALL SELECT user_id, created_at FROM rejected_event) x
            GROUP BY user_id
        ) r USING (user_id)
        WHERE last_recorded_at IS DISTINCT FROM latest
    """,
    "every accrual has one accrual record that says the same, and there is no other": """
        SELECT user_id, sequence, t.amount, a.amount AS detail, t.created_at, a.created_at AS detail_created_at
        FROM (SELECT * FROM transaction_record WHERE type = 'accrual') t
            FULL JOIN accrual_record a USING (user_id, sequence)
        WHERE (t.amount, t.created_at) IS DISTINCT FROM (a.amount, a.created_at)
    """,
    "every burn has one burned credit that says the same, and there is no other since the trail began": """
        SELECT user_id, sequence, t.amount, b.amount AS detail, t.balance_before, b.balance_before AS detail_before,
            t.balance_after, b.balance_after AS detail_after, t.created_at, b.created_at AS detail_created_at
        FROM (SELECT * FROM transaction_record WHERE type = 'burn') t
            FULL JOIN (SELECT * FROM burned_credit WHERE sequence IS NOT NULL) b USING (user_id, sequence)
        WHERE (t.amount, t.balance_before, t.balance_after, t.created_at)
            IS DISTINCT FROM (b.amount, b.balance_before, b.balance_after, b.created_at)
    """,
    "no key was both applied and rejected": """
        SELECT user_id, idempotency_key, t.sequence, r.number
        FROM transaction_record t JOIN rejected_event r USING (user_id, idempotency_key)
    """,
    "a rejection's reason is true of the balance it met": """
        SELECT user_id, number, type, amount, balance, reason
        FROM rejected_event
        WHERE (CASE reason
            WHEN 'insufficient_tokens' THEN type = 'burn' AND balance >= 0 AND amount > balance
            WHEN 'balance_limit' THEN type = 'accrual' AND balance + amount >= 1e20
        END) IS NOT TRUE
    """,
    "a record's hash is that of its content and its predecessor's hash": f"""
        SELECT r.user_id, r.sequence
        FROM (
            SELECT *, lag(hash) OVER (PARTITION BY user_id ORDER BY sequence) AS previous FROM transaction_record
        ) r
            LEFT JOIN accrual_record a ON a.user_id = r.user_id AND a.sequence = r.sequence
            LEFT JOIN burned_credit b ON b.user_id = r.user_id AND b.sequence = r.sequence
        WHERE r.hash_version <> {VERSION} OR r.hash IS DISTINCT FROM {RECORD_FORM}
    """,
    "a rejection's hash is that of its content and its predecessor's hash": f"""
        SELECT r.user_id, r.number
        FROM (
            SELECT *, lag(hash) OVER (PARTITION BY user_id ORDER BY number) AS previous FROM rejected_event
        ) r
        WHERE r.hash_version <> {VERSION} OR r.hash IS DISTINCT FROM {REJECTION_FORM}
    """,
    "a record's payload hash is that of its event": f"""
        SELECT r.user_id, r.sequence
        FROM (
            SELECT t.*, a.source, b.action
            FROM transaction_record t
                LEFT JOIN accrual_record a ON a.user_id = t.user_id AND a.sequence = t.sequence
                LEFT JOIN burned_credit b ON b.user_id = t.user_id AND b.sequence = t.sequence
        ) r
        WHERE r.payload_hash IS DISTINCT FROM {PAYLOAD_FORM}
    """,
    "a rejection's payload hash is that of its event": f"""
        SELECT r.user_id, r.number FROM rejected_event r WHERE r.payload_hash IS DISTINCT FROM {PAYLOAD_FORM}
    """,
    "an account's head is the hash of its last record": """
        SELECT user_id, head_hash, last
        FROM account FULL JOIN (
            SELECT DISTINCT ON (user_id) user_id, hash AS last FROM transaction_record ORDER BY user_id, sequence DESC
        ) r USING (user_id)
        WHERE head_hash IS DISTINCT FROM last
    """,
    "an account's rejection head is the hash of its last rejection": """
        SELECT user_id, rejection_head, last
        FROM account FULL JOIN (
            SELECT DISTINCT ON (user_id) user_id, hash AS last FROM rejected_event ORDER BY user_id, number DESC
        ) r USING (user_id)
        WHERE rejection_head IS DISTINCT FROM last
    """,
    "issued − burned of the stripes is what the balances grew by, and the sum of all records": f"""
        SELECT *
        FROM (
            SELECT
                (SELECT coalesce(sum(issued - burned), 0) FROM global_token_balance) AS stripes,
                (SELECT coalesce(sum(balance - opening_balance), 0) FROM account WHERE sequence > 0) AS balances,
                (SELECT coalesce(sum({_SIGNED}), 0) FROM transaction_record) AS records
        ) supply
        WHERE NOT (stripes = balances AND balances = records)
    """,
    "the hours of a stripe add up to the stripe": """
        SELECT stripe, s.issued, f.issued AS hours_issued, s.burned, f.burned AS hours_burned
        FROM (SELECT id AS stripe, issued, burned FROM global_token_balance WHERE issued IS NOT NULL) s
            FULL JOIN (
                SELECT stripe, sum(issued) AS issued, sum(burned) AS burned FROM token_flow GROUP BY stripe
            ) f USING (stripe)
        WHERE (coalesce(s.issued, 0), coalesce(s.burned, 0)) <> (coalesce(f.issued, 0), coalesce(f.burned, 0))
    """,
    "an hour's flow is the sum and the number of its records and rejections": """
        SELECT hour, f.issued, r.issued AS records_issued, f.burned, r.burned AS records_burned,
            f.accruals, r.accruals AS records_accruals, f.burns, r.burns AS records_burns,
            f.rejections, r.rejections AS records_rejections
        FROM (
            SELECT hour, sum(issued) AS issued, sum(burned) AS burned, sum(accruals) AS accruals, sum(burns) AS burns,
                sum(rejections) AS rejections
            FROM token_flow GROUP BY hour
        ) f FULL JOIN (
            SELECT date_trunc('hour', created_at, 'UTC') AS hour,
                coalesce(sum(amount) FILTER (WHERE what = 'accrual'), 0) AS issued,
                coalesce(sum(amount) FILTER (WHERE what = 'burn'), 0) AS burned,
                count(*) FILTER (WHERE what = 'accrual') AS accruals,
                count(*) FILTER (WHERE what = 'burn') AS burns,
                count(*) FILTER (WHERE what = 'rejection') AS rejections
            FROM (SELECT created_at, type AS what, amount FROM transaction_record
                  UNION ALL SELECT created_at, 'rejection', amount FROM rejected_event) x
            GROUP BY 1
        ) r USING (hour)
        WHERE (f.issued, f.burned, f.accruals, f.burns, f.rejections)
            IS DISTINCT FROM (r.issued, r.burned, r.accruals, r.burns, r.rejections)
    """,
    "the database refuses changes of the audit trail": f"""
        SELECT "table"
        FROM (VALUES {_GUARDED}) AS guarded ("table", trigger)
        WHERE NOT EXISTS (
            SELECT FROM pg_trigger
            WHERE tgrelid = to_regclass("table") AND tgname = trigger AND tgenabled IN ('O', 'A')
        )
    """,
}


class Broken(NamedTuple):
    """An invariant that does not hold, and the first rows that break it."""

    sentence: str
    rows: list[dict[str, Any]]


def check(connection: Connection[Any], limit: int = 10) -> list[Broken]:
    """The invariants that do not hold, each with at most `limit` rows, all in one snapshot.

    The connection must be in no transaction, or in one that is REPEATABLE READ. Writers may go on meanwhile.
    """
    with connection.transaction(), connection.cursor(row_factory=dict_row) as cursor:
        cursor.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY")
        # These queries read whole tables; the settings of the ledger's sessions would make them very slow.
        for name in ("enable_seqscan", "enable_hashjoin", "enable_mergejoin"):
            cursor.execute(f"SET LOCAL {name} = on".encode())
        cursor.execute("SET LOCAL statement_timeout = 0")
        broken = []
        for sentence, query in INVARIANTS.items():
            cursor.execute(f"SELECT * FROM ({query}) AS broken LIMIT %s".encode(), (limit,))
            if rows := cursor.fetchall():
                broken.append(Broken(sentence, rows))
        return broken
