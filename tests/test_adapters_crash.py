"""R-01: killed at any write-class system call, the registry keeps what it acknowledged and shows nothing half-made."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from adapters.errors import ModelNotFound
from adapters.home import Home
from adapters.publish import WEIGHTS_FILE
from adapters.records import MoveAction
from adapters.registry import Registry
from adapters.weights import open_weights
from tests.adapter_factory import adapter_files, base_record, policy, report
from tests.crash_child import STEPS

ROOT = Path(__file__).resolve().parents[1]
CALLS = (
    "write,pwrite64,writev,pwritev,fsync,fdatasync,rename,renameat,renameat2,unlink,unlinkat,mkdir,mkdirat,ftruncate,"
    "fchmod,link,linkat"
)
CI_STRIDE = 4


@pytest.fixture
def template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with sum@1 as champion, closed."""
    monkeypatch.delenv("LORAPLANE_DATABASE_URL", raising=False)
    registry = Registry.open(Home.find(tmp_path / "template"))
    registry.add_base(base_record())
    version = registry.publish("sum", adapter_files(1), who="test")
    registry.set_policy("sum", policy(), "test")
    registry.add_report(report(version))
    registry.promote("sum", 1, who="test")
    registry.close()
    return tmp_path / "template"


def run_child(home: Path, *strace: str) -> tuple[list[str], bool]:
    """Run the child under strace; what it acknowledged, and whether it was killed."""
    # No --seccomp-bpf, though it is faster: with it strace 6.1 injects nothing.
    traced = ["strace", "-f", "-qq", "-e", f"trace={CALLS}", *strace]
    done = subprocess.run(
        [*traced, sys.executable, "-m", "tests.crash_child", str(home)],
        cwd=ROOT,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        timeout=120,
        check=False,
    )
    if done.returncode not in (0, -9, 137):
        raise RuntimeError(done.stderr.decode()[-2000:])
    return done.stdout.decode().splitlines(), done.returncode != 0


def points(template: Path, folder: Path) -> list[tuple[str, int]]:
    """Every (system call, n-th use of it) of one whole run. Skips when this machine does not allow tracing."""
    if shutil.which("strace") is None:
        pytest.skip("strace is not installed")
    shutil.copytree(template, folder / "whole")
    try:
        acknowledged, _ = run_child(folder / "whole", "-o", str(folder / "trace"))
    except RuntimeError as error:
        if "ptrace" in str(error) or "PTRACE" in str(error):
            pytest.skip(f"this machine does not allow tracing: {error}")
        raise
    assert acknowledged == list(STEPS)
    counts = Counter(re.findall(r"^\d+ +(\w+)\(", (folder / "trace").read_text(), re.MULTILINE))
    return [(call, n) for call in sorted(counts) for n in range(1, counts[call] + 1)]


def check(home: Path, acknowledged: list[str], point: tuple[str, int]) -> None:
    """What must hold after a kill at `point`, for a home opened again."""
    registry = Registry.open(Home.find(home))
    try:
        for blob in (home / "blobs" / "sha256").rglob("*"):
            if blob.is_file():
                assert hashlib.sha256(blob.read_bytes()).hexdigest() == blob.name, point
        versions = {version.number: version for version in registry.adapter("sum").versions}
        assert set(versions) in ({1}, {1, 2}), point
        for version in versions.values():
            manifest = registry.manifest(version.digest)
            weights = open_weights(registry.store.read_verified(manifest.weights))
            assert tuple(weights.ranks) == version.modules, point
            registry.store.read_verified(version.originals[WEIGHTS_FILE])
        champion = registry.resolve("sum")
        history = registry.history("sum")
        assert [move.generation for move in history] == list(range(len(history), 0, -1)), point
        assert history[0].to_number == champion.number, point
        done = (
            2 in versions,
            2 in versions and bool(registry.reports("sum", 2)),
            any(move.to_number == 2 for move in history),
            history[0].action is MoveAction.ROLLBACK,
        )
        for step, is_done in zip(STEPS, done, strict=True):
            assert is_done or step not in acknowledged, (point, step)
        assert list(done) == sorted(done, reverse=True), point
        # And the work can go on where it was cut off.
        again = registry.publish("sum", adapter_files(2), who="test")
        assert again.number == 2, point
        with pytest.raises(ModelNotFound):
            registry.version("sum", 3)
    finally:
        registry.close()


def kill_at(template: Path, folder: Path, chosen: list[tuple[str, int]]) -> None:
    killed = 0
    for call, n in chosen:
        home = folder / "home"
        shutil.copytree(template, home)
        acknowledged, was_killed = run_child(home, "-o", "/dev/null", "-e", f"inject={call}:signal=SIGKILL:when={n}")
        killed += was_killed
        check(home, acknowledged, (call, n))
        shutil.rmtree(home)
    print(f"killed at {killed} of {len(chosen)} points")
    assert killed >= 0.9 * len(chosen)


def test_R01_a_kill_at_every_fourth_write_leaves_the_registry_whole(template: Path, tmp_path: Path) -> None:
    """R-01 at reduced scale: every fourth write-class system call of publish, report, promote and rollback."""
    every = points(template, tmp_path)
    kill_at(template, tmp_path, every[::CI_STRIDE])


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_R01_a_kill_at_every_write_leaves_the_registry_whole(template: Path, tmp_path: Path) -> None:
    """R-01 in full for publish, report, promote and rollback on SQLite."""
    kill_at(template, tmp_path, points(template, tmp_path))
