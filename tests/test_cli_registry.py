"""The registry's commands, each in a home of its own and through a running server: the same answers either way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from adapter_factory import DATA, base_record, lora_weights, report, write_adapter
from http_case import make_case, served
from structlog.testing import capture_logs

from adapters.cli import run
from adapters.home import Home, ServerNote
from adapters.http_door import HttpDoor
from adapters.registry import Registry
from adapters.registry_door import LocalDoor, RegistryDoor, open_door, whoami
from adapters.wire import page_items, version_from_json


@dataclass
class Line:
    """A command line on one registry."""

    options: list[str]
    folder: Path
    capture: pytest.CaptureFixture[str]

    def __call__(self, *argv: str) -> tuple[int, str, str]:
        """Run a command; returns exit code, stdout, stderr."""
        self.capture.readouterr()
        status = run([*argv, *self.options])
        output = self.capture.readouterr()
        return status, output.out, output.err

    def json(self, *argv: str) -> Any:
        """Run a command with --json that must succeed; returns what it printed."""
        status, out, err = self(*argv, "--json")
        assert (status, err) == (0, "")
        return json.loads(out)

    def publish(self, name: str = "summarize", seed: int = 0) -> Any:
        folder = write_adapter(self.folder / f"peft-{name}-{seed}", seed)
        return self.json("adapters", "publish", name, str(folder))

    def door(self) -> RegistryDoor:
        """The registry that the commands work on."""
        return open_door(Home.find(self.options[1]), self.options[3] if "--url" in self.options else None)


@pytest.fixture(params=["home", "server"])
def line(
    request: pytest.FixtureRequest, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Line]:
    monkeypatch.setenv("LORAPLANE_USER", "ann")
    folder = tmp_path / "home"
    if request.param == "home":
        registry = Registry.open(Home.find(folder))
        registry.add_base(base_record())
        registry.close()
        yield Line(["--home", str(folder)], tmp_path, capsys)
        return
    case = make_case(folder)
    # The server shares our stdout here, and its log would mix with the commands' answers.
    with served(case) as url, capture_logs():
        yield Line(["--home", str(tmp_path / "other"), "--url", url], tmp_path, capsys)
    case.registry.close()


def test_published_folder_is_listed_and_shown(line: Line) -> None:
    version = line.publish()
    assert (version["id"], version["bound_by"], version["rank"]) == ("summarize@1", "name", 4)
    (listed,) = page_items(line.json("adapters", "list"))
    shown = line.json("adapters", "show", "summarize")
    assert listed == shown
    assert shown["versions"] == [version]
    assert shown["champion"] is None


def test_note_of_several_lines_is_one_row_and_whole_in_json(line: Line) -> None:
    folder = write_adapter(line.folder / "peft")
    told = "first\nsummarize@2  champion"
    assert line("adapters", "publish", "summarize", str(folder), "--note", told)[0] == 0
    _, out, _ = line("adapters", "show", "summarize")
    assert len(out.splitlines()) == 2
    assert line.json("adapters", "show", "summarize@1")["note"] == told


def test_text_output_names_version_and_next_step(line: Line) -> None:
    folder = write_adapter(line.folder / "peft")
    status, out, _ = line("adapters", "publish", "summarize", str(folder), "--note", "first")
    assert status == 0
    assert "summarize@1 is published: rank 4" in out
    assert "loraplane promote summarize@1" in out
    status, out, _ = line("adapters", "show", "summarize")
    heading, row = out.splitlines()
    assert heading.split()[:3] == ["VERSION", "ALIASES", "RANK"]
    assert row.startswith("summarize@1  -")
    assert row.endswith("first")
    assert row.split()[7][-6] in "+-"  # the time is said with its zone


def test_same_bytes_published_twice_are_one_version(line: Line) -> None:
    assert line.publish() == line.publish()


def test_bases_are_listed(line: Line) -> None:
    (base,) = page_items(line.json("models", "list"))
    assert base["name"] == "tiny"


def test_promotion_waits_for_the_gate_and_force_is_recorded(line: Line) -> None:
    line.publish()
    status, out, err = line("promote", "summarize@1")
    assert (status, out) == (6, "")
    assert err.startswith("error[gate_refused]: ")
    assert line("promote", "summarize@1", "--force")[0] == 2
    move = line.json("promote", "summarize@1", "--force", "--reason", "first of its kind")
    assert (move["action"], move["to_number"], move["from_number"]) == ("forced", 1, None)
    (kept,) = page_items(line.json("history", "summarize"))
    assert kept == move
    assert kept["why"] == "first of its kind"


def test_passing_report_opens_the_gate(line: Line) -> None:
    version = version_from_json(line.publish())
    policy = line.json("adapters", "policy", "summarize", "--data", DATA, "--min-n", "50", "--margin", "0.01")
    assert (policy["data_digest"], policy["min_n"], policy["margin"]) == (DATA, 50, 0.01)
    assert line.json("adapters", "policy", "summarize") == policy
    with_door = open_door(Home.find(line.options[1]), line.options[3] if len(line.options) > 2 else None)
    digest = with_door.add_report(report(version))
    assert with_door.report(digest).examples
    assert [r.adapter_digest for r in with_door.reports("summarize", 1)] == [version.digest]
    with_door.close()
    move = line.json("promote", "summarize@1")
    assert (move["report"], move["why"]) == (digest, "promoted through the gate")


def test_policy_changes_one_rule_and_keeps_the_others(line: Line) -> None:
    line.publish()
    assert line("adapters", "policy", "summarize")[0] == 4
    assert line("adapters", "policy", "summarize", "--min-n", "9")[0] == 2
    line("adapters", "policy", "summarize", "--data", DATA, "--min-n", "50")
    changed = line.json("adapters", "policy", "summarize", "--metric", "rougeL", "--length-ratio", "0.5", "2")
    assert (changed["metric"], changed["min_n"], changed["length_ratio"]) == ("rougeL", 50, [0.5, 2.0])
    assert line("adapters", "policy", "summarize", "--metric", "bleu")[0] == 2


def test_a_move_without_a_reason_says_in_the_history_what_it_was(line: Line) -> None:
    line.publish(seed=1)
    line.publish(seed=2)
    for number in (1, 2):
        line.json("promote", f"summarize@{number}", "--force", "--reason", "test")
    assert line.json("rollback", "summarize")["why"] == "rolled back"
    assert line.json("rollback", "summarize", "--to", "2", "--reason", "no, keep it")["why"] == "no, keep it"


def test_rollback_goes_one_champion_back_or_to_a_named_one(line: Line) -> None:
    for seed in range(3):
        number = line.publish(seed=seed)["number"]
        line.json("promote", f"summarize@{number}", "--force", "--reason", "test")
    assert line.json("rollback", "summarize", "--reason", "worse")["to_number"] == 2
    assert line.json("rollback", "summarize", "--reason", "still", "--to", "1")["to_number"] == 1
    status, out, _ = line("history", "summarize")
    assert status == 0
    assert [row.split()[4] for row in out.splitlines()[1:3]] == ["rollback", "rollback"]


def test_a_stored_report_is_shown_by_version_by_digest_and_by_what_history_says(line: Line, tmp_path: Path) -> None:
    """No command read a report: the digest that eval run and history print led nowhere."""
    version = version_from_json(line.publish())
    line("adapters", "policy", "summarize", "--data", DATA, "--min-n", "50")
    with closing(line.door()) as door:
        old, new = door.add_report(report(version, low=-0.1)), door.add_report(report(version))
    line("promote", "summarize@1")
    told = line.json("history", "summarize")["data"][0]["report"][:12]
    assert line("history", "summarize")[1].count(told) == 1
    for which, digest in (("summarize@1", new), (new, new), (told, new), (old[:8], old)):
        shown = line.json("eval", "show", which)
        assert (shown["report"]["id"], len(shown["report"]["examples"])) == (digest, 64)
        assert shown["decision"]["verdict"] == ("pass" if digest == new else "fail")
    page = tmp_path / "page.md"
    status, out, _ = line("eval", "show", told, "--markdown", str(page))
    assert status == 0
    assert "64 different prompts of docstrings" in out
    assert f"report {new}" in out
    assert "# summarize@1: pass" in page.read_text()


@pytest.mark.parametrize(
    ("which", "code", "words"),
    [
        ("summarize@1", 4, "no report about summarize@1 is stored; make one: loraplane eval run summarize@1"),
        ("summarize@7", 4, "there is no summarize@7"),
        ("0123456789ab", 4, "no report '0123456789ab' is stored"),
        ("summarize", 2, "give a version as name@1"),
        ("ab", 2, "8 to 64 hex digits"),
    ],
)
def test_a_report_that_is_not_there_is_told(line: Line, which: str, code: int, words: str) -> None:
    line.publish()
    status, _, err = line("eval", "show", which)
    assert (status, words in err) == (code, True), err


def test_a_move_to_where_the_champion_is_says_that_nothing_changed(line: Line) -> None:
    """The move that once brought it there was shown as if it were new."""
    for seed in range(2):
        number = line.publish(seed=seed)["number"]
        line.json("promote", f"summarize@{number}", "--force", "--reason", "test")
    moves = line.json("history", "summarize")
    for words in (("promote", "summarize@2"), ("rollback", "summarize", "--to", "2")):
        status, out, _ = line(*words)
        assert status == 0
        assert "summarize@champion is summarize@2 already, nothing changed" in out
    assert line.json("history", "summarize") == moves
    assert "is summarize@1 now, was summarize@2" in line("rollback", "summarize")[1]


def test_promotion_that_expects_another_champion_moves_nothing(line: Line) -> None:
    line.publish()
    line.publish(seed=1)
    line.json("promote", "summarize@1", "--force", "--reason", "first", "--expect", "none")
    status, _, err = line("promote", "summarize@2", "--force", "--reason", "x", "--expect", "none")
    assert status == 5
    assert err.startswith("error[generation_mismatch]: ")
    assert line.json("adapters", "show", "summarize")["champion"] == 1
    assert line("promote", "summarize@2", "--force", "--reason", "x", "--expect", "newest")[0] == 2


def test_alias_of_ones_own_points_where_it_is_told(line: Line) -> None:
    line.publish()
    line.publish(seed=1)
    assert line.json("adapters", "alias", "summarize@2", "canary", "--expect", "none")["number"] == 2
    assert line("adapters", "alias", "summarize@1", "canary", "--expect", "1")[0] == 5
    assert line("adapters", "alias", "summarize@1", "champion")[0] == 5
    _, out, _ = line("adapters", "show", "summarize")
    assert [row.split()[1] for row in out.splitlines()[1:]] == ["canary", "-"]


def test_pulled_folder_publishes_as_the_same_weights(line: Line) -> None:
    version = line.publish()
    answer = line.json("adapters", "pull", "summarize@1", "--into", str(line.folder / "out"))
    assert sorted(p.name for p in Path(answer["folder"]).iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "prompt_format.json",
    ]
    assert line.json("adapters", "publish", "summarize", answer["folder"])["digest"] == version["digest"]


def test_pull_original_gives_back_the_bytes_that_came(line: Line) -> None:
    line.publish()
    assert line("adapters", "pull", "summarize@1", "--original", "--into", str(line.folder / "out"))[0] == 0
    assert (line.folder / "out" / "adapter_model.safetensors").read_bytes() == lora_weights(0)
    assert not list((line.folder / "out").glob(".*"))


def test_pull_does_not_write_over_files(line: Line) -> None:
    line.publish()
    (line.folder / "out").mkdir()
    (line.folder / "out" / "mine.txt").write_text("mine")
    status, _, err = line("adapters", "pull", "summarize@1", "--into", str(line.folder / "out"))
    assert status == 2
    assert "not an empty folder" in err


@pytest.mark.parametrize("into", ["/proc/nothing", "/dev/null/x"])
def test_pull_into_a_folder_that_takes_no_files_is_one_line(line: Line, into: str) -> None:
    line.publish()
    status, _, err = line("adapters", "pull", "summarize@1", "--into", into)
    assert status == 2
    assert err.startswith(f"error[invalid_value]: no files can be written to {into}: ")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("name", "data", "code"),
    [
        ("adapter_model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "lfs_pointer"),
        (
            "adapter_config.json",
            b'{"peft_type": "LORA", "lora_bias": true, "r": 4, "lora_alpha": 8}',
            "unsupported_feature",
        ),
        ("prompt_format.json", b'{"style": "jinja"}', "prompt_format"),
    ],
)
def test_bad_folder_is_refused_with_its_reason_code(line: Line, name: str, data: bytes, code: str) -> None:
    folder = write_adapter(line.folder / "peft")
    (folder / name).write_bytes(data)
    status, out, err = line("adapters", "publish", "summarize", str(folder))
    assert (status, out) == (3, "")
    assert err.startswith(f"error[{code}]: ")
    assert line("adapters", "show", "summarize")[0] == 4


def test_folder_without_weights_is_refused(line: Line) -> None:
    folder = write_adapter(line.folder / "peft")
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    status, _, err = line("adapters", "publish", "summarize", str(folder))
    assert status == 3
    assert err.startswith("error[not_safetensors]: ")
    assert line("adapters", "publish", "summarize", str(line.folder / "nowhere"))[0] == 3


@pytest.mark.parametrize("argv", [("adapters", "show", "sumarize"), ("promote", "sumarize@1"), ("history", "sumarize")])
def test_misspelt_adapter_is_not_found_and_the_right_name_is_said(line: Line, argv: tuple[str, ...]) -> None:
    line.publish()
    status, _, err = line(*argv)
    assert status == 4
    assert "summarize" in err


@pytest.mark.parametrize("model", ["summarize", "summarize@champion", "Summarize@1", "summarize@0"])
def test_command_on_a_version_wants_its_number(line: Line, model: str) -> None:
    assert line("promote", model)[0] == 2


@pytest.mark.parametrize("argv", [("history",), ("rollback", "--reason", "r"), ("adapters", "policy")])
def test_command_on_an_adapter_says_the_name_to_give_in_place_of_a_version(line: Line, argv: tuple[str, ...]) -> None:
    """They said `publish under a bare name` to somebody who published nothing."""
    for model in ("summarize@1", "summarize@champion"):
        status, _, err = line(*argv, model)
        assert status == 2
        assert f"give summarize for {model}" in err
        assert "publish" not in err
    status, _, err = line(*argv, "base")
    assert (status, "base is the base, not an adapter" in err) == (2, True)


def test_one_version_is_shown_by_its_number_or_by_an_alias(line: Line) -> None:
    first, second = line.publish(), line.publish(seed=1)
    line.json("adapters", "alias", "summarize@1", "canary")
    assert line.json("adapters", "show", "summarize@2") == second
    assert line.json("adapters", "show", "summarize@canary") == first
    _, out, _ = line("adapters", "show", "summarize@canary")
    assert [row.split()[:2] for row in out.splitlines()[1:]] == [["summarize@1", "canary"]]
    status, _, err = line("adapters", "show", "summarize@3")
    assert (status, "summarize@2" in err) == (4, True)


def test_command_goes_through_the_server_that_holds_the_home(tmp_path: Path) -> None:
    home = Home.find(tmp_path)
    lock = home.hold(ServerNote("http://127.0.0.1:8123", 1))
    try:
        door = open_door(home)
        assert isinstance(door, HttpDoor)
        assert door.where == "http://127.0.0.1:8123"
    finally:
        lock.release()
    door.close()
    local = open_door(home)
    assert isinstance(local, LocalDoor)
    local.close()


def test_history_names_who_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAPLANE_USER", "bob")
    assert whoami() == "bob"
    monkeypatch.delenv("LORAPLANE_USER")
    monkeypatch.setenv("LOGNAME", "carol")
    assert whoami() == "carol"


def test_server_that_is_not_there_is_one_line_and_exit_8(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["adapters", "list", "--home", str(tmp_path), "--url", "http://127.0.0.1:9"]) == 8
    err = capsys.readouterr().err
    assert err.startswith("error[server_unreachable]: http://127.0.0.1:9 does not answer")
    assert err.count("\n") == 1
