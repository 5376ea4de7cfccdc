"""The first tables: bases, adapters, versions, aliases, moves, reports, policies.

A migration says what it made when it was written; it does not import the tables as they are today.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_APPEND_ONLY = ("versions", "moves", "reports", "policies")


def upgrade() -> None:
    """Make the tables."""
    serial = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.create_table(
        "bases",
        sa.Column("id", serial, primary_key=True, autoincrement=True),
        _text("kind", 16),
        _text("tenant", 64),
        _text("name"),
        _text("digest", 64),
        _text("family"),
        _text("folder"),
        _text("modules"),
        sa.Column("max_positions", sa.BigInteger(), nullable=False),
        sa.Column("vocab_size", sa.BigInteger(), nullable=False),
        sa.Column("parameters", sa.BigInteger(), nullable=False),
        _text("source"),
        _text("aliases"),
        _text("note"),
        _text("created_at", 32),
        sa.UniqueConstraint("tenant", "digest", name="uq_bases_digest"),
        sa.UniqueConstraint("tenant", "name", name="uq_bases_name"),
    )
    op.create_table(
        "adapters",
        _text("tenant", 64, key=True),
        _text("name", 64, key=True),
        _text("kind", 16),
        _text("created_at", 32),
    )
    op.create_table(
        "versions",
        _text("tenant", 64, key=True),
        _text("name", 64, key=True),
        sa.Column("number", sa.Integer(), primary_key=True, autoincrement=False),
        _text("kind", 16),
        _text("digest", 64),
        _text("base_digest", 64),
        _text("bound_by", 16),
        _text("config", 64),
        _text("weights", 64),
        sa.Column("rank", sa.Integer(), nullable=False),
        _text("modules"),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        _text("prompt_format"),
        _text("originals"),
        _text("facts"),
        _text("published_by"),
        _text("published_at", 32),
        _text("note"),
        sa.UniqueConstraint("tenant", "name", "digest", name="uq_versions_digest"),
        sa.ForeignKeyConstraint(["tenant", "name"], ["adapters.tenant", "adapters.name"], name="fk_versions_adapter"),
        sa.ForeignKeyConstraint(["tenant", "base_digest"], ["bases.tenant", "bases.digest"], name="fk_versions_base"),
    )
    op.create_index("ix_versions_digest", "versions", ["tenant", "digest"])
    op.create_table(
        "aliases",
        _text("tenant", 64, key=True),
        _text("name", 64, key=True),
        _text("alias", 32, key=True),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        _text("moved_at", 32),
        _to_version("fk_aliases_version", "number"),
    )
    op.create_table(
        "moves",
        sa.Column("id", serial, primary_key=True, autoincrement=True),
        _text("tenant", 64),
        _text("name", 64),
        _text("alias", 32),
        _text("action", 16),
        sa.Column("from_number", sa.Integer(), nullable=True),
        sa.Column("to_number", sa.Integer(), nullable=False),
        sa.Column("generation", sa.Integer(), nullable=False),
        _text("who"),
        _text("why"),
        sa.Column("report", sa.String(64), nullable=True),
        _text("at", 32),
        sa.UniqueConstraint("tenant", "name", "alias", "generation", name="uq_moves_generation"),
        _to_version("fk_moves_version", "to_number"),
    )
    op.create_table(
        "reports",
        sa.Column("id", serial, primary_key=True, autoincrement=True),
        _text("kind", 16),
        _text("tenant", 64),
        _text("digest", 64),
        _text("name", 64),
        sa.Column("number", sa.Integer(), nullable=False),
        _text("adapter_digest", 64),
        _text("data_digest"),
        sa.Column("champion_digest", sa.String(64), nullable=True),
        _text("added_at", 32),
        sa.UniqueConstraint("tenant", "digest", name="uq_reports_digest"),
        _to_version("fk_reports_version", "number"),
    )
    op.create_index("ix_reports_version", "reports", ["tenant", "name", "number"])
    op.create_table(
        "policies",
        sa.Column("id", serial, primary_key=True, autoincrement=True),
        _text("tenant", 64),
        _text("name", 64),
        _text("policy"),
        _text("who"),
        _text("at", 32),
        sa.ForeignKeyConstraint(["tenant", "name"], ["adapters.tenant", "adapters.name"], name="fk_policies_adapter"),
    )
    op.create_index("ix_policies_adapter", "policies", ["tenant", "name"])
    _make_append_only()


def downgrade() -> None:
    """Going back would lose versions and history: restore a copy instead."""
    raise RuntimeError("the first tables are not taken away; restore a copy of the registry instead")


def _text(name: str, length: int | None = None, *, key: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(length) if length else sa.Text(), nullable=False, primary_key=key)


def _to_version(name: str, column: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        ["tenant", "name", column], ["versions.tenant", "versions.name", "versions.number"], name=name
    )


def _make_append_only() -> None:
    """Refuse UPDATE and DELETE where history lies, whoever asks."""
    postgres = op.get_bind().dialect.name == "postgresql"
    if postgres:
        op.execute(
            "CREATE FUNCTION loraplane_append_only() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN RAISE EXCEPTION 'rows of % are never changed', TG_TABLE_NAME; END $$"
        )
    for table in _APPEND_ONLY:
        for verb in ("UPDATE", "DELETE"):
            trigger = f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} FOR EACH ROW"
            if postgres:
                op.execute(f"{trigger} EXECUTE FUNCTION loraplane_append_only()")
            else:
                op.execute(f"{trigger} BEGIN SELECT RAISE(ABORT, 'rows of {table} are never changed'); END")
