"""legacy schema

Why: the tables of a token system without an audit trail: balances, burns, one global balance.
Deploy: into an empty database. A database that has these tables already is stamped: `tokentrail migrate stamp`.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision: str = "0001"
down_revision: str | None = None
branch_labels: None = None
depends_on: None = None

KEY = sa.Text(collation="C")
MONEY = sa.Numeric(38, 18)


def upgrade() -> None:
    op.create_table(
        "account",
        sa.Column("user_id", KEY, nullable=False),
        sa.Column("balance", MONEY, nullable=False, server_default=sa.text("0")),
        sa.PrimaryKeyConstraint("user_id", name="pk_account"),
        sa.CheckConstraint("balance >= 0", name=op.f("ck_account_balance_not_negative")),
    )
    op.create_table(
        "burned_credit",
        sa.Column("user_id", KEY, nullable=False),
        sa.Column("id", sa.BigInteger, sa.Identity(always=True), nullable=False),
        sa.Column("amount", MONEY, nullable=False),
        sa.Column("action", sa.Text, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False, server_default=sa.text("now()")),
        sa.PrimaryKeyConstraint("user_id", "id", name="pk_burned_credit"),
        sa.CheckConstraint("amount > 0", name=op.f("ck_burned_credit_amount_positive")),
    )
    op.create_table(
        "global_token_balance",
        sa.Column("id", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("balance", MONEY, nullable=False, server_default=sa.text("0")),
        sa.PrimaryKeyConstraint("id", name="pk_global_token_balance"),
    )
    op.execute("INSERT INTO global_token_balance (id) VALUES (0)")


def downgrade() -> None:
    op.drop_table("global_token_balance")
    op.drop_table("burned_credit")
    op.drop_table("account")
