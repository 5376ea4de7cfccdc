"""Run by alembic: applies the migrations on the connection, and in the transaction, that the registry hands over."""

from __future__ import annotations

from alembic import context

from adapters.schema import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    # The registry commits: all migrations of an upgrade, or none.
    transactional_ddl=False,
)
context.run_migrations()
