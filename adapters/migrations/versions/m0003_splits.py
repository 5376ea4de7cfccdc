"""Canaries and shadows: what is tried beside an alias, and what came of it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make the tables."""
    op.create_table(
        "splits",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=True),
        _text("tenant", 64),
        _text("name", 64),
        _text("alias", 32),
        sa.Column("generation", sa.Integer(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("canary_number", sa.Integer(), nullable=True),
        sa.Column("shadow_number", sa.Integer(), nullable=True),
        _text("settings"),
        _text("at", 32),
        sa.UniqueConstraint("tenant", "name", "alias", "generation", name="uq_splits_generation"),
        _to_version("fk_splits_version", "number"),
        _to_version("fk_splits_canary", "canary_number"),
        _to_version("fk_splits_shadow", "shadow_number"),
    )
    op.create_table(
        "figures",
        _text("tenant", 64, key=True),
        _text("trial", 16, key=True),
        _text("arm", 16, key=True),
        _text("gateway", 32, key=True),
        _text("counts"),
        _text("at", 32),
    )
    for verb in ("UPDATE", "DELETE"):
        trigger = f"CREATE TRIGGER splits_no_{verb.lower()} BEFORE {verb} ON splits FOR EACH ROW"
        if op.get_bind().dialect.name == "postgresql":
            op.execute(f"{trigger} EXECUTE FUNCTION loraplane_append_only()")
        else:
            op.execute(f"{trigger} BEGIN SELECT RAISE(ABORT, 'rows of splits are never changed'); END")


def downgrade() -> None:
    """Going back would lose what was tried: restore a copy instead."""
    raise RuntimeError("the trials' tables are not taken away; restore a copy of the registry instead")


def _text(name: str, length: int | None = None, *, key: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(length) if length else sa.Text(), nullable=False, primary_key=key)


def _to_version(name: str, column: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["tenant", "name", column], ["versions.tenant", "versions.name", "versions.number"], name=name
    )
