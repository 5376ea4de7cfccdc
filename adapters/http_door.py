"""The registry behind a running server, over HTTP. Its refusals come back as the typed errors they were."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx

from adapters.canaries import Arm, CanaryLimits, CanaryReport, Split, Sticky
from adapters.errors import DigestMismatch, RecordNotFound, ServerUnreachable
from adapters.golden import golden_file
from adapters.http_errors import error_from_response
from adapters.prompts import prompt_format_to_json
from adapters.publish import CONFIG_FILE, FORMAT_FILE, WEIGHTS_FILE, Manifest, manifest_of
from adapters.records import (
    AdapterSummary,
    AdapterVersion,
    AliasRecord,
    BaseRecord,
    Fallback,
    InFlight,
    Move,
    PromptFormat,
    Residency,
    Standing,
    Withdrawal,
)
from adapters.registry_door import Expected, adapter_files
from adapters.reports import GatePolicy, Report
from adapters.strict_json import canonical
from adapters.wire import (
    alias_from_json,
    base_from_json,
    canary_report_from_json,
    move_from_json,
    page_items,
    plain,
    policy_from_json,
    policy_to_json,
    report_from_wire,
    residency_from_json,
    split_from_json,
    standing_from_json,
    summary_from_json,
    version_from_json,
    withdrawal_from_json,
)

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 300.0  # publishing checks every tensor; a large adapter on a busy machine takes a while
_CHUNK_BYTES = 1 << 20
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


class HttpDoor:
    """A registry at `url`, such as http://127.0.0.1:8000. `key` is sent as a bearer token, `who` as the user's name.

    Raises ServerUnreachable when nobody answers there; otherwise what the server raised.
    """

    def __init__(
        self, url: str, key: str | None = None, transport: httpx.BaseTransport | None = None, who: str = ""
    ) -> None:
        self._url = url.rstrip("/").removesuffix("/v1")
        self._client = httpx.Client(
            base_url=self._url,
            headers={
                **({"Authorization": f"Bearer {key}"} if key else {}),
                **({"X-Loraplane-User": who} if who.isascii() and who.isprintable() else {}),
            },
            timeout=httpx.Timeout(ANSWER_TIMEOUT_S, connect=CONNECT_TIMEOUT_S),
            transport=transport,
            # A proxy of the environment must not come between us and our own machine.
            trust_env=urlsplit(self._url).hostname not in _LOOPBACK,
        )

    @property
    def where(self) -> str:
        return self._url

    def bases(self) -> Sequence[BaseRecord]:
        return [base_from_json(item) for item in page_items(self._get("/v1/bases"))]

    def publish(
        self,
        name: str,
        folder: Path,
        *,
        base: str | None = None,
        prompt_format: PromptFormat | None = None,
        facts: Mapping[str, object] | None = None,
        note: str = "",
    ) -> AdapterVersion:
        files = {file: self._upload(path) for file, path in adapter_files(folder).items()}
        body = {
            "files": files,
            "base": base,
            "prompt_format": prompt_format_to_json(prompt_format) if prompt_format else None,
            "facts": dict(facts or {}),
            "note": note,
        }
        return version_from_json(self._send("POST", f"/v1/adapters/{name}/versions", body))

    def adapters(self) -> Sequence[AdapterSummary]:
        return [summary_from_json(item) for item in page_items(self._get("/v1/adapters"))]

    def adapter(self, name: str) -> AdapterSummary:
        return summary_from_json(self._get(f"/v1/adapters/{name}"))

    def set_alias(
        self, name: str, alias: str, number: int, *, reason: str = "", expected: Expected = "any"
    ) -> AliasRecord:
        body = {"version": number, "reason": reason, **_expected(expected)}
        return alias_from_json(self._send("PUT", f"/v1/adapters/{name}/aliases/{alias}", body))

    def promote(
        self,
        name: str,
        number: int,
        *,
        reason: str = "",
        force: bool = False,
        expected: Expected = "any",
        warm: bool = True,
    ) -> Move:
        body = {"version": number, "reason": reason, "force": force, "warm": warm, **_expected(expected)}
        return move_from_json(self._send("POST", f"/v1/adapters/{name}/promote", body))

    def rollback(self, name: str, *, reason: str, to: int | None = None) -> Move:
        body: dict[str, object] = {"reason": reason} if to is None else {"reason": reason, "to": to}
        return move_from_json(self._send("POST", f"/v1/adapters/{name}/rollback", body))

    def history(self, name: str) -> Sequence[Move]:
        return [move_from_json(item) for item in page_items(self._get(f"/v1/adapters/{name}/history"))]

    def set_fallback(self, name: str, alias: str, fallback: Fallback, *, reason: str = "") -> AliasRecord:
        body = {"policy": fallback.value, "reason": reason}
        return alias_from_json(self._send("PUT", f"/v1/adapters/{name}/aliases/{alias}/fallback", body))

    def set_canary(
        self,
        name: str,
        number: int,
        percent: float,
        *,
        alias: str,
        sticky: Sticky,
        limits: CanaryLimits,
        reason: str = "",
        expected: Expected = "any",
    ) -> Split:
        body = {"version": number, "percent": percent, "alias": alias, "reason": reason, **_expected(expected)}
        body |= {"sticky": sticky.value, "limits": plain(limits)}
        return split_from_json(self._send("PUT", f"/v1/adapters/{name}/canary", body))

    def set_shadow(
        self, name: str, number: int, percent: float, *, alias: str, reason: str = "", expected: Expected = "any"
    ) -> Split:
        body = {"version": number, "percent": percent, "alias": alias, "reason": reason, **_expected(expected)}
        return split_from_json(self._send("PUT", f"/v1/adapters/{name}/shadow", body))

    def stop_trial(self, name: str, kind: Arm, *, alias: str, reason: str = "") -> Move:
        body = {"alias": alias, "reason": reason}
        return move_from_json(self._send("POST", f"/v1/adapters/{name}/{kind.value}/stop", body))

    def trials(self, name: str, alias: str) -> CanaryReport:
        return canary_report_from_json(self._get(f"/v1/adapters/{name}/canary", {"alias": alias}))

    def compare(self, body: Mapping[str, object]) -> Mapping[str, Any]:
        return dict(self._send("POST", "/v1/compare", body))

    def retire(self, name: str, number: int, *, reason: str = "", deadline_s: float | None = None) -> Withdrawal:
        body = {"reason": reason, "deadline_s": deadline_s}
        return withdrawal_from_json(self._send("POST", _version(name, number, "retire"), body))

    def revoke(self, name: str, number: int, *, reason: str, in_flight: InFlight) -> Withdrawal:
        body = {"reason": reason, "in_flight": in_flight.value}
        return withdrawal_from_json(self._send("POST", _version(name, number, "revoke"), body))

    def restore(self, name: str, number: int, *, reason: str) -> Standing:
        return standing_from_json(self._send("POST", _version(name, number, "restore"), {"reason": reason}))

    def warm(self, name: str, number: int, ttl_s: float) -> Residency:
        return residency_from_json(self._send("POST", _version(name, number, "warm"), {"ttl_s": ttl_s}))

    def pin(self, name: str, number: int, on: bool) -> Residency:
        return residency_from_json(self._json(self._request("PUT" if on else "DELETE", _version(name, number, "pin"))))

    def pull(self, name: str, number: int, into: Path, *, original: bool = False) -> Path:
        version = next((v for v in self.adapter(name).versions if v.number == number), None)
        if version is None:
            raise RecordNotFound(f"{name} has no version {number}; loraplane adapters show {name} lists them")
        into.mkdir(parents=True, exist_ok=True)
        if original:
            for file, digest in version.originals.items():
                if Path(file).name != file:
                    raise ServerUnreachable(f"{self._url} names a file outside the folder: {file!r}")
                self._download(digest, into / file)
            return into
        manifest = self._manifest(version.digest)
        self._download(manifest.config, into / CONFIG_FILE)
        self._download(manifest.weights, into / WEIGHTS_FILE)
        (into / FORMAT_FILE).write_bytes(canonical(prompt_format_to_json(manifest.prompt_format)))
        for file, data in golden_file(manifest.golden).items():
            (into / file).write_bytes(data)
        return into

    def policy(self, name: str) -> GatePolicy | None:
        try:
            return policy_from_json(self._get(f"/v1/adapters/{name}/policy"))
        except RecordNotFound:
            return None

    def set_policy(self, name: str, policy: GatePolicy) -> GatePolicy:
        return policy_from_json(self._send("PUT", f"/v1/adapters/{name}/policy", policy_to_json(policy)))

    def add_report(self, report: Report) -> str:
        answer = self._send("POST", f"/v1/adapters/{report.adapter}/reports", report.to_json())
        return str(answer.get("id") or answer.get("digest") or report.digest)

    def reports(self, name: str, number: int | None = None) -> Sequence[Report]:
        found = [report_from_wire(row) for row in self._report_rows(name, number)]
        return [r for r in found if number is None or r.number == number]

    def newest_report(self, name: str, number: int) -> Report | None:
        rows = self._report_rows(name, number)
        # A row of the list holds no examples; its id is the digest of the whole.
        return self.report(str(rows[0]["id"])) if rows else None

    def _report_rows(self, name: str, number: int | None) -> list[Any]:
        return page_items(self._get(f"/v1/adapters/{name}/reports", {} if number is None else {"version": number}))

    def report(self, digest: str) -> Report:
        return report_from_wire(self._get(f"/v1/reports/{digest}"))

    def close(self) -> None:
        self._client.close()

    def _manifest(self, digest: str) -> Manifest:
        data = self._request("GET", f"/v1/blobs/sha256:{digest}").content
        if (actual := hashlib.sha256(data).hexdigest()) != digest:
            raise DigestMismatch(digest, actual)
        return manifest_of(data)

    def _upload(self, path: Path) -> str:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
            size = stream.tell()
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(size)}
        self._request("PUT", f"/v1/blobs/sha256:{digest}", content=_chunks(path), headers=headers)
        return digest

    def _download(self, digest: str, target: Path) -> None:
        """Stream a blob into a file; under its name only once its bytes are known to be right."""
        staged = target.with_name(f".{target.name}.part")
        hashed = hashlib.sha256()
        try:
            with self._client.stream("GET", f"/v1/blobs/sha256:{digest}") as answer, staged.open("wb") as out:
                if answer.is_error:
                    answer.read()
                    raise error_from_response(answer)
                for chunk in answer.iter_bytes(_CHUNK_BYTES):
                    hashed.update(chunk)
                    out.write(chunk)
            if hashed.hexdigest() != digest:
                raise DigestMismatch(digest, hashed.hexdigest())
            staged.replace(target)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        finally:
            staged.unlink(missing_ok=True)

    def _get(self, path: str, params: Mapping[str, Any] | None = None) -> Any:
        return self._json(self._request("GET", path, params=params))

    def _send(self, method: str, path: str, body: Mapping[str, object]) -> Any:
        return self._json(self._request(method, path, json=body))

    def _json(self, answer: httpx.Response) -> Any:
        try:
            return answer.json()
        except ValueError:
            raise ServerUnreachable(f"{self._url} does not answer as a Loraplane server; check the URL") from None

    def _request(self, method: str, path: str, **parts: Any) -> httpx.Response:
        try:
            answer = self._client.request(method, path, **parts)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise self._unreachable(error) from error
        if answer.is_error:
            raise error_from_response(answer)
        return answer

    def _unreachable(self, error: Exception) -> ServerUnreachable:
        why = str(error) or type(error).__name__
        return ServerUnreachable(f"{self._url} does not answer ({why}); start it (loraplane serve) or check --url")


def _version(name: str, number: int, what: str) -> str:
    return f"/v1/adapters/{name}/versions/{number}/{what}"


def _expected(expected: Expected) -> dict[str, object]:
    return {} if expected == "any" else {"expected_version": expected}


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        yield from iter(lambda: stream.read(_CHUNK_BYTES), b"")
