"""Usage: a row for each attempt, sums by the hour, and the read offsets of the journals."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_NAMES = ("key", "gateway", "model", "deployment")
_SUMS = ("attempts", "estimated", "prompt_tokens", "output_tokens", "billed_prompt_tokens", "billed_output_tokens")


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "usage_rows",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
        sa.Column("attempt_id", sa.String(64), nullable=False, unique=True),
        sa.Column("began_ms", sa.BigInteger, nullable=False),
        sa.Column("ended_ms", sa.BigInteger, nullable=False),
        *(sa.Column(name, sa.String(200), nullable=False) for name in (*_NAMES, "region")),
        sa.Column("outcome", sa.String(32), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("output_tokens", sa.BigInteger, nullable=False),
        sa.Column("exact", sa.Boolean, nullable=False),
        sa.Column("billed_prompt_tokens", sa.BigInteger, nullable=False),
        sa.Column("billed_output_tokens", sa.BigInteger, nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
    )
    op.create_table(
        "usage_hours",
        sa.Column("hour", sa.BigInteger, primary_key=True),
        *(sa.Column(name, sa.String(200), primary_key=True) for name in _NAMES),
        *(sa.Column(name, sa.BigInteger, nullable=False) for name in _SUMS),
    )
    op.create_table(
        "usage_open",
        sa.Column("attempt_id", sa.String(64), primary_key=True),
        sa.Column("run", sa.String(64), nullable=False),
        sa.Column("intent", sa.Text, nullable=False),
        sa.Column("progress", sa.Text, nullable=False),
    )
    op.create_table(
        "usage_read",
        sa.Column("file", sa.String(100), primary_key=True),
        sa.Column("offset", sa.BigInteger, nullable=False),
    )


def downgrade() -> None:
    """Remove the tables."""
    for table in ("usage_read", "usage_open", "usage_hours", "usage_rows"):
        op.drop_table(table)
