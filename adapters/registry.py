"""The registry: which adapters there are, what they consist of, and which version is live.

Verbs in, frozen records out. Safe for several threads, and for several processes on one home. Bytes become durable
before the row that names them, and the row before the call returns: what was acknowledged stays, what was not is wholly
there or wholly absent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa

from adapters import schema
from adapters.alias_moves import (
    ANY,
    Expected,
    Order,
    Promotable,
    current,
    expect,
    generation_of,
    log,
    move,
    rollback_target,
    set_fallback,
)
from adapters.canaries import Route
from adapters.canary_shelf import Canaries
from adapters.errors import Conflict, InvalidRequest, RecordNotFound
from adapters.evaluations import Evaluations
from adapters.golden import golden_file
from adapters.home import Home
from adapters.prompts import prompt_format_to_json
from adapters.publish import (
    CONFIG_FILE,
    FORMAT_FILE,
    WEIGHTS_FILE,
    Files,
    Manifest,
    manifest_of,
    write_folder,
)
from adapters.publishing import Publisher
from adapters.records import (
    BASE_ID,
    CHAMPION,
    DEFAULT_TENANT,
    AdapterSummary,
    AdapterVersion,
    AliasRecord,
    BaseRecord,
    Fallback,
    ModelId,
    Move,
    MoveAction,
    PromptFormat,
    check_adapter_name,
    check_alias,
    parse_model_id,
)
from adapters.reports import GatePolicy, Report
from adapters.rows import base_row, checked_facts, line, text
from adapters.schema import Database
from adapters.shared_store import open_shared
from adapters.shelf import Shelf, chosen_base
from adapters.standings import Standings
from adapters.store import BlobStore
from adapters.strict_json import canonical


class Registry:
    """One tenant's view of a registry. Open it with `Registry.open`, close it when done.

    Every method raises StoreFailed when the disk or the database does.
    """

    def __init__(
        self,
        database: Database,
        store: BlobStore,
        root: Path,
        tenant: str = DEFAULT_TENANT,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.store = store
        self.tenant = tenant
        self._database = database
        self._now = now
        self._shelf = Shelf(tenant)
        self._evaluations = Evaluations(database, store, tenant, now)
        self._publisher = Publisher(database, store, self._shelf, root, tenant, now)
        self._meant_by_base = BASE_ID
        self.standings = Standings(database, self._shelf, tenant, now)
        self.canaries = Canaries(database, self.standings, tenant, now)

    @classmethod
    def open(cls, home: Home, tenant: str = DEFAULT_TENANT) -> Registry:
        """The registry of a home: its tables brought up to date, leftovers of killed writers removed."""
        store = BlobStore(home.blobs, shared=open_shared(home.store))
        return cls(Database(home.database_url), store, home.root, tenant)

    def close(self) -> None:
        """Let go of the database."""
        self._database.close()

    # -- bases ---------------------------------------------------------------------------------------------------

    def add_base(self, base: BaseRecord) -> BaseRecord:
        """Remember a base. The same digest again returns the row that is there; a taken name raises Conflict."""
        check_adapter_name(base.name)
        base = replace(base, tenant=self.tenant)
        with self._database.writes() as connection:
            for known in self._shelf.bases(connection):
                if known.digest == base.digest:
                    return known
                if known.name == base.name:
                    raise Conflict(f"a base {base.name!r} is here with other weights; add this one under another name")
            if self._shelf.adapter_exists(connection, base.name):
                raise Conflict(f"an adapter is called {base.name!r}; add the base under another name")
            connection.execute(sa.insert(schema.bases).values(**base_row(base)))
        return base

    def bases(self) -> list[BaseRecord]:
        """All bases, the first one added (the default) first."""
        with self._database.reads() as connection:
            return self._shelf.bases(connection)

    def base(self, which: str = BASE_ID) -> BaseRecord:
        """The base of this name, alias or digest; `base` is the first that can be served, or what `mean_by_base` said.

        Raises BaseMissing.
        """
        return self._chosen(self.bases(), which)

    def mean_by_base(self, base: BaseRecord) -> None:
        """Let the name `base` mean this base here: what a server's clients call so is the one that it serves."""
        self._meant_by_base = base.digest

    def _chosen(self, bases: Sequence[BaseRecord], which: str) -> BaseRecord:
        return chosen_base(bases, self._meant_by_base if which == BASE_ID else which)

    # -- publishing ----------------------------------------------------------------------------------------------

    def publish(
        self,
        name: str,
        files: Files,
        *,
        base: str | None = None,
        prompt_format: PromptFormat | None = None,
        facts: Mapping[str, object] | None = None,
        who: str,
        note: str = "",
    ) -> AdapterVersion:
        """Check an adapter's files and make them the next version of `name`, durably.

        files: file name -> path or bytes; adapter_config.json and adapter_model.safetensors are needed,
        prompt_format.json and golden_rows.json are read, others are ignored. base: name or digest; without it the
        config's own words or the shapes decide. prompt_format: in place of the file's. facts: how it was made, plain
        JSON. The same content under the same name is the version that is there. Raises AdapterRefused, InvalidRequest,
        BaseMissing, Conflict.
        """
        check_adapter_name(name)
        who, note = line(who, "who"), text(note, "note")
        kept_facts = checked_facts(facts or {})
        bases = self.bases()
        default = self._chosen(bases, base or BASE_ID)
        return self._publisher.publish(
            name,
            files,
            bases=bases,
            chosen=default if base else None,
            prompt_format=prompt_format,
            facts=kept_facts,
            who=who,
            note=note,
        )

    # -- reading -------------------------------------------------------------------------------------------------

    def manifest(self, digest: str) -> Manifest:
        """What a version consists of, by its digest; the bytes are verified. Raises RecordNotFound."""
        try:
            return manifest_of(self.store.read_verified(digest))
        except ValueError:
            raise RecordNotFound(f"no version has the digest {digest}") from None

    def adapters(self) -> list[AdapterSummary]:
        """Every adapter with its versions, newest first, and its aliases; sorted by name."""
        with self._database.reads() as connection:
            return self._shelf.summaries(connection, None)

    def adapter(self, name: str) -> AdapterSummary:
        """One adapter. Raises ModelNotFound with the nearest names."""
        with self._database.reads() as connection:
            return self._shelf.summary(connection, name)

    def version(self, name: str, number: int) -> AdapterVersion:
        """One version. Raises ModelNotFound with what there is instead."""
        with self._database.reads() as connection:
            return self._shelf.version(connection, name, number)

    def resolve(self, model: str | ModelId) -> AdapterVersion:
        """The version that a model id means now; a bare name means its champion. Bases are asked for with `base`.

        Raises ModelNotFound with the nearest names, NoChampion with the versions there are, InvalidRequest;
        VersionRetired and VersionRevoked with who did it and why.
        """
        wanted = parse_model_id(model) if isinstance(model, str) else model
        with self._database.reads() as connection:
            version = self._shelf.resolve(connection, wanted)
            self.standings.refuse_withdrawn(connection, version)
            return version

    def instead_of(self, model: str, aside: int) -> AdapterVersion | None:
        """Who answers for an alias while version `aside` of it is set aside, if the alias was told so: the version it
        points at, or when that is the one, the one before it.

        None when it was not told, when the id names a version, and when no such version is in service.
        """
        wanted = parse_model_id(model)
        with self._database.reads() as connection:
            return self.standings.instead_of(connection, wanted, aside)

    def route(self, model: str | ModelId) -> Route:
        """`resolve`, and in the same view of the registry what is tried beside the alias that the id names."""
        wanted = parse_model_id(model) if isinstance(model, str) else model
        with self._database.reads() as connection:
            return self.canaries.route(connection, wanted)

    def export(self, name: str, number: int, into: Path, *, original: bool = False) -> Path:
        """Write a version's files into a folder, made if absent: canonical, or with `original` the bytes as published.

        PEFT loads the canonical folder. Raises Conflict rather than replace a file that differs.
        """
        version = self.version(name, number)
        if original:
            contents = {file: self.store.read_verified(digest) for file, digest in version.originals.items()}
        else:
            manifest = self.manifest(version.digest)
            contents = {
                CONFIG_FILE: self.store.read_verified(manifest.config),
                WEIGHTS_FILE: self.store.read_verified(manifest.weights),
                FORMAT_FILE: canonical(prompt_format_to_json(version.prompt_format)),
                **golden_file(manifest.golden),
            }
        return write_folder(into, contents)

    # -- aliases -------------------------------------------------------------------------------------------------

    def set_alias(
        self, name: str, alias: str, number: int, *, who: str, reason: str = "", expected_version: Expected = ANY
    ) -> AliasRecord:
        """Point an alias at a version, if it points where the caller believes (None: nowhere yet; ANY: wherever).

        Raises GenerationMismatch, ModelNotFound; Conflict for `champion`, which only promote and rollback move.
        """
        if check_alias(alias) == CHAMPION:
            raise Conflict(f"{CHAMPION} moves by promote and rollback only; promote {name}@{number}")
        order = Order(name, alias, MoveAction.SET, number, line(who, "who"), text(reason, "reason"))
        with self._database.writes() as connection:
            self.standings.refuse_withdrawn(connection, self._shelf.version(connection, name, number))
            now = current(connection, self.tenant, name, alias)
            expect(name, alias, now, expected_version)
            moved = move(connection, self.tenant, order, self._now())
            fallback = Fallback.REFUSE if now is None else now.fallback
            return AliasRecord(name, alias, moved.to_number, moved.generation, moved.at, self.tenant, fallback)

    def set_fallback(self, name: str, alias: str, fallback: Fallback, *, who: str, reason: str = "") -> AliasRecord:
        """Say who answers for an alias while the engine has its version set aside.

        Raises RecordNotFound when the alias points nowhere yet, ModelNotFound.
        """
        who, reason = line(who, "who"), text(reason, "reason")
        with self._database.writes() as connection:
            self._shelf.require_adapter(connection, name)
            now = current(connection, self.tenant, name, check_alias(alias))
            if now is None:
                raise RecordNotFound(f"{name} has no alias {alias!r} yet; point it at a version first")
            return set_fallback(connection, self.tenant, now, fallback, who, reason, self._now())

    def promote(
        self,
        name: str,
        number: int,
        *,
        who: str,
        reason: str = "",
        force: bool = False,
        expected_version: Expected = ANY,
        expected_generation: int | None = None,
    ) -> Move:
        """Make a version the champion if the gate allows it. Promoting the champion again changes nothing.

        The gate judges in the transaction that moves the alias, so the champion cannot change in between.
        expected_generation: the alias must not have moved, away and back either, since it had this one. force
        overrules the gate, needs a reason, and is recorded. Raises GateRefused, GenerationMismatch, ModelNotFound,
        VersionRetired, VersionRevoked.
        """
        who, reason = line(who, "who"), text(reason, "reason")
        if force and not reason.strip():
            raise InvalidRequest("overruling the gate needs a reason, which is recorded", "reason")
        with self._database.writes() as connection:
            _, report = self._judge(connection, name, number, force, expected_version, expected_generation)
            action = MoveAction.FORCED if force else MoveAction.PROMOTE
            return move(
                connection, self.tenant, Order(name, CHAMPION, action, number, who, reason, report), self._now()
            )

    def may_promote(
        self, name: str, number: int, *, force: bool = False, expected_version: Expected = ANY
    ) -> Promotable:
        """What `promote` would do now; nothing is moved. Raises as it does."""
        with self._database.reads() as connection:
            return self._judge(connection, name, number, force, expected_version)[0]

    def _judge(
        self,
        connection: sa.Connection,
        name: str,
        number: int,
        force: bool,
        expected_version: Expected,
        expected_generation: int | None = None,
    ) -> tuple[Promotable, str | None]:
        """The promotion, and the report that lets it in, if one was needed."""
        version = self._shelf.version(connection, name, number)
        self.standings.refuse_withdrawn(connection, version)
        now = current(connection, self.tenant, name, CHAMPION)
        expect(name, CHAMPION, now, expected_version, expected_generation)
        champion = None if now is None else self._shelf.version(connection, name, now.number)
        found = Promotable(version, champion, generation_of(now))
        if force or (now is not None and now.number == number):
            return found, None
        return found, self._evaluations.admit(connection, version, champion)

    def rollback(
        self, name: str, *, who: str, reason: str = "", to: int | None = None, expected_version: Expected = ANY
    ) -> Move:
        """Make an earlier champion the champion again: the one before the present, or `to`.

        Raises Conflict when there is none, or when `to` never was champion; GenerationMismatch, ModelNotFound.
        """
        who, reason = line(who, "who"), text(reason, "reason")
        with self._database.writes() as connection:
            self._shelf.require_adapter(connection, name)
            expect(name, CHAMPION, current(connection, self.tenant, name, CHAMPION), expected_version)
            withdrawn = self.standings.withdrawn(connection, name)
            target = rollback_target(name, log(connection, self.tenant, name, CHAMPION), to, withdrawn)
            self.standings.refuse_withdrawn(connection, self._shelf.version(connection, name, target))
            order = Order(name, CHAMPION, MoveAction.ROLLBACK, target, who, reason)
            return move(connection, self.tenant, order, self._now())

    def history(self, name: str) -> list[Move]:
        """Every move of the adapter's aliases, newest first. Raises ModelNotFound."""
        with self._database.reads() as connection:
            self._shelf.require_adapter(connection, name)
            return log(connection, self.tenant, name)

    # -- reports and policies ------------------------------------------------------------------------------------

    def set_policy(self, name: str, policy: GatePolicy, who: str) -> None:
        """Make this the adapter's gate policy. Raises ModelNotFound, InvalidRequest."""
        who = line(who, "who")
        self.adapter(name)
        self._evaluations.set_policy(name, policy, who)

    def policy(self, name: str) -> GatePolicy | None:
        """The adapter's gate policy, or None when none is set."""
        with self._database.reads() as connection:
            return self._evaluations.policy(connection, name)

    def add_report(self, report: Report) -> str:
        """Keep a report and return its digest. Raises ModelNotFound, or Conflict when it is about other weights."""
        return self._evaluations.add(report, self.version(report.adapter, report.number))

    def reports(self, name: str, number: int | None = None) -> list[Report]:
        """The reports about an adapter or one version of it, newest first."""
        with self._database.reads() as connection:
            digests = self._evaluations.of(connection, name, number)
        return [self._evaluations.load(digest) for digest in digests]

    def report(self, digest: str) -> Report:
        """One report by its digest, or by an unambiguous beginning of it. Raises RecordNotFound, InvalidRequest."""
        return self._evaluations.read(digest)
