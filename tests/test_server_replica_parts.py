"""What stands around the router: options that are refused, the directory of replicas, and their metrics."""

from __future__ import annotations

import socket
from dataclasses import asdict
from pathlib import Path

import msgspec
import pytest
import structlog
import typer
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from typer.testing import CliRunner

from adapters.errors import ConfigInvalid
from serving.cli import serve
from serving.rayenv import check_address
from serving.replica import ReplicaView
from serving.replica_metrics import ReplicaCollector
from serving.scaling import Scaling
from tests.heartbeats import beat

SERVE = typer.Typer()
SERVE.command()(serve)


def with_free_port() -> str:
    """An address where nobody listens: it was free a moment ago."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--replicas", "3", "--max-replicas", "2"], "--max-replicas"),
        (["--min-replicas", "2", "--replicas", "1"], "--min-replicas"),
        (["--replicas", "65"], "at most 64"),
        (["--replicas", "2", "--device", "cuda:1"], "--device cuda"),
        (["--ray", "auto"], "HOST:PORT"),
        (["--ray", "ray://10.0.0.1:10001"], "HOST:PORT"),
        (["--ray", "10.0.0.1:0"], "HOST:PORT"),
        (["--ray", "10.0.0.1:65536"], "HOST:PORT"),
        (["--ray", "x" * 500], "HOST:PORT"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_starts(wrong: list[str], told: str, tmp_path: Path) -> None:
    ended = CliRunner().invoke(SERVE, ["--home", str(tmp_path / "home"), "--port", "0", *wrong])
    structlog.reset_defaults()  # `serve` logs to the runner's stderr, which is closed by now
    assert isinstance(ended.exception, ConfigInvalid)
    assert told in str(ended.exception)
    assert len(str(ended.exception)) < 300
    assert not (tmp_path / "home").exists()


def test_a_cluster_that_does_not_answer_is_said_so_at_once() -> None:
    """Ray itself asks for minutes, and says nothing meanwhile."""
    with pytest.raises(ConfigInvalid, match="no Ray cluster answers"):
        check_address(with_free_port())


def fake_store(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """Ray's key-value store, as far as the directory uses it."""
    kept: dict[str, bytes] = {}

    def keys(prefix: str, namespace: str) -> list[bytes]:
        return [key.encode() for key in kept if key.startswith(prefix)]

    monkeypatch.setattr("serving.deployment._internal_kv_list", keys)
    monkeypatch.setattr("serving.deployment._internal_kv_get", lambda key, namespace: kept.get(key))
    monkeypatch.setattr("serving.deployment._internal_kv_del", lambda key, namespace: kept.pop(key, None))
    return kept


def test_the_directory_names_who_is_heard_of_and_strikes_off_who_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that was killed cannot sign off; one of another session is not ours."""
    from serving.deployment import Entry, ReplicaDirectory

    kept, clock = fake_store(monkeypatch), [0.0]
    directory = ReplicaDirectory("mine", "token", lambda: clock[0])

    def write(name: str, count: int, session: str = "mine") -> None:
        kept[f"{session}/{name}"] = msgspec.json.encode(Entry(f"/sockets/{name}", "", 0, count))

    write("one", 1)
    write("two", 1)
    write("stranger", 1, session="other")
    assert sorted(address.replica for address in directory.read()) == ["one", "two"]
    assert {(a.path, a.token) for a in directory.read()} == {("/sockets/one", "token"), ("/sockets/two", "token")}
    for second in range(1, 8):
        clock[0] = 5.0 * second
        write("one", 1 + second)
        named = [address.replica for address in directory.read()]
        assert named == (["one", "two"] if second <= 6 else ["one"])
    assert sorted(kept) == ["mine/one", "other/stranger"]
    write("two", 9)  # it was only slow
    assert sorted(address.replica for address in directory.read()) == ["one", "two"]


def test_a_store_that_does_not_answer_is_a_connection_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from serving.deployment import ReplicaDirectory

    def broken(prefix: str, namespace: str) -> list[bytes]:
        raise RuntimeError("no store")

    monkeypatch.setattr("serving.deployment._internal_kv_list", broken)
    with pytest.raises(ConnectionError):
        ReplicaDirectory("mine", "token").read()


def test_autoscaling_asks_what_the_engines_reported() -> None:
    from ray.serve.config import AutoscalingContext

    from serving.deployment import LoadPolicy

    policy = LoadPolicy(**asdict(Scaling(1, 1, 4)))

    def context(loads: dict[str, float] | None) -> AutoscalingContext:
        told = None if loads is None else {"sequences_a_row": loads}
        rest = dict.fromkeys(("deployment_id", "deployment_name", "app_name", "raw_metrics", "policy_state", "config"))
        times = dict.fromkeys(("last_scale_up_time", "last_scale_down_time", "current_time"))
        return AutoscalingContext(
            current_num_replicas=2,
            target_num_replicas=2,
            running_replicas=[],
            total_num_requests=0,
            total_queued_requests=0,
            aggregated_metrics=told,
            capacity_adjusted_min_replicas=1,
            capacity_adjusted_max_replicas=4,
            **rest,
            **times,
        )

    assert policy(context(None)) == (2, {})
    assert policy(context({"a": 0.1, "b": 0.2})) == (1, {})
    assert policy(context({"a": 0.9, "b": 0.9})) == (3, {})
    assert policy(context({"a": 9.0, "b": 9.0})) == (4, {})


def test_metrics_name_each_replica_once_and_one_that_is_starting_too() -> None:
    views = [
        ReplicaView("one", True, False, beat(running=3, tokens=7), 0.2, 0.5, 11),
        ReplicaView("two", True, True, beat(), 0.3, 0.0, 2),
        ReplicaView("new", False, False, None, float("inf"), 0.0, 0),
    ]
    registry = CollectorRegistry()
    registry.register(ReplicaCollector(lambda: views))
    families = {f.name: f for f in text_string_to_metric_families(generate_latest(registry).decode())}
    samples = {(s.name, s.labels.get("replica")): s.value for f in families.values() for s in f.samples}
    assert len(samples) == sum(len(f.samples) for f in families.values())
    assert samples["engine_replicas", None] == 1
    assert samples["engine_replica_running", "one"] == 3
    assert samples["engine_replica_tokens_total", "one"] == 7
    assert samples["engine_replica_sequences_total", "two"] == 2
    assert [samples["engine_replica_connected", name] for name in ("one", "two", "new")] == [1, 1, 0]
    assert ("engine_replica_rows", "new") not in samples
