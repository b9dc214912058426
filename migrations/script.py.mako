"""${message}

Why: …
Deploy: …

Rules for every revision: old workers run on the new schema; one strong lock per transaction, under lock_timeout;
indexes of existing tables CONCURRENTLY; constraints NOT VALID, then VALIDATE in a later transaction; every step
can be run again after it was killed half-way. The functions for that are in `migrations/steps.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
${imports if imports else ""}
revision: str = ${repr(up_revision)}
down_revision: str | None = ${repr(down_revision)}
branch_labels: str | Sequence[str] | None = ${repr(branch_labels)}
depends_on: str | Sequence[str] | None = ${repr(depends_on)}


def upgrade() -> None:
    ${upgrades if upgrades else "pass"}


def downgrade() -> None:
    ${downgrades if downgrades else "pass"}
