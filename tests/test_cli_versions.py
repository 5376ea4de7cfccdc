"""The commands on a version that is served, in a home alone and through a running server."""

from __future__ import annotations

import pytest

from adapters.wire import page_items
from tests.test_cli_registry import Line, line

__all__ = ["line"]  # the fixture: the same commands in a home of their own and through a server


@pytest.fixture
def two(line: Line) -> Line:
    """summarize@2 is champion, summarize@1 was."""
    for seed in (1, 2):
        line.publish(seed=seed)
        assert line("promote", f"summarize@{seed}", "--force", "--reason", "test")[0] == 0
    return line


def served(line: Line) -> bool:
    return "--url" in line.options


def test_retire_hides_a_version_and_restore_brings_it_back(two: Line) -> None:
    status, out, _ = two("retire", "summarize@1", "--reason", "old")
    assert status == 0
    assert "summarize@1 is retired" in out
    assert ("freed" in out) == served(two)
    _, shown, _ = two("adapters", "show", "summarize")
    assert [row.split()[-2] for row in shown.splitlines()] == ["STATE", "live", "retired"]
    status, _, err = two("promote", "summarize@1", "--force", "--reason", "again")
    assert (status, err.startswith("error[version_retired]")) == (4, True)
    assert two.json("restore", "summarize@1", "--reason", "needed")["state"] == "live"
    assert two("promote", "summarize@1", "--force", "--reason", "again")[0] == 0


def test_what_is_live_is_not_retired(two: Line) -> None:
    status, _, err = two("retire", "summarize@2")
    assert (status, err.startswith("error[conflict]")) == (5, True)


def test_revoke_says_what_follows_and_is_in_the_history(two: Line) -> None:
    assert two("revoke", "summarize@2")[0] == 2
    assert two("revoke", "summarize@2", "--reason", "x", "--in-flight", "kill")[0] == 2
    told = two.json("revoke", "summarize@2", "--reason", "leaked data", "--in-flight", "end")
    assert (told["standing"]["state"], told["standing"]["in_flight"]) == ("revoked", "end")
    assert (told["residency"] is not None) == served(two)
    (row, *_) = page_items(two.json("history", "summarize"))
    assert (row["action"], row["alias"], row["to_number"], row["why"]) == ("revoke_now", "", 2, "leaked data")
    _, text, _ = two("history", "summarize")
    assert "revoke_now" in text.splitlines()[1]
    assert two.json("rollback", "summarize")["to_number"] == 1


def test_fallback_is_said_of_an_alias_and_of_no_version(two: Line) -> None:
    assert two.json("fallback", "summarize", "previous")["fallback"] == "previous"
    status, out, _ = two("fallback", "summarize@champion", "503")
    assert (status, "requests get a 503" in out) == (0, True)
    assert two("fallback", "summarize@1", "previous")[0] == 2
    assert two("fallback", "summarize", "base")[0] == 2
    assert two("fallback", "summarize@nowhere", "previous")[0] == 4


def test_warm_and_pin_are_about_a_running_server(two: Line) -> None:
    if not served(two):
        for command in ("warm", "pin", "unpin"):
            status, _, err = two(command, "summarize@1")
            assert (status, "no server holds" in err) == (8, True)
        return
    assert two.json("warm", "summarize@1", "--ttl", "60")["tier"] == "device"
    status, out, _ = two("pin", "summarize@1")
    assert (status, "stays there until it is unpinned" in out) == (0, True)
    assert two("unpin", "summarize@1")[0] == 0
    assert two("warm", "summarize@1", "--ttl", "0")[0] == 2
    assert two("warm", "summarize")[0] == 2


def test_a_promotion_without_warming_is_for_those_who_ask(two: Line) -> None:
    move = two.json("promote", "summarize@1", "--force", "--reason", "now", "--no-warm")
    assert move["to_number"] == 1
