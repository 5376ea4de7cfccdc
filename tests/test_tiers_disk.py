"""The disk tier: what comes back is what was kept, bit for bit, or nothing."""

from __future__ import annotations

import os
import random
import socket
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from adapters.golden import GoldenRow
from serving.disk_tier import DiskTier
from serving.engine.lora import End, Form, HostAdapter
from serving.packed_file import Damaged, read_header, read_packed, write_packed
from tests.tiers_case import TARGET, adapter_of, digest_of, disk_tier

SEED = 20261122
ONE, TWO = digest_of(1), digest_of(2)


def rich(digest: str = ONE) -> HostAdapter:
    """An adapter with one of everything."""
    end = End(torch.randn(7, 2), torch.randn(2, 3))
    return HostAdapter(
        digest,
        2,
        {
            "m.q": (torch.randn(2, 5).bfloat16(), torch.randn(2, 3).bfloat16()),
            "m.v": (torch.randn(1, 5), torch.randn(1, 9)),
        },
        {"m.q": torch.randn(3)},
        embedding=end,
        head=replace(end, gain=torch.randn(3)),
        golden=(GoldenRow((1, 2), (3,), 0.5),),
    )


def laid_out(digest: str = ONE) -> HostAdapter:
    """An adapter in some slots' form, without extras."""
    tensors = (torch.randn(33).bfloat16(), torch.arange(6).view(2, 3), torch.zeros(0, dtype=torch.uint8))
    return HostAdapter(digest, 2, {}, form=Form(TARGET.kind, tensors, frozenset({"m.q", "m.v"})))


def tensors_of(adapter: HostAdapter) -> list[torch.Tensor]:
    ends = [e for e in (adapter.embedding, adapter.head) if e is not None]
    found = [t for pair in adapter.pairs.values() for t in pair] + list(adapter.gains.values())
    found += [t for e in ends for t in (e.a, e.b, e.gain) if t is not None]
    return found + (list(adapter.form.tensors) if adapter.form else [])


def same(left: HostAdapter, right: HostAdapter) -> bool:
    plain = [(a.digest, a.rank, a.golden, set(a.pairs), set(a.gains)) for a in (left, right)]
    pairs = list(zip(tensors_of(left), tensors_of(right), strict=True))
    forms = [a.form and (a.form.kind, a.form.modules) for a in (left, right)]
    return (
        plain[0] == plain[1]
        and forms[0] == forms[1]
        and all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "packed"


def only_file(folder: Path) -> Path:
    (path,) = folder.glob("*.packed")
    return path


@pytest.mark.parametrize("make", [rich, laid_out])
def test_an_adapter_comes_back_bit_for_bit_and_aligned(folder: Path, make: object) -> None:
    tier = disk_tier(folder)
    adapter = make()  # type: ignore[operator]
    tier.put(adapter, 0.5)
    found = tier.get(ONE)
    assert found is not None
    assert same(found, adapter)
    assert all(t.data_ptr() % 64 == 0 for t in tensors_of(found) if t.numel())
    assert read_header(only_file(folder)).cost_s == 0.5
    assert only_file(folder).stat().st_mode & 0o077 == 0


def test_a_flipped_bit_anywhere_is_found_and_the_file_goes(folder: Path) -> None:
    """300 places in turn, the first bytes of each part among them: never a wrong adapter, never a crash."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    tier = disk_tier(folder)
    adapter = rich()
    tier.put(adapter, 0.5)
    whole = only_file(folder).read_bytes()
    places = [0, 7, 8, 39, 40, 47, 48, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(292))]
    for count, at in enumerate(places, 1):
        rotten = bytearray(whole)
        rotten[at] ^= 1 << rng.randrange(8)
        only = folder / f"{ONE}-{tier._tag}.packed"
        only.write_bytes(rotten)
        assert tier.get(ONE) is None, at
        assert not only.exists()
        assert tier.healed == count
    tier.put(adapter, 0.5)
    found = tier.get(ONE)
    assert found is not None
    assert same(found, adapter)


def test_a_cut_file_is_found_at_any_length(folder: Path) -> None:
    tier = disk_tier(folder)
    tier.put(rich(), 0.5)
    path = only_file(folder)
    whole = path.read_bytes()
    for length in [*range(60), *range(60, len(whole), 97)]:
        path.write_bytes(whole[:length])
        with pytest.raises(Damaged):
            read_packed(path, ONE, TARGET)
    path.write_bytes(whole + b"\0")
    assert tier.get(ONE) is None


def test_another_adapters_file_is_never_taken_for_this_one(folder: Path) -> None:
    tier = disk_tier(folder)
    tier.put(adapter_of(ONE), 0.1)
    path = only_file(folder)
    path.rename(folder / path.name.replace(ONE, TWO))
    assert tier.get(TWO) is None
    assert tier.healed == 1


@pytest.mark.parametrize("change", [{"base": "c" * 64}, {"dtype": "bfloat16"}, {"kind": "cpu1-0"}])
def test_engines_of_other_bases_dtypes_and_forms_share_the_folder(folder: Path, change: dict[str, str]) -> None:
    other = type(TARGET)(**{"base": TARGET.base, "dtype": TARGET.dtype, "kind": TARGET.kind, **change})
    ours, theirs = disk_tier(folder), disk_tier(folder, other)
    ours.put(adapter_of(ONE), 0.1)
    assert theirs.get(ONE) is None
    only_file(folder).rename(theirs._path(ONE))  # as if the name lied
    assert theirs.get(ONE) is None
    assert theirs.healed == 1


def test_what_follows_a_name_out_of_the_folder_or_never_ends_is_not_read(folder: Path, tmp_path: Path) -> None:
    tier = disk_tier(folder)
    tier.put(adapter_of(ONE), 0.1)
    path = only_file(folder)
    elsewhere = path.rename(tmp_path / "elsewhere")
    path.symlink_to(elsewhere)
    assert tier.get(ONE) is None
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    assert tier.get(ONE) is None


def test_a_folder_in_a_files_place_makes_way_and_loses_nothing(folder: Path, tmp_path: Path) -> None:
    """No digest was ever kept whose file's name a folder had, each look leaked a descriptor, and once that folder was
    to be evicted nothing was kept any more."""
    tier = disk_tier(folder, budget_bytes=20 << 10)
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "kept").write_text("outside")
    empty, full = tier._path(ONE), tier._path(TWO)
    empty.mkdir()
    full.mkdir()
    (full / "notes").write_text("not ours")
    (full / "way-out").symlink_to(tmp_path / "theirs")
    os.utime(full, (1.0, 1.0))
    descriptors = len(os.listdir("/proc/self/fd"))
    assert (tier.bytes_of(ONE), tier.bytes_of(TWO)) == (0, 0)
    assert (tier.get(ONE), tier.healed) == (None, 1)
    assert len(os.listdir("/proc/self/fd")) == descriptors
    for digest in (ONE, TWO):
        tier.put(adapter_of(digest, 4 << 10), 0.1)
        assert tier.get(digest) is not None
    for n in range(10, 14):  # more than fit: others go
        tier.put(adapter_of(digest_of(n), 4 << 10), 0.1)
        assert tier.get(digest_of(n)) is not None
    (aside,) = [path for path in folder.iterdir() if path.is_dir()]
    assert (aside / "notes").read_text() == "not ours"
    assert (tmp_path / "theirs" / "kept").read_text() == "outside"
    assert tier.evictions > 0


def test_a_folder_with_a_files_name_is_neither_counted_nor_evicted(folder: Path) -> None:
    first = disk_tier(folder)
    stranger = first._path(digest_of(99))
    stranger.mkdir()
    (stranger / "notes").write_text("not ours")
    os.utime(stranger, (1.0, 1.0))
    tier = disk_tier(folder, budget_bytes=20 << 10)
    assert (tier.count, tier.bytes) == (0, 0)
    for n in range(8):
        tier.put(adapter_of(digest_of(n), 4 << 10), 0.1)
        assert tier.get(digest_of(n)) is not None
    assert (stranger / "notes").exists()
    assert tier.drop(digest_of(99)) == 0
    assert not stranger.exists()


@pytest.mark.parametrize("kind", ["link", "loop", "pipe", "socket"])
def test_what_is_no_file_is_taken_away_at_the_first_look(kind: str, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="lp-") as short:  # a socket's path has at most 107 bytes
        tier = disk_tier(Path(short))
        path, elsewhere = tier._path(ONE), tmp_path / "elsewhere"
        elsewhere.write_bytes(b"theirs")
        match kind:
            case "link":
                path.symlink_to(elsewhere)
            case "loop":
                path.symlink_to(path.name)
            case "pipe":
                os.mkfifo(path)
            case _:
                with socket.socket(socket.AF_UNIX) as plug:
                    plug.bind(str(path))
        assert (tier.get(ONE), tier.healed) == (None, 1)
        assert not path.is_symlink()
        assert not path.exists()
        assert elsewhere.read_bytes() == b"theirs"
        tier.put(adapter_of(ONE), 0.1)
        assert tier.get(ONE) is not None


def test_the_budget_holds_and_what_is_cheap_to_make_goes_before_what_is_not(folder: Path) -> None:
    """Eight files of one size and age, every other one slow to make; then room for four is asked for."""
    clock = [1000.0]
    tier = disk_tier(folder, budget_bytes=130 << 10, now=lambda: clock[0])
    for n in range(8):
        tier.put(adapter_of(digest_of(n), 14 << 10), 5.0 if n % 2 else 0.1)
    assert (tier.count, tier.evictions) == (8, 0)
    for n in range(8):
        os.utime(tier._path(digest_of(n)), (clock[0], clock[0]))
    clock[0] += 600.0
    for n in range(10, 14):
        tier.put(adapter_of(digest_of(n), 14 << 10), 1.0)
        os.utime(tier._path(digest_of(n)), (clock[0], clock[0]))
    assert {n for n in range(14) if tier.bytes_of(digest_of(n))} == {1, 3, 5, 7, 10, 11, 12, 13}
    assert (tier.count, tier.evictions) == (8, 4)
    assert tier.bytes <= 130 << 10


def test_what_was_read_lately_stays(folder: Path) -> None:
    clock = [1000.0]
    tier = disk_tier(folder, budget_bytes=66 << 10, now=lambda: clock[0])
    for n in range(4):
        tier.put(adapter_of(digest_of(n), 14 << 10), 0.5)
        os.utime(tier._path(digest_of(n)), (clock[0], clock[0]))
    clock[0] += 600.0
    assert tier.get(digest_of(2)) is not None
    clock[0] += 10.0
    for n in range(10, 13):
        tier.put(adapter_of(digest_of(n), 14 << 10), 0.5)
        os.utime(tier._path(digest_of(n)), (clock[0], clock[0]))
    assert {n for n in range(14) if tier.bytes_of(digest_of(n))} == {2, 10, 11, 12}


def test_more_than_the_budget_or_no_budget_keeps_nothing(folder: Path) -> None:
    small, off = disk_tier(folder, budget_bytes=1000), disk_tier(folder / "off", budget_bytes=0)
    for tier in (small, off):
        tier.put(adapter_of(ONE, 64 << 10), 0.1)
        assert tier.get(ONE) is None
    assert not (folder / "off").exists()


def test_a_smaller_budget_at_the_next_start_is_kept_at_once(folder: Path) -> None:
    tier = disk_tier(folder)
    for n in range(8):
        tier.put(adapter_of(digest_of(n), 16 << 10), 0.1)
    again = disk_tier(folder, budget_bytes=70 << 10)
    assert again.bytes <= 70 << 10
    assert 1 <= again.count < 8


def test_a_dropped_adapter_leaves_no_byte(folder: Path) -> None:
    tier = disk_tier(folder)
    tier.put(adapter_of(ONE), 0.1)
    size = tier.bytes_of(ONE)
    assert tier.drop(ONE) == size > 0
    assert (tier.count, tier.bytes, tier.bytes_of(ONE), tier.drop(ONE)) == (0, 0, 0, 0)


def test_a_writer_that_was_killed_leaves_nothing_that_is_read_or_stays(folder: Path) -> None:
    tier = disk_tier(folder)
    staged = folder / ".staged-1-dead"
    staged.write_bytes(b"half")
    os.utime(staged, (1.0, 1.0))
    assert tier.get(ONE) is None
    disk_tier(folder)
    assert not staged.exists()


def test_a_full_disk_costs_the_file_and_nothing_else(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tier = disk_tier(folder)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    tier.put(adapter_of(ONE), 0.1)
    monkeypatch.undo()
    assert tier.get(ONE) is None
    assert [p.name for p in folder.iterdir() if p.name != "lock"] == []
    tier.put(adapter_of(ONE), 0.1)
    assert tier.get(ONE) is not None


def test_an_engine_that_hangs_amid_a_write_keeps_no_other_from_reading_or_healing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.disk_tier._LOCK_S", 0.01)
    tier = disk_tier(folder)
    tier.put(adapter_of(ONE), 0.1)
    with FileLock(folder / "lock"):
        tier.put(adapter_of(TWO), 0.1)
        assert tier.get(ONE) is not None
        only_file(folder).chmod(0o600)
        only_file(folder).write_bytes(b"rot" * 1000)
        assert tier.get(ONE) is None
        assert (tier.healed, tier.count) == (1, 0)
    tier.put(adapter_of(TWO), 0.1)
    assert tier.get(TWO) is not None


def test_an_unwritable_folder_turns_the_tier_off(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    tier = disk_tier(tmp_path / "file" / "packed")
    tier.put(adapter_of(ONE), 0.1)
    assert (tier.get(ONE), tier.budget_bytes) == (None, 0)


def test_engines_that_share_a_folder_never_see_half_a_file(folder: Path) -> None:
    """Four threads, each with a tier of its own as another process has, write, read and drop the same few adapters."""
    tiers = [disk_tier(folder, budget_bytes=40 << 10) for _ in range(4)]
    wrong: list[str] = []

    def work(tier: DiskTier, seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(40):
            digest = digest_of(rng.randrange(6))
            if rng.random() < 0.1:
                tier.drop(digest)
                continue
            found = tier.get(digest)
            if found is None:
                tier.put(adapter_of(digest, 8 << 10), 0.1)
            elif not same(found, adapter_of(digest, 8 << 10)):
                wrong.append(digest)

    threads = [threading.Thread(target=work, args=(tier, seed)) for seed, tier in enumerate(tiers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert sum(tier.healed for tier in tiers) == 0
    assert not list(folder.glob(".staged-*"))


def test_files_of_one_adapter_are_the_same_bytes(tmp_path: Path) -> None:
    adapter = rich()
    for name in ("a", "b"):
        with (tmp_path / name).open("wb") as file:
            size = write_packed(file, adapter, TARGET, 0.5)
        assert (tmp_path / name).stat().st_size == size
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
