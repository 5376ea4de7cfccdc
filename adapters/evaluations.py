"""Reports and gate policies as the registry keeps them. Reports are blobs; their rows say what they speak for."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime

import sqlalchemy as sa

from adapters import schema
from adapters.errors import Conflict, GateRefused, InvalidRequest, RecordNotFound
from adapters.gate import decide, rival_of
from adapters.records import AdapterVersion
from adapters.reports import (
    SHORTEST_DIGEST,
    GatePolicy,
    Report,
    Verdict,
    check_policy,
    check_report,
    report_from_json,
)
from adapters.schema import Database
from adapters.store import BlobStore

MAX_REPORT_BYTES = 64 << 20


class Evaluations:
    """What a registry knows about how good its versions are."""

    def __init__(self, database: Database, store: BlobStore, tenant: str, now: Callable[[], datetime]) -> None:
        self._database = database
        self._store = store
        self._tenant = tenant
        self._now = now

    def set_policy(self, name: str, policy: GatePolicy, who: str) -> None:
        """Make this the adapter's policy from now on; earlier ones stay on record. Raises InvalidRequest."""
        check_policy(policy)
        values = {
            "data_digest": policy.data_digest,
            "min_n": policy.min_n,
            "metric": policy.metric,
            "margin": policy.margin,
            "tolerance": policy.tolerance,
            "max_empty_rate": policy.max_empty_rate,
            "length_ratio": list(policy.length_ratio),
        }
        with self._database.writes() as connection:
            connection.execute(
                sa.insert(schema.policies).values(
                    tenant=self._tenant, name=name, policy=values, who=who, at=self._now()
                )
            )

    def policy(self, connection: sa.Connection, name: str) -> GatePolicy | None:
        """The adapter's present policy, or None."""
        table = schema.policies
        raw = connection.scalar(
            sa.select(table.c.policy)
            .where(table.c.tenant == self._tenant, table.c.name == name)
            .order_by(table.c.id.desc())
            .limit(1)
        )
        if raw is None:
            return None
        return GatePolicy(**{**raw, "length_ratio": (raw["length_ratio"][0], raw["length_ratio"][1])})

    def add(self, report: Report, version: AdapterVersion) -> str:
        """Keep a report about this version and return its digest; the same report twice is one.

        Raises Conflict when it speaks of other weights or another base, InvalidRequest when it is no plain JSON or its
        figures contradict each other.
        """
        if report.adapter_digest != version.digest:
            raise Conflict(
                f"the report is about {report.adapter_digest[:12]}, and {version.id} is {version.digest[:12]}"
            )
        if report.base_digest != version.base_digest:
            raise Conflict(
                f"the report was made on the base {report.base_digest[:12]}, but {version.id} belongs to "
                f"{version.base_digest[:12]}"
            )
        check_report(report)
        try:
            data = report.canonical()
        except (TypeError, ValueError) as error:
            raise InvalidRequest(f"the report is no plain JSON: {error}", "report") from None
        digest = self._store.put(data, max_bytes=MAX_REPORT_BYTES)
        table = schema.reports
        with self._database.writes() as connection:
            known = connection.scalar(
                sa.select(table.c.id).where(table.c.tenant == self._tenant, table.c.digest == digest)
            )
            if known is None:
                connection.execute(
                    sa.insert(table).values(
                        kind="report",
                        tenant=self._tenant,
                        digest=digest,
                        name=version.name,
                        number=version.number,
                        adapter_digest=report.adapter_digest,
                        data_digest=report.data_digest,
                        champion_digest=report.champion_digest,
                        added_at=self._now(),
                    )
                )
        return digest

    def of(self, connection: sa.Connection, name: str, number: int | None) -> list[str]:
        """Digests of the reports about an adapter, or about one version of it, newest first."""
        table = schema.reports
        query = sa.select(table.c.digest).where(table.c.tenant == self._tenant, table.c.name == name)
        if number is not None:
            query = query.where(table.c.number == number)
        return list(connection.scalars(query.order_by(table.c.id.desc())))

    def read(self, digest: str) -> Report:
        """The report of a digest, or of an unambiguous beginning of one, its bytes verified.

        Raises RecordNotFound, or InvalidRequest when several begin so.
        """
        with self._database.reads() as connection:
            table = schema.reports
            known = connection.scalars(
                sa.select(table.c.digest)
                .where(table.c.tenant == self._tenant, table.c.digest.startswith(digest, autoescape=True))
                .distinct()
                .limit(2)
            ).all()
        if not known or len(digest) < SHORTEST_DIGEST:
            raise RecordNotFound(f"no report {digest[:80]!r} is stored")
        if len(known) > 1:
            raise InvalidRequest(f"several reports begin with {digest}; give more of the digest", "digest")
        return self.load(known[0])

    def load(self, digest: str) -> Report:
        """The report of a digest that a row named."""
        return report_from_json(json.loads(self._store.read_verified(digest)))

    def admit(self, connection: sa.Connection, version: AdapterVersion, champion: AdapterVersion | None) -> str | None:
        """Let the gate judge a version; the digest of the report it judged by. Raises GateRefused."""
        rival = rival_of(version, champion)
        champion_digest = None if rival is None else rival.digest
        policy = self.policy(connection, version.name)
        report = None if policy is None else self._relevant(connection, version.digest, policy, champion_digest)
        decision = decide(report, policy, version_digest=version.digest, champion_digest=champion_digest)
        if decision.verdict is not Verdict.PASS:
            raise GateRefused(version.id, decision.reasons)
        return decision.report

    def _relevant(
        self, connection: sa.Connection, version_digest: str, policy: GatePolicy, champion_digest: str | None
    ) -> Report | None:
        """The newest report about these weights on the policy's data, made against the present champion if one was."""
        table = schema.reports
        rows = connection.execute(
            sa.select(table.c.digest, table.c.champion_digest)
            .where(
                table.c.tenant == self._tenant,
                table.c.adapter_digest == version_digest,
                table.c.data_digest == policy.data_digest,
            )
            .order_by(table.c.id.desc())
        ).all()
        against = [row.digest for row in rows if champion_digest is None or row.champion_digest == champion_digest]
        # A report against another champion does not pass, but it lets the gate say why.
        newest = next(iter(against), rows[0].digest if rows else None)
        return None if newest is None else self.load(newest)
