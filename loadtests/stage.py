"""Where a scenario is played: a server with random adapters in it, found at a URL or started for the purpose."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import httpx
from prometheus_client.parser import text_string_to_metric_families

from adapters.errors import LoraplaneError
from adapters.http_door import HttpDoor
from adapters.records import AdapterVersion, BaseRecord
from adapters.registry_door import API_KEY_VARIABLE
from adapters.screen import note
from loadtests.bench_home import (
    WHO,
    Base,
    Furnished,
    Kind,
    add_adapters,
    furnish,
    pick_base,
    publish_random,
    write_adapter,
)
from loadtests.bench_shell import BenchFailed, aside
from loadtests.processes import ServerProcess, is_ready
from loadtests.shapes import Scenario

_TIMEOUT_S = 30.0
_SPARE = 16  # positions beside prompt and answer
_ROUND = 64


@dataclass(frozen=True, slots=True)
class Stage:
    """A server that is ready. versions: the adapters to ask for. merged_url: of a server whose base has the first
    adapter in its weights, or None; it and the server itself run in turns (`alone`).
    """

    url: str
    base: BaseRecord
    door: HttpDoor
    versions: tuple[AdapterVersion, ...]
    slots: int
    positions: int
    servers: Mapping[str, ServerProcess]
    merged_url: str | None = None
    merged_base: BaseRecord | None = None

    def alone(self, url: str) -> None:
        """Let no server of ours but this one compute."""
        for at, server in self.servers.items():
            if at != url:
                server.child.pause()
        if url in self.servers:
            self.servers[url].resume()


def metrics(url: str) -> dict[tuple[str, ...], float]:
    """What GET /metrics says: (name, label values ...) -> value. Raises BenchFailed when it says nothing."""
    try:
        answer = httpx.get(f"{url}/metrics", timeout=_TIMEOUT_S, trust_env=False, headers=_key())
        answer.raise_for_status()
    except httpx.HTTPError as error:
        raise BenchFailed(f"{url}/metrics does not answer: {error}") from error
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def value(found: Mapping[tuple[str, ...], float], name: str, *labels: str) -> float:
    """The sum of a metric over everything that has these label values. Raises BenchFailed when there is none."""
    known = [v for key, v in found.items() if key[0] == name and set(labels) <= set(key[1:])]
    if not known:
        raise BenchFailed(f"the server's metrics have no {' '.join((name, *labels))}; is its engine ready?")
    return sum(known)


def engine_limit(url: str, name: str) -> int:
    """One of the engine's limits. Raises BenchFailed when the server does not tell it."""
    return int(value(metrics(url), "engine_limit", name))


@contextlib.contextmanager
def stage(scenario: Scenario, options: argparse.Namespace) -> Iterator[Stage]:
    """The server at options.url with the scenario's adapters published in it, or one started for it."""
    if options.url is not None:
        with contextlib.closing(HttpDoor(options.url, os.environ.get(API_KEY_VARIABLE), who=WHO)) as door:
            yield _running(scenario, options.url.rstrip("/"), door)
        return
    with (
        tempfile.TemporaryDirectory(prefix="loraplane-scenario-") as folder,
        _started(scenario, options, Path(folder)) as found,
    ):
        yield found


def _running(scenario: Scenario, url: str, door: HttpDoor) -> Stage:
    if not is_ready(url):
        raise BenchFailed(f"no server is ready at {url}")
    base = served_base(url, door)
    slots, positions = engine_limit(url, "slots"), engine_limit(url, "model_len")
    fitted = scenario.fitted(slots, positions)
    note(f"publishing {fitted.most_adapters} random adapters at {url}")
    names = adapter_names(scenario, fitted.most_adapters)
    versions = publish_random(door, base, names, scenario.kind)
    _promote(scenario, door, versions)
    return Stage(url, base, door, versions, slots, positions, servers={})


@contextlib.contextmanager
def _started(scenario: Scenario, options: argparse.Namespace, folder: Path) -> Iterator[Stage]:
    base = aside(partial(pick_base, options, folder))
    home = aside(partial(furnish, base, folder, 0))
    count = scenario.most_adapters
    prefix = adapter_names(scenario, 1)[0].rpartition("-")[0]
    versions = aside(partial(add_adapters, home, prefix, count, scenario.kind)) if count else ()
    positions = min(home.base.max_positions, -(-(scenario.prompt[1] + scenario.answer[1] + _SPARE) // _ROUND) * _ROUND)
    sizes = ["--slots", str(scenario.slots), "--max-rows", str(scenario.rows), "--max-model-len", str(positions)]
    # In float32 no company changes what an adapter says, with our kernels or without: texts can be compared.
    exact = ["--dtype", "float32"] if scenario.prompts else []
    threads = [] if options.threads is None else ["--threads", str(options.threads)]
    servers: dict[str, ServerProcess] = {}
    with contextlib.ExitStack() as stack:

        def serve(at: Furnished, name: str) -> str:
            note(f"starting a server ({name})")
            server = ServerProcess(at.home, folder / f"{name}.log", "--base", at.base.name, *sizes, *exact, *threads)
            stack.callback(server.stop)
            url = server.ready()
            servers[url] = server
            return url

        merged: Furnished | None = None
        merged_url: str | None = None
        if any(arm.merged for arm in scenario.arms):
            merged = aside(partial(_merged_home, home, scenario.kind, folder / "merged"))
            merged_url = serve(merged, "merged")
            servers[merged_url].child.pause()
        url = serve(home, "served")
        door = stack.enter_context(contextlib.closing(HttpDoor(url, who=WHO)))
        _promote(scenario, door, versions)
        yield Stage(
            url, home.base, door, versions, scenario.slots, positions, servers, merged_url,
            None if merged is None else merged.base,
        )  # fmt: skip


def adapter_names(scenario: Scenario, count: int) -> list[str]:
    """What a scenario's adapters are called; equal kinds share them."""
    return [f"load-{scenario.id.lower()}-{number:04}" for number in range(1, count + 1)]


def _promote(scenario: Scenario, door: HttpDoor, versions: tuple[AdapterVersion, ...]) -> None:
    if scenario.flip_every_s:
        for version in versions:
            door.promote(version.name, version.number, reason="load test: where it begins", force=True)


def served_base(url: str, door: HttpDoor) -> BaseRecord:
    """The base that a server serves. Raises BenchFailed when it does not say which."""
    try:
        models = httpx.get(f"{url}/v1/models", timeout=_TIMEOUT_S, trust_env=False, headers=_key()).json()
        digest = models["data"][0]["base_digest"]
        return next(b for b in door.bases() if b.digest == digest)
    except (httpx.HTTPError, LoraplaneError, ValueError, KeyError, StopIteration) as error:
        raise BenchFailed(f"{url} does not say which base it serves; check the URL and {API_KEY_VARIABLE}") from error


def _key() -> dict[str, str]:
    key = os.environ.get(API_KEY_VARIABLE)
    return {"Authorization": f"Bearer {key}"} if key else {}


def _merged_home(home: Furnished, kind: Kind, root: Path) -> Furnished:
    """A home whose base has the first random adapter of this kind in its weights."""
    try:
        from peft import PeftModel
    except ImportError:
        raise BenchFailed("W8 merges an adapter with PEFT: pip install 'loraplane[train]'") from None
    from transformers import AutoModelForCausalLM, AutoTokenizer

    note("merging an adapter into the base")
    folder = write_adapter(home.base.modules, root / "adapter", 1, base_name=home.base.name, kind=kind)
    model = AutoModelForCausalLM.from_pretrained(home.folder, dtype="auto")
    PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(root / "base")
    AutoTokenizer.from_pretrained(home.folder).save_pretrained(root / "base")
    return furnish(Base("merged", root / "base"), root, 0)
