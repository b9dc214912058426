"""add token audit trail

Why: every token movement gets a record with the balance before and after it, numbered and hash-chained per
account, so that every balance can be proved; rejections and dead letters are recorded too.
Deploy: any time, under load: no writer waits longer than some 50 ms. Schema only: no existing row changes, and the
new columns of legacy rows stay NULL (counts: 0). Stop the legacy writers of balances before the first worker
starts. Downgrade refuses once the trail holds a row, unless `--drop-history` (Alembic: `-x drop-history`) is given.
"""

from __future__ import annotations

from alembic import context, op
from alembic.util import CommandError
from sqlalchemy.exc import DBAPIError

from migrations.steps import add_constraint, add_index, steps, with_short_lock

revision: str = "0002"
down_revision: str | None = "0001"
branch_labels: None = None
depends_on: None = None

NEW_TABLES = """
CREATE TABLE IF NOT EXISTS transaction_record (
    user_id text COLLATE "C" NOT NULL,
    sequence bigint NOT NULL,
    idempotency_key text COLLATE "C" NOT NULL,
    type text NOT NULL,
    amount numeric(38, 18) NOT NULL,
    balance_before numeric(38, 18) NOT NULL,
    balance_after numeric(38, 18) NOT NULL,
    metadata json,
    occurred_at timestamptz,
    created_at timestamptz NOT NULL,
    payload_hash bytea NOT NULL,
    hash bytea NOT NULL,
    hash_version smallint NOT NULL,
    CONSTRAINT pk_transaction_record PRIMARY KEY (user_id, sequence),
    CONSTRAINT uq_transaction_record_user_id_idempotency_key UNIQUE (user_id, idempotency_key),
    CONSTRAINT ck_transaction_record_sequence_from_one CHECK (sequence > 0),
    CONSTRAINT ck_transaction_record_type_known CHECK (type IN ('accrual', 'burn')),
    CONSTRAINT ck_transaction_record_amount_positive CHECK (amount > 0),
    CONSTRAINT ck_transaction_record_balance_not_negative CHECK (balance_before >= 0 AND balance_after >= 0),
    CONSTRAINT ck_transaction_record_balances_tie CHECK (balance_after =
        CASE type WHEN 'accrual' THEN balance_before + amount ELSE balance_before - amount END)
);
CREATE TABLE IF NOT EXISTS accrual_record (
    user_id text COLLATE "C" NOT NULL,
    sequence bigint NOT NULL,
    amount numeric(38, 18) NOT NULL,
    source text NOT NULL,
    created_at timestamptz NOT NULL,
    CONSTRAINT pk_accrual_record PRIMARY KEY (user_id, sequence),
    CONSTRAINT fk_accrual_record_transaction_record FOREIGN KEY (user_id, sequence)
        REFERENCES transaction_record (user_id, sequence),
    CONSTRAINT ck_accrual_record_amount_positive CHECK (amount > 0)
);
CREATE TABLE IF NOT EXISTS rejected_event (
    user_id text COLLATE "C" NOT NULL,
    number bigint NOT NULL,
    idempotency_key text COLLATE "C" NOT NULL,
    type text NOT NULL,
    amount numeric(38, 18) NOT NULL,
    source text,
    action text,
    metadata json,
    occurred_at timestamptz,
    created_at timestamptz NOT NULL,
    reason text NOT NULL,
    balance numeric(38, 18) NOT NULL,
    payload_hash bytea NOT NULL,
    hash bytea NOT NULL,
    hash_version smallint NOT NULL,
    CONSTRAINT pk_rejected_event PRIMARY KEY (user_id, number),
    CONSTRAINT uq_rejected_event_user_id_idempotency_key UNIQUE (user_id, idempotency_key),
    CONSTRAINT ck_rejected_event_number_from_one CHECK (number > 0),
    CONSTRAINT ck_rejected_event_type_known CHECK (type IN ('accrual', 'burn')),
    CONSTRAINT ck_rejected_event_reason_known CHECK (reason IN ('insufficient_tokens', 'balance_limit')),
    CONSTRAINT ck_rejected_event_amount_positive CHECK (amount > 0),
    CONSTRAINT ck_rejected_event_what CHECK (
        (type = 'accrual') = (source IS NOT NULL) AND (type = 'burn') = (action IS NOT NULL))
);
CREATE TABLE IF NOT EXISTS dead_letter (
    id bigint GENERATED ALWAYS AS IDENTITY,
    fingerprint bytea NOT NULL,
    reason text NOT NULL,
    detail text NOT NULL,
    task text,
    message_id text,
    event_index integer,
    user_id text COLLATE "C",
    idempotency_key text COLLATE "C",
    event json,
    headers json,
    body bytea,
    first_seen_at timestamptz NOT NULL,
    last_seen_at timestamptz NOT NULL,
    deliveries bigint NOT NULL DEFAULT 1,
    state text NOT NULL DEFAULT 'open',
    state_changed_at timestamptz,
    state_changed_by text,
    state_note text,
    replays bigint NOT NULL DEFAULT 0,
    purged_at timestamptz,
    CONSTRAINT pk_dead_letter PRIMARY KEY (id),
    CONSTRAINT uq_dead_letter_fingerprint UNIQUE (fingerprint),
    CONSTRAINT ck_dead_letter_reason_known CHECK (reason IN (
        'unknown_task', 'undecodable', 'invalid_arguments', 'invalid_event', 'conflict', 'refused_by_database',
        'internal_error', 'poison', 'oversized', 'revoked', 'expired', 'scheduled')),
    CONSTRAINT ck_dead_letter_state_known CHECK (state IN ('open', 'replayed', 'discarded')),
    CONSTRAINT ck_dead_letter_deliveries_from_one CHECK (deliveries > 0),
    CONSTRAINT ck_dead_letter_who_and_when CHECK (
        state = 'open' OR state_changed_at IS NOT NULL AND state_changed_by IS NOT NULL)
);
-- squawk-ignore require-concurrent-index-creation
CREATE INDEX IF NOT EXISTS ix_dead_letter_user_id_idempotency_key
    ON dead_letter (user_id, idempotency_key) WHERE user_id IS NOT NULL;
CREATE TABLE IF NOT EXISTS token_flow (
    hour timestamptz NOT NULL,
    stripe integer NOT NULL,
    issued numeric NOT NULL,
    burned numeric NOT NULL,
    accruals bigint NOT NULL,
    burns bigint NOT NULL,
    rejections bigint NOT NULL,
    CONSTRAINT pk_token_flow PRIMARY KEY (hour, stripe)
)
"""

APPEND_ONLY = ("transaction_record", "accrual_record", "rejected_event", "burned_credit")

# The planner must expect a thousand rows of each user, whatever ANALYZE samples. Where most users have one row, it
# takes "user_id" for a unique key and any index that begins with it for as good as the right one; then the foreign
# key check of each new record reads all records of its user.
MANY_ROWS_A_USER = ("transaction_record", "rejected_event", "burned_credit")


def upgrade() -> None:
    with steps():
        for statement in NEW_TABLES.split(";\n"):
            with_short_lock(statement.strip())

        with_short_lock(
            """
            ALTER TABLE account
                ADD COLUMN IF NOT EXISTS opening_balance numeric(38, 18),
                ADD COLUMN IF NOT EXISTS sequence bigint NOT NULL DEFAULT 0,
                ADD COLUMN IF NOT EXISTS head_hash bytea,
                ADD COLUMN IF NOT EXISTS rejections bigint NOT NULL DEFAULT 0,
                ADD COLUMN IF NOT EXISTS rejection_head bytea,
                ADD COLUMN IF NOT EXISTS last_recorded_at timestamptz
        """,
            on="account",
        )
        with_short_lock("ALTER TABLE account SET (fillfactor = 70)", on="account")
        for table in MANY_ROWS_A_USER:
            with_short_lock(f"ALTER TABLE {table} ALTER COLUMN user_id SET (n_distinct = -0.001)", on=table)
        with_short_lock(
            """
            ALTER TABLE burned_credit
                ADD COLUMN IF NOT EXISTS sequence bigint,
                ADD COLUMN IF NOT EXISTS balance_before numeric(38, 18),
                ADD COLUMN IF NOT EXISTS balance_after numeric(38, 18)
        """,
            on="burned_credit",
        )
        with_short_lock(
            """
            ALTER TABLE global_token_balance
                ADD COLUMN IF NOT EXISTS issued numeric,
                ADD COLUMN IF NOT EXISTS burned numeric
        """,
            on="global_token_balance",
        )

        add_constraint("account", "ck_account_sequence_not_negative", "CHECK (sequence >= 0)")
        add_constraint(
            "account",
            "ck_account_head_of_records",
            "CHECK ((sequence = 0) = (head_hash IS NULL) AND (sequence = 0) = (opening_balance IS NULL))",
        )
        add_constraint(
            "account",
            "ck_account_head_of_rejections",
            "CHECK (rejections >= 0 AND (rejections = 0) = (rejection_head IS NULL))",
        )
        add_constraint(
            "burned_credit",
            "ck_burned_credit_trail_all_or_nothing",
            "CHECK ((sequence IS NULL) = (balance_before IS NULL) AND (sequence IS NULL) = (balance_after IS NULL))",
        )
        add_constraint(
            "burned_credit",
            "ck_burned_credit_balances_tie",
            "CHECK (balance_after >= 0 AND balance_after = balance_before - amount)",
        )
        add_constraint(
            "burned_credit",
            "fk_burned_credit_transaction_record",
            "FOREIGN KEY (user_id, sequence) REFERENCES transaction_record (user_id, sequence)",
        )
        add_constraint(
            "global_token_balance",
            "ck_global_token_balance_legacy_row_or_stripe",
            "CHECK ((issued IS NULL) = (burned IS NULL) AND (issued IS NULL OR balance = 0))",
        )
        add_index(
            "burned_credit",
            "uq_burned_credit_user_id_sequence",
            "(user_id, sequence) WHERE sequence IS NOT NULL",
            unique=True,
        )

        with_short_lock("""
            CREATE OR REPLACE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN
                RAISE EXCEPTION '% of % refused: the audit trail is append-only', TG_OP, TG_TABLE_NAME
                    USING ERRCODE = 'restrict_violation',
                          HINT = 'Correct a record with another event: tokentrail publish.';
            END $$
        """)
        for table in APPEND_ONLY:
            with_short_lock(
                f"CREATE OR REPLACE TRIGGER append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {table} "
                "FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()",
                on=table,
            )
        with_short_lock(
            "CREATE OR REPLACE TRIGGER keep_account BEFORE DELETE OR TRUNCATE ON account "
            "FOR EACH STATEMENT EXECUTE FUNCTION refuse_change()",
            on="account",
        )


def downgrade() -> None:
    # Keeps every worker out until the end, so that nothing is recorded between the check and the drop.
    op.execute("SET LOCAL lock_timeout = '10s'")
    op.execute("LOCK TABLE account, transaction_record, rejected_event, dead_letter IN ACCESS EXCLUSIVE MODE")
    if "drop-history" not in context.get_x_argument(as_dictionary=True):
        _refuse_to_lose_history()

    for table in APPEND_ONLY:
        op.execute(f"DROP TRIGGER append_only ON {table}")
    op.execute("DROP TRIGGER keep_account ON account")
    op.execute("DROP FUNCTION refuse_change()")

    # The legacy software knows one row: add the stripes to it.
    op.execute("""
        UPDATE global_token_balance SET balance = balance
            + coalesce((SELECT sum(issued - burned) FROM global_token_balance WHERE issued IS NOT NULL), 0)
        WHERE issued IS NULL
    """)
    op.execute("DELETE FROM global_token_balance WHERE issued IS NOT NULL")
    op.execute("ALTER TABLE global_token_balance DROP COLUMN issued, DROP COLUMN burned")
    op.execute("""
        ALTER TABLE burned_credit DROP CONSTRAINT fk_burned_credit_transaction_record,
            DROP COLUMN sequence, DROP COLUMN balance_before, DROP COLUMN balance_after
    """)
    op.execute("""
        ALTER TABLE account DROP COLUMN opening_balance, DROP COLUMN sequence, DROP COLUMN head_hash,
            DROP COLUMN rejections, DROP COLUMN rejection_head, DROP COLUMN last_recorded_at
    """)
    op.execute("ALTER TABLE account RESET (fillfactor)")
    op.execute("ALTER TABLE burned_credit ALTER COLUMN user_id RESET (n_distinct)")
    for table in ("token_flow", "dead_letter", "rejected_event", "accrual_record", "transaction_record"):
        op.drop_table(table)


def _refuse_to_lose_history() -> None:
    """Refuse in the database itself, so that what `--sql` prints refuses too."""
    try:
        op.execute("""
            DO $$
            DECLARE
                held text := concat_ws(', ',
                    CASE WHEN EXISTS (SELECT FROM transaction_record) THEN 'transaction_record' END,
                    CASE WHEN EXISTS (SELECT FROM rejected_event) THEN 'rejected_event' END,
                    CASE WHEN EXISTS (SELECT FROM dead_letter) THEN 'dead_letter' END);
            BEGIN
                IF held <> '' THEN
                    RAISE EXCEPTION 'The downgrade would drop the audit trail, which holds rows (%); back up, then '
                        'drop them for good with: tokentrail migrate downgrade --drop-history', held
                        USING ERRCODE = 'restrict_violation';
                END IF;
            END $$
        """)
    except DBAPIError as error:
        message = getattr(getattr(error.orig, "diag", None), "message_primary", None)
        raise CommandError(message or str(error.orig)) from error
