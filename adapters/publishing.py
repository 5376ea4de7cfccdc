"""The last part of a publication: bytes that were checked become durable, and then a row makes the version visible."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import Path

import sqlalchemy as sa

from adapters import schema
from adapters.errors import Conflict
from adapters.publish import Files, Prepared, prepare
from adapters.records import AdapterVersion, BaseRecord, PromptFormat
from adapters.rows import version_row
from adapters.schema import Database
from adapters.shelf import Shelf
from adapters.store import BlobStore


class Publisher:
    """Publishes into one tenant's registry. root: the folders of bases are relative to it."""

    def __init__(
        self,
        database: Database,
        store: BlobStore,
        shelf: Shelf,
        root: Path,
        tenant: str,
        now: Callable[[], datetime],
    ) -> None:
        self._database, self._store, self._shelf = database, store, shelf
        self._root, self._tenant, self._now = root, tenant, now

    def publish(
        self,
        name: str,
        files: Files,
        *,
        bases: Sequence[BaseRecord],
        chosen: BaseRecord | None,
        prompt_format: PromptFormat | None,
        facts: dict[str, object],
        who: str,
        note: str,
    ) -> AdapterVersion:
        """The next version of `name`, or the one that has this content already; see `Registry.publish`.

        chosen: the base that the caller named, one of bases.
        """
        with prepare(
            self._store, files, root=self._root, bases=bases, chosen=chosen, prompt_format=prompt_format
        ) as prepared:
            with self._database.reads() as connection:
                known = self._shelf.version_by_digest(connection, name, prepared.digest)
            prepared.commit(known)
            if known is not None:
                return known
            return self._add_version(name, prepared, facts, who, note)

    def _add_version(
        self, name: str, prepared: Prepared, facts: dict[str, object], who: str, note: str
    ) -> AdapterVersion:
        now = self._now()
        if prepared.notes:
            facts = {**facts, "config_notes": list(prepared.notes)}
        if prepared.manifest.golden:
            facts = {**facts, "golden_rows": len(prepared.manifest.golden)}
        with self._database.writes() as connection:
            known = self._shelf.version_by_digest(connection, name, prepared.digest)
            if known is not None:
                return known
            if not self._shelf.adapter_exists(connection, name):
                if any(name in (base.name, *base.aliases) for base in self._shelf.bases(connection)):
                    raise Conflict(f"a base is called {name!r}; publish the adapter under another name")
                row = {"kind": "adapter", "tenant": self._tenant, "name": name, "created_at": now}
                connection.execute(sa.insert(schema.adapters).values(**row))
            version = AdapterVersion(
                name=name,
                number=self._shelf.last_number(connection, name) + 1,
                digest=prepared.digest,
                base_digest=prepared.base.digest,
                bound_by=prepared.bound_by,
                rank=prepared.rank,
                modules=prepared.modules,
                size_bytes=prepared.size_bytes,
                prompt_format=prepared.manifest.prompt_format,
                originals=prepared.originals,
                facts=facts,
                published_by=who,
                published_at=now,
                note=note,
                tenant=self._tenant,
            )
            row = version_row(version, prepared.manifest.config, prepared.manifest.weights)
            connection.execute(sa.insert(schema.versions).values(**row))
        return version
