"""The store that several machines share, and rot anywhere: found by digest before use, healed from the tier below."""

from __future__ import annotations

import itertools
import queue
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fsspec.implementations.memory import MemoryFileSystem

from adapters.base_digest import read_json
from adapters.bases import open_base, pull
from adapters.errors import AdapterLoadFailed, ConfigInvalid, ExtraMissing, LoraplaneError, RecordNotFound, StoreFailed
from adapters.families import adaptable
from adapters.home import Home
from adapters.records import AdapterVersion, BaseRecord
from adapters.registry import Registry
from adapters.shared_store import SharedStore, open_shared
from adapters.store import BlobStore
from serving.disk_tier import DiskTier
from serving.engine.build import build_engine
from serving.engine.config import EngineConfig
from serving.engine.lora import HostAdapter
from serving.engine.plan import Key, Load, Outgoing
from serving.engine.request import Drop, Finished, Heartbeat, Moved, Sampling, Submit, Tokens
from serving.load_workers import STORE
from serving.loader import HostTier
from serving.packed_file import Target
from serving.store_tier import StoreTier, read_adapter
from serving.tiers import Tiers
from tests.test_tiers_disk import same
from tests.tiers_case import HandWorkers

SEED = 20261122


class BrokenFiles(MemoryFileSystem):  # type: ignore[misc]
    """A store in memory that fails while `broken`."""

    cachable = False
    broken = False

    def cat_file(self, path: str, *args: Any, **given: Any) -> bytes:
        self._fail()
        data: bytes = super().cat_file(path, *args, **given)
        return data

    def mv(self, *args: Any, **given: Any) -> None:
        self._fail()
        super().mv(*args, **given)

    def _fail(self) -> None:
        if self.broken:
            raise ConnectionError("s3://key:secret@host is gone")


@pytest.fixture
def files() -> Iterator[BrokenFiles]:
    made = BrokenFiles()
    yield made
    made.broken = False
    made.rm("/", recursive=True) if made.ls("/") else None


@pytest.fixture
def stores(tmp_path: Path, files: BrokenFiles) -> tuple[BlobStore, BlobStore]:
    """Two machines' blobs before one shared store."""
    shared = SharedStore(files, "/shared", "memory://shared")
    return BlobStore(tmp_path / "one", shared=shared), BlobStore(tmp_path / "two", shared=shared)


def test_what_one_machine_keeps_another_reads(stores: tuple[BlobStore, BlobStore]) -> None:
    one, two = stores
    digest = one.put(b"weights")
    assert two.fetch(digest) == b"weights"
    assert not two.has(digest)
    assert two.read_verified(digest) == b"weights"
    assert two.has(digest)
    assert two.verify(digest).read_bytes() == b"weights"


def test_an_acknowledged_blob_is_in_the_shared_store_and_a_refused_one_nowhere(
    stores: tuple[BlobStore, BlobStore], files: BrokenFiles
) -> None:
    one, two = stores
    files.broken = True
    with pytest.raises(StoreFailed, match="ConnectionError") as refused:
        one.put(b"weights")
    assert "secret" not in str(refused.value)
    files.broken = False
    digest = one.put(b"other")
    assert two.fetch(digest) == b"other"
    assert [name for name in files.find("/shared") if "/tmp/" in name] == []
    assert len(files.find("/shared/sha256")) == 1


def test_rot_here_is_mended_from_there_and_rot_there_is_found(
    stores: tuple[BlobStore, BlobStore], files: BrokenFiles
) -> None:
    one, two = stores
    digest = one.put(b"weights")
    for read in (one.fetch, one.read_verified, lambda d: one.verify(d).read_bytes()):
        one.path(digest).chmod(0o600)
        one.path(digest).write_bytes(b"weighty")
        assert read(digest) == b"weights"
        assert one.path(digest).read_bytes() == b"weights"
    files.pipe_file(f"/shared/sha256/{digest[:2]}/{digest}", b"weighty")
    with pytest.raises(StoreFailed, match="rotted"):
        two.fetch(digest)
    assert one.put(b"weights") == digest  # publishing again mends what has rotted there
    assert two.fetch(digest) == b"weights"


def test_what_is_nowhere_is_not_found(stores: tuple[BlobStore, BlobStore]) -> None:
    for read in (stores[0].fetch, stores[0].read_verified, stores[0].verify):
        with pytest.raises(RecordNotFound):
            read("0" * 64)


def test_a_folder_is_a_shared_store_too(tmp_path: Path) -> None:
    shared = open_shared(str(tmp_path / "nfs"))
    digest = BlobStore(tmp_path / "one", shared=shared).put(b"weights")
    assert BlobStore(tmp_path / "two", shared=open_shared((tmp_path / "nfs").as_uri())).fetch(digest) == b"weights"
    assert BlobStore(tmp_path / "nfs").read_verified(digest) == b"weights"


def test_a_url_that_names_nothing_is_refused_without_its_password() -> None:
    assert open_shared("") is None
    with pytest.raises(ConfigInvalid, match="LORAPLANE_STORE") as refused:
        open_shared("nonsense://user:hunter2@host/path")
    assert "hunter2" not in str(refused.value)


def test_the_option_counts_before_the_environment_and_a_path_holds_wherever_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LORAPLANE_STORE", "s3://bucket/prefix")
    assert Home.find("home").store == "s3://bucket/prefix"
    assert Home.find("home", "near").store == str(tmp_path / "near")
    monkeypatch.delenv("LORAPLANE_STORE")
    assert Home.find("home").store == ""


def test_a_folder_that_cannot_be_written_to_is_refused_by_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigInvalid, match="LORAPLANE_STORE"):
        open_shared(str(tmp_path / "file" / "store"))


def test_a_protocol_whose_package_is_missing_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ExtraMissing, match="loraplane\\[s3\\]"):
        open_shared("s3://bucket/prefix")


# -- the whole way, from a registry to the host --------------------------------------------------------------------


@dataclass
class Way:
    """A registry with one version, and the tiers of an engine on its base."""

    registry: Registry
    record: BaseRecord
    version: AdapterVersion
    config: EngineConfig
    expected: HostAdapter

    def tiers(self, dtype: torch.dtype = torch.float32) -> tuple[Tiers, DiskTier]:
        target = Target(self.record.digest, str(dtype).removeprefix("torch."), "")
        disk = DiskTier(Path(self.config.packed), target, budget_bytes=self.config.disk_bytes)
        return Tiers(disk, StoreTier(self.config, dtype), lambda adapter: adapter, self.config.max_rank), disk

    def host(self) -> tuple[HostTier, HandWorkers, DiskTier]:
        tiers, disk = self.tiers()
        workers = HandWorkers()
        host = HostTier(
            tiers.bring,
            budget_bytes=1 << 30,
            workers=1,
            negative_cache_s=5.0,
            wake=lambda: None,
            now=lambda: 0.0,
            pools=workers,
            below=tiers,
        )
        return host, workers, disk

    def load(self) -> tuple[HostAdapter | None, str]:
        """The adapter as a new engine has it, and where it came from; or None and why."""
        host, workers, _ = self.host()
        host.want(self.version.digest)
        for _ in range(3):
            workers.run()
            host.poll()
        state = host.want(self.version.digest)
        if state.load is not Load.READY:
            return None, state.failure[1]
        return host.take(self.version.digest)[0], state.source


@pytest.fixture
def way(tmp_path: Path, tiny_base: Path, tiny_adapters: list[Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    monkeypatch.delenv("LORAPLANE_DATABASE_URL", raising=False)
    home = Home.find(tmp_path / "home", str(tmp_path / "shared"))
    registry = Registry.open(home)
    record = pull(str(tiny_base), home, registry, lambda line: None)
    folder = tiny_adapters[3]
    version = registry.publish("ours", {p.name: p for p in folder.iterdir()}, base=record.name, who="t")
    config = EngineConfig(
        base_folder=str(open_base(home, record)),
        base_name=record.name,
        base_digest=record.digest,
        family=str(read_json(tiny_base / "config.json")["model_type"]),
        modules=adaptable(record),
        blobs=str(home.blobs),
        store=home.store,
        packed=str(home.packed),
        disk_bytes=1 << 30,
    )
    yield Way(registry, record, version, config, read_adapter(config, version.digest, torch.float32))
    registry.close()


def test_the_second_engine_has_it_from_the_disk_bit_for_bit(way: Way) -> None:
    first, source = way.load()
    assert source == "store"
    second, again = way.load()
    assert again == "disk"
    assert first is not None
    assert second is not None
    assert same(first, way.expected)
    assert same(second, way.expected)


def test_the_disk_serves_when_every_blob_is_gone(way: Way) -> None:
    way.load()
    shutil.rmtree(way.config.blobs)
    shutil.rmtree(way.config.store)
    found, source = way.load()
    assert (found is not None, source) == (True, "disk")


def test_bit_rot_anywhere_is_never_served_and_heals_from_the_tier_below(way: Way) -> None:
    """60 flips in the packed file and 60 in the blobs of the home, at random places: the very adapter each time."""
    print(f"seed {SEED}")
    rng = random.Random(SEED)
    way.load()
    _, disk = way.tiers()
    (packed,) = Path(way.config.packed).glob("*.packed")
    blobs = [p for p in Path(way.config.blobs).joinpath("sha256").rglob("*") if p.is_file()]
    for turn in range(120):
        flip(packed, rng)
        if turn % 2:
            flip(rng.choice(blobs), rng)
        found, source = way.load()
        assert found is not None, source
        assert source == "store"
        assert same(found, way.expected)
        assert disk.get(way.version.digest) is not None  # made anew


def test_rot_in_every_tier_is_refused_with_its_reason(way: Way) -> None:
    rng = random.Random(SEED)
    for root in (way.config.blobs, way.config.store):
        for path in Path(root).joinpath("sha256").rglob("*"):
            if path.is_file():
                flip(path, rng)
    found, why = way.load()
    assert found is None
    assert "rotted" in why


def test_an_engine_of_another_base_refuses_it(way: Way) -> None:
    config = replace(way.config, base_digest="c" * 64)
    with pytest.raises(AdapterLoadFailed, match="another base"):
        read_adapter(config, way.version.digest, torch.float32)


def test_a_lower_rank_limit_refuses_what_was_packed_under_a_higher_one(way: Way) -> None:
    way.load()
    way.config = replace(way.config, max_rank=1)
    found, why = way.load()
    assert found is None
    assert "rank" in why


def test_a_blob_that_is_no_manifest_is_refused_by_name(way: Way) -> None:
    with pytest.raises(LoraplaneError, match="is no adapter"):
        read_adapter(way.config, way.registry.store.put(b'{"kind": "dance"}'), torch.float32)


def test_a_load_from_the_disk_asks_nothing_of_the_store(way: Way) -> None:
    way.load()
    host, workers, _ = way.host()
    host.want(way.version.digest)
    workers.run("disk")
    assert not workers.waiting[STORE]
    host.poll()
    assert host.want(way.version.digest).load is Load.READY


def flip(path: Path, rng: random.Random) -> None:
    """Turn one bit of a file over, whatever its permissions."""
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.chmod(0o600)
    path.write_bytes(data)


class Served:
    """A whole engine of a way, in this process, its thread running."""

    def __init__(self, config: EngineConfig) -> None:
        self._events: queue.SimpleQueue[Outgoing] = queue.SimpleQueue()
        self.engine = build_engine(config, self._take)
        self.engine.start()
        self._numbers = itertools.count(1)

    def _take(self, outgoing: Sequence[Outgoing]) -> None:
        for event in outgoing:
            self._events.put(event)

    def answer(self, digest: str) -> tuple[list[int], str]:
        """Twelve greedy tokens, and which tier the adapter came from."""
        number = next(self._numbers)
        sampling = Sampling(max_tokens=12, temperature=0.0, ignore_eos=True)
        self.engine.submit(Key((0, number)), Submit(number, (5, 9, 33, 61, 17), sampling, digest))
        ids: list[int] = []
        while True:
            event = self._events.get(timeout=60)[1]
            if isinstance(event, Tokens):
                ids += event.ids
            elif isinstance(event, Finished):
                return ids, event.timing.source
            else:
                raise AssertionError(event)

    def told(self, message: Drop) -> Moved:
        self.engine.keep(Key((0, message.id)), message)
        event = self._events.get(timeout=60)[1]
        assert isinstance(event, Moved)
        return event

    def beat(self, true: Callable[[Heartbeat], bool]) -> Heartbeat:
        """The first heartbeat of which this is true."""
        deadline = time.monotonic() + 30
        while not true(beat := self.engine.heartbeat()):
            assert time.monotonic() < deadline, beat
            time.sleep(0.01)
        return beat


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_answers_the_same_from_every_tier_and_heals_on_the_way(way: Way, dtype: str) -> None:
    """bfloat16 is laid out for the kernels where they can be had: then the file holds that form."""
    digest = way.version.digest
    config = replace(way.config, dtype=dtype, threads=1, max_rows=2, slots=1, max_model_len=64)
    one = Served(config)
    expected, source = one.answer(digest)
    assert (source, one.answer(digest)) == ("store", (expected, "device"))
    assert one.beat(lambda beat: beat.disk_count == 1).loads["store"] == 1
    one.engine.stop()

    two = Served(config)
    assert two.answer(digest) == (expected, "disk")
    two.engine.stop()

    (packed,) = Path(config.packed).glob("*.packed")
    flip(packed, random.Random(SEED))
    three = Served(config)
    assert three.answer(digest) == (expected, "store")
    beat = three.beat(lambda beat: beat.disk_count == 1)
    assert (beat.healed, beat.evicted) == (1, {"device": 0, "host": 0, "disk": 0})
    moved = three.told(Drop(99, digest, 1.0))
    assert moved.bytes > beat.disk_bytes
    assert three.beat(lambda beat: beat.disk_count == 0).host_digests == ()
    assert three.answer(digest) == (expected, "store")
    three.engine.stop()
