"""What is decreed on a version (retired, revoked, pinned), and who answers for an alias whose version is set aside."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the table and the column."""
    op.create_table(
        "standings",
        sa.Column("tenant", sa.String(64), primary_key=True, nullable=False),
        sa.Column("name", sa.String(64), primary_key=True, nullable=False),
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("in_flight", sa.String(16), nullable=False),
        sa.Column("pinned", sa.Boolean(), nullable=False),
        sa.Column("who", sa.Text(), nullable=False),
        sa.Column("why", sa.Text(), nullable=False),
        sa.Column("at", sa.String(32), nullable=False),
        sa.ForeignKeyConstraint(
            ["tenant", "name", "number"],
            ["versions.tenant", "versions.name", "versions.number"],
            name="fk_standings_version",
        ),
    )
    op.add_column("aliases", sa.Column("fallback", sa.String(16), nullable=False, server_default="503"))


def downgrade() -> None:
    """Going back would put revoked versions into service: restore a copy instead."""
    raise RuntimeError("decrees are not taken away; restore a copy of the registry instead")
