"""`loraplane doctor` finds what stops a newcomer and says what to do."""

from __future__ import annotations

import errno
import importlib.metadata
import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from base_factory import write_base

from adapters.bases import pull
from adapters.cli import run
from adapters.doctor import Health, disk_space, import_names, port_free, python_version, registry_opens, server_state
from adapters.errors import BaseMissing
from adapters.home import Home, ServerNote
from adapters.registry import Registry


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.find(tmp_path / "home")


@pytest.fixture
def read_only(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    """The home lies on a file system that takes no writes; modes would not stop root."""
    real = os.open

    def refuse(path: str | Path, flags: int, *rest: Any, **more: Any) -> int:
        if str(path).startswith(str(home.root)) and flags & (os.O_CREAT | os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refuse)


def _pull(home: Home, source: Path) -> Path:
    registry = Registry.open(home)
    try:
        return home.root / pull(str(source), home, registry, lambda _: None).folder
    finally:
        registry.close()


def test_old_python_fails() -> None:
    assert python_version((3, 10, 14)).health is Health.FAIL
    assert python_version((3, 11, 0)).health is Health.OK


def test_foreign_package_of_our_name_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """AdapterHub's distribution also installs a package called `adapters`; whichever came last would win."""
    (tmp_path / "adapters").mkdir()
    (tmp_path / "adapters" / "__init__.py").write_text("")
    info = tmp_path / "adapters-1.2.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: adapters\nVersion: 1.2.0\n")
    (info / "RECORD").write_text("adapters/__init__.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    check = import_names(importlib.metadata.packages_distributions())
    assert check.health is Health.FAIL
    assert "pip uninstall adapters" in check.detail


def test_no_other_distribution_here_has_our_names() -> None:
    assert import_names(importlib.metadata.packages_distributions()).health is Health.OK


def test_base_that_lost_its_files_fails_with_the_command_that_mends_it(home: Home, tmp_path: Path) -> None:
    folder = _pull(home, write_base(tmp_path / "tiny"))
    assert registry_opens(home).health is Health.OK
    (folder / "model.safetensors").unlink()
    with pytest.raises(BaseMissing, match="loraplane models pull"):
        registry_opens(home)
    assert run(["doctor", "--home", str(home.root), "--port", "0"]) == 1


def test_home_without_a_base_is_only_a_warning(home: Home) -> None:
    assert registry_opens(home).health is Health.WARN


def test_registry_that_does_not_open_fails(home: Home, capsys: pytest.CaptureFixture[str]) -> None:
    home.database.write_bytes(b"no database at all" * 100)
    assert run(["doctor", "--json", "--home", str(home.root), "--port", "0"]) == 1
    checks = {c["name"]: c["health"] for c in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["registry and bases"] == "fail"


def test_little_room_is_a_warning(home: Home) -> None:
    assert disk_space(home.root, 10_000_000).health is Health.WARN
    assert disk_space(home.root, 50_000_000_000).health is Health.OK


def test_taken_port_is_a_warning_unless_our_server_has_it(home: Home) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert port_free(port, home).health is Health.WARN
        lock = home.hold(ServerNote(f"http://127.0.0.1:{port}", 1))
        assert port_free(port, home).health is Health.OK
        assert str(port) in server_state(home).detail
        lock.release()


def test_json_lists_every_check(home: Home, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _pull(home, write_base(tmp_path / "tiny"))
    assert run(["doctor", "--json", "--home", str(home.root), "--port", "0"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["object"], answer["ok"]) == ("doctor", True)
    names = {check["name"] for check in answer["checks"]}
    assert {"python", "loraplane", "import names", "home", "disk", "registry and bases", "server", "port"} <= names


@pytest.mark.parametrize("root", ["/dev/null", "/dev/null/x", "/proc/nothing/x", "~nobody-of-this-name/x"])
def test_home_that_cannot_be_made_is_a_failed_check_and_the_others_are_still_told(
    root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["doctor", "--json", "--home", root, "--port", "0"]) == 1
    checks = {c["name"]: c for c in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["home"]["health"] == "fail"
    assert "LORAPLANE_HOME" in checks["home"]["detail"]
    assert checks["port"]["health"] == "ok"


def test_home_that_takes_no_file_is_a_failed_check(
    home: Home, read_only: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["doctor", "--json", "--home", str(home.root), "--port", "0"]) == 1
    checks = {c["name"]: c for c in json.loads(capsys.readouterr().out)["checks"]}
    assert checks["home"]["health"] == "fail"
    assert "Read-only file system" in checks["home"]["detail"]


@pytest.mark.parametrize("command", [["adapters", "list"], ["models", "list"], ["models", "pull"], ["history", "sum"]])
@pytest.mark.parametrize("root", ["/dev/null", "/dev/null/x", "/proc/nothing/x"])
def test_command_on_a_home_that_cannot_be_made_is_one_line(
    command: list[str], root: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was told as a fault of ours, with the operating system's words alone."""
    assert run([*command, "--home", root]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"error[home_unusable]: Loraplane cannot keep its things in {root}: ")
    assert (err.count("\n"), "LORAPLANE_HOME" in err) == (1, True)


def test_read_only_home_is_one_line(home: Home, read_only: None, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["adapters", "list"], ["models", "pull"]):
        assert run([*command, "--home", str(home.root)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("error[home_unusable]: ")
        assert (err.count("\n"), "Read-only file system" in err) == (1, True)
