"""The registry's tables, and the database that holds them: SQLite in the home by default, Postgres by URL.

Every unique key begins with the tenant. Versions, moves, reports and policies are only ever added; triggers made by the
migrations refuse anything else. An alias points at a version by a foreign key, so it cannot dangle.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from filelock import FileLock, Timeout
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from adapters.errors import ConfigInvalid, ExtraMissing, StoreFailed
from adapters.home import usable
from adapters.strict_json import canonical

HEAD = "0003"  # the newest migration; a test compares it with the scripts
BUSY_TIMEOUT_S = 15
_WRITER_LOCK = 0x10AA_97A0  # any constant of ours: the advisory lock that makes Postgres writers take turns


class UtcTime(sa.types.TypeDecorator[datetime]):
    """A moment as ISO 8601 text in UTC: the same bytes and order in every database."""

    impl = sa.String(32)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> str | None:
        return None if value is None else value.astimezone(UTC).isoformat(timespec="microseconds")

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> datetime | None:
        return None if value is None else datetime.fromisoformat(value)


class JsonText(sa.types.TypeDecorator[Any]):
    """A JSON value as canonical ASCII text, which every database keeps as it is."""

    impl = sa.Text()
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str:
        return canonical(value).decode("ascii")

    def process_result_value(self, value: str | None, dialect: sa.Dialect) -> Any:
        return None if value is None else json.loads(value)


metadata = sa.MetaData()

NAME = sa.String(64)
DIGEST = sa.String(64)
TENANT = sa.String(64)
KIND = sa.String(16)
# SQLite counts rows by itself only for a plain INTEGER key.
ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")

bases = sa.Table(
    "bases",
    metadata,
    sa.Column("id", ID, primary_key=True, autoincrement=True),
    sa.Column("kind", KIND, nullable=False),
    sa.Column("tenant", TENANT, nullable=False),
    sa.Column("name", sa.Text, nullable=False),
    sa.Column("digest", DIGEST, nullable=False),
    sa.Column("family", sa.Text, nullable=False),
    sa.Column("folder", sa.Text, nullable=False),
    sa.Column("modules", JsonText, nullable=False),
    sa.Column("max_positions", sa.BigInteger, nullable=False),
    sa.Column("vocab_size", sa.BigInteger, nullable=False),
    sa.Column("parameters", sa.BigInteger, nullable=False),
    sa.Column("source", sa.Text, nullable=False),
    sa.Column("aliases", JsonText, nullable=False),
    sa.Column("note", sa.Text, nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
    sa.UniqueConstraint("tenant", "digest", name="uq_bases_digest"),
    sa.UniqueConstraint("tenant", "name", name="uq_bases_name"),
)

adapters = sa.Table(
    "adapters",
    metadata,
    sa.Column("tenant", TENANT, primary_key=True),
    sa.Column("name", NAME, primary_key=True),
    sa.Column("kind", KIND, nullable=False),
    sa.Column("created_at", UtcTime, nullable=False),
)

versions = sa.Table(
    "versions",
    metadata,
    sa.Column("tenant", TENANT, primary_key=True),
    sa.Column("name", NAME, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("kind", KIND, nullable=False),
    sa.Column("digest", DIGEST, nullable=False),
    sa.Column("base_digest", DIGEST, nullable=False),
    sa.Column("bound_by", sa.String(16), nullable=False),
    sa.Column("config", DIGEST, nullable=False),
    sa.Column("weights", DIGEST, nullable=False),
    sa.Column("rank", sa.Integer, nullable=False),
    sa.Column("modules", JsonText, nullable=False),
    sa.Column("size_bytes", sa.BigInteger, nullable=False),
    sa.Column("prompt_format", JsonText, nullable=False),
    sa.Column("originals", JsonText, nullable=False),
    sa.Column("facts", JsonText, nullable=False),
    sa.Column("published_by", sa.Text, nullable=False),
    sa.Column("published_at", UtcTime, nullable=False),
    sa.Column("note", sa.Text, nullable=False),
    sa.UniqueConstraint("tenant", "name", "digest", name="uq_versions_digest"),
    sa.ForeignKeyConstraint(["tenant", "name"], ["adapters.tenant", "adapters.name"], name="fk_versions_adapter"),
    sa.ForeignKeyConstraint(["tenant", "base_digest"], ["bases.tenant", "bases.digest"], name="fk_versions_base"),
    sa.Index("ix_versions_digest", "tenant", "digest"),
)

aliases = sa.Table(
    "aliases",
    metadata,
    sa.Column("tenant", TENANT, primary_key=True),
    sa.Column("name", NAME, primary_key=True),
    sa.Column("alias", sa.String(32), primary_key=True),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("moved_at", UtcTime, nullable=False),
    sa.Column("fallback", sa.String(16), nullable=False, server_default="503"),
    sa.ForeignKeyConstraint(
        ["tenant", "name", "number"], ["versions.tenant", "versions.name", "versions.number"], name="fk_aliases_version"
    ),
)

standings = sa.Table(
    "standings",
    metadata,
    sa.Column("tenant", TENANT, primary_key=True),
    sa.Column("name", NAME, primary_key=True),
    sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("in_flight", sa.String(16), nullable=False),
    sa.Column("pinned", sa.Boolean, nullable=False),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("why", sa.Text, nullable=False),
    sa.Column("at", UtcTime, nullable=False),
    sa.ForeignKeyConstraint(
        ["tenant", "name", "number"],
        ["versions.tenant", "versions.name", "versions.number"],
        name="fk_standings_version",
    ),
)

moves = sa.Table(
    "moves",
    metadata,
    sa.Column("id", ID, primary_key=True, autoincrement=True),
    sa.Column("tenant", TENANT, nullable=False),
    sa.Column("name", NAME, nullable=False),
    sa.Column("alias", sa.String(32), nullable=False),
    sa.Column("action", sa.String(16), nullable=False),
    sa.Column("from_number", sa.Integer, nullable=True),
    sa.Column("to_number", sa.Integer, nullable=False),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("why", sa.Text, nullable=False),
    sa.Column("report", DIGEST, nullable=True),
    sa.Column("at", UtcTime, nullable=False),
    # One winner per generation, whatever the writers believe.
    sa.UniqueConstraint("tenant", "name", "alias", "generation", name="uq_moves_generation"),
    sa.ForeignKeyConstraint(
        ["tenant", "name", "to_number"],
        ["versions.tenant", "versions.name", "versions.number"],
        name="fk_moves_version",
    ),
)

reports = sa.Table(
    "reports",
    metadata,
    sa.Column("id", ID, primary_key=True, autoincrement=True),
    sa.Column("kind", KIND, nullable=False),
    sa.Column("tenant", TENANT, nullable=False),
    sa.Column("digest", DIGEST, nullable=False),
    sa.Column("name", NAME, nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("adapter_digest", DIGEST, nullable=False),
    sa.Column("data_digest", sa.Text, nullable=False),
    sa.Column("champion_digest", DIGEST, nullable=True),
    sa.Column("added_at", UtcTime, nullable=False),
    sa.UniqueConstraint("tenant", "digest", name="uq_reports_digest"),
    sa.ForeignKeyConstraint(
        ["tenant", "name", "number"], ["versions.tenant", "versions.name", "versions.number"], name="fk_reports_version"
    ),
    sa.Index("ix_reports_version", "tenant", "name", "number"),
)

policies = sa.Table(
    "policies",
    metadata,
    sa.Column("id", ID, primary_key=True, autoincrement=True),
    sa.Column("tenant", TENANT, nullable=False),
    sa.Column("name", NAME, nullable=False),
    sa.Column("policy", JsonText, nullable=False),
    sa.Column("who", sa.Text, nullable=False),
    sa.Column("at", UtcTime, nullable=False),
    sa.ForeignKeyConstraint(["tenant", "name"], ["adapters.tenant", "adapters.name"], name="fk_policies_adapter"),
    sa.Index("ix_policies_adapter", "tenant", "name"),
)

# What is tried beside an alias while it has this generation.
splits = sa.Table(
    "splits",
    metadata,
    sa.Column("id", ID, primary_key=True, autoincrement=True),
    sa.Column("tenant", TENANT, nullable=False),
    sa.Column("name", NAME, nullable=False),
    sa.Column("alias", sa.String(32), nullable=False),
    sa.Column("generation", sa.Integer, nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("canary_number", sa.Integer, nullable=True),
    sa.Column("shadow_number", sa.Integer, nullable=True),
    sa.Column("settings", JsonText, nullable=False),
    sa.Column("at", UtcTime, nullable=False),
    sa.UniqueConstraint("tenant", "name", "alias", "generation", name="uq_splits_generation"),
    *(
        sa.ForeignKeyConstraint(
            ["tenant", "name", column], ["versions.tenant", "versions.name", "versions.number"], name=f"fk_splits_{to}"
        )
        for column, to in (("number", "version"), ("canary_number", "canary"), ("shadow_number", "shadow"))
    ),
)

# What came of a trial, as each gateway counted it since its start: the only rows of a history that change.
figures = sa.Table(
    "figures",
    metadata,
    sa.Column("tenant", TENANT, primary_key=True),
    sa.Column("trial", sa.String(16), primary_key=True),
    sa.Column("arm", sa.String(16), primary_key=True),
    sa.Column("gateway", sa.String(32), primary_key=True),
    sa.Column("counts", JsonText, nullable=False),
    sa.Column("at", UtcTime, nullable=False),
)


class Database:
    """Transactions on the registry's tables. Writers take turns, in SQLite and in Postgres alike.

    Opening brings the tables to the newest migration. Raises StoreFailed when the database cannot be reached,
    ConfigInvalid when the URL is wrong or a newer Loraplane wrote it, ExtraMissing when the driver is absent.
    """

    def __init__(self, url: str) -> None:
        parsed = _parsed(url)
        self._sqlite = parsed.get_backend_name() == "sqlite"
        self._engine = _engine(parsed)
        with _as_store_failure(), _one_opener(parsed):
            self._upgrade()

    def close(self) -> None:
        """Close every connection."""
        self._engine.dispose()

    @contextmanager
    def reads(self) -> Iterator[sa.Connection]:
        """One consistent view of all tables."""
        options: dict[str, Any] = {} if self._sqlite else {"isolation_level": "REPEATABLE READ"}
        with _as_store_failure(), self._engine.connect().execution_options(**options) as connection, connection.begin():
            yield connection

    @contextmanager
    def writes(self) -> Iterator[sa.Connection]:
        """One transaction, alone: durable when the context ends, undone when it raises."""
        with (
            _as_store_failure(),
            self._engine.connect().execution_options(loraplane_writes=True) as connection,
            connection.begin(),
        ):
            if not self._sqlite:
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_WRITER_LOCK)))
            yield connection

    def revision(self) -> str | None:
        """The migration that the tables are at; None when there are none."""
        with self.reads() as connection:
            if not sa.inspect(connection).has_table("alembic_version"):
                return None
            found: str | None = connection.scalar(sa.text("SELECT version_num FROM alembic_version"))
            return found

    def _upgrade(self) -> None:
        if self.revision() == HEAD:
            return
        # Imported here: alembic is needed once in a registry's life, and costs as much as all else on this road.
        from alembic import command
        from alembic.config import Config
        from alembic.util.exc import CommandError

        config = Config()
        config.set_main_option("script_location", str(Path(__file__).with_name("migrations")).replace("%", "%%"))
        with self.writes() as connection:
            config.attributes["connection"] = connection
            try:
                command.upgrade(config, "head")
            except CommandError as error:
                raise ConfigInvalid(
                    f"the registry was written by a newer Loraplane ({error}); upgrade, or use another LORAPLANE_HOME"
                ) from error


def _parsed(url: str) -> sa.URL:
    try:
        parsed = sa.make_url(url)
    except ArgumentError:
        raise ConfigInvalid(
            "the registry's database URL cannot be read; use sqlite:///FILE or postgresql://..."
        ) from None
    if parsed.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConfigInvalid(f"the registry lives in SQLite or Postgres, not in {parsed.get_backend_name()!r}")
    return parsed.set(drivername="postgresql+psycopg") if parsed.drivername == "postgresql" else parsed


def _engine(url: sa.URL) -> sa.Engine:
    if url.get_backend_name() == "postgresql":
        try:
            return sa.create_engine(url, pool_pre_ping=True)
        except (ModuleNotFoundError, NoSuchModuleError):
            raise ExtraMissing("postgres", "A registry in Postgres") from None
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S})
    sa.event.listen(engine, "connect", _prepare_sqlite)
    sa.event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: object) -> None:
    # The driver's own transaction handling begins too late for a consistent read; `_begin_sqlite` does it.
    connection.isolation_level = None
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")  # an acknowledged write survives a power cut, not only a kill
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_sqlite(connection: sa.Connection) -> None:
    # A writer takes its lock at once: upgrading a read lock later fails without waiting when another wrote meanwhile.
    writes = connection.get_execution_options().get("loraplane_writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def _one_opener(url: sa.URL) -> Iterator[None]:
    """Keeps two processes from making one new SQLite file at once; switching it to WAL would not wait its turn."""
    if url.get_backend_name() != "sqlite" or not url.database:
        yield
        return
    folder = Path(url.database).absolute().parent
    if not folder.is_dir():
        raise StoreFailed(f"the folder of the registry's database {url.database} does not exist", retry_after_s=None)
    lock = FileLock(f"{url.database}.lock", timeout=BUSY_TIMEOUT_S)
    with usable(folder):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _as_store_failure() -> Iterator[None]:
    try:
        yield
    except (DBAPIError, PoolTimeout, Timeout) as error:
        cause = error.orig if isinstance(error, DBAPIError) else error
        raise StoreFailed(f"the registry's database failed: {str(cause).strip()}; try again, or look at it") from error
