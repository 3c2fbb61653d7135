"""The cache on disk: whole or absent, one maker, bounded, broken entries made again."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kvcompile.ir.errors import KvcompileError
from kvcompile.models import cache


@pytest.fixture(autouse=True)
def cache_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVCOMPILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("KVCOMPILE_CACHE_LIMIT", raising=False)
    return tmp_path / "cache"


class Maker:
    """Fills a folder with `size_bytes` bytes and counts how often it had to."""

    def __init__(self, size_bytes: int = 100) -> None:
        self.size_bytes = size_bytes
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        (folder / "weights").write_bytes(b"w" * self.size_bytes)
        (folder / "sub").mkdir()
        (folder / "sub" / "config.json").write_text("{}")


def make(key: str, maker: Maker) -> list[str]:
    lines: list[str] = []
    with cache.use(key, maker, what=f"the copy of {key}", progress=lines.append) as folder:
        assert (folder / "weights").read_bytes() == b"w" * maker.size_bytes
    return lines


def test_an_entry_is_made_once() -> None:
    maker = Maker()
    assert make("one", maker) == make("one", maker) == []
    assert maker.calls == 1
    assert [entry.key for entry in cache.entries()] == ["one"]
    assert cache.has("one")
    assert not cache.has("two")


def test_a_maker_that_fails_leaves_nothing_and_the_next_one_succeeds(cache_root: Path) -> None:
    def fails(folder: Path) -> None:
        (folder / "weights").write_bytes(b"half")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"), cache.use("one", fails, what="the copy"):
        pass
    assert cache.entries() == []
    assert list((cache_root / "tmp").iterdir()) == []
    make("one", Maker())


@pytest.mark.parametrize("size_bytes", [100, cache.SAMPLED_BYTES + 1000])
def test_a_truncated_file_is_made_again_with_a_message(cache_root: Path, size_bytes: int) -> None:
    maker = Maker(size_bytes)
    make("one", maker)
    with (cache_root / "models" / "one" / "weights").open("r+b") as file:
        file.truncate(50)
    assert not cache.has("one")
    assert make("one", maker) == [f"the copy of one is broken (weights has 50 bytes, not {size_bytes}); making it again"]
    assert maker.calls == 2


@pytest.mark.parametrize("size_bytes", [100, cache.SAMPLED_BYTES + 1000])
def test_a_changed_file_of_the_same_size_is_made_again(cache_root: Path, size_bytes: int) -> None:
    maker = Maker(size_bytes)
    make("one", maker)
    with (cache_root / "models" / "one" / "weights").open("r+b") as file:
        file.seek(size_bytes - 10)
        file.write(b"\0" * 10)
    assert make("one", maker) == ["the copy of one is broken (weights has changed); making it again"]


@pytest.mark.parametrize(
    ("damage", "fault"),
    [
        (lambda entry: (entry / "sub" / "config.json").unlink(), "sub/config.json is missing"),
        (lambda entry: (entry / "manifest.json").unlink(), "it has no manifest"),
        (lambda entry: (entry / "manifest.json").write_text("{"), "its manifest cannot be read"),
        (lambda entry: (entry / "manifest.json").write_text("[]"), "its manifest cannot be read"),
    ],
)
def test_a_half_entry_is_made_again(cache_root: Path, damage: object, fault: str) -> None:
    make("one", Maker())
    damage(cache_root / "models" / "one")  # type: ignore[operator]
    assert make("one", Maker()) == [f"the copy of one is broken ({fault}); making it again"]


def test_what_a_dead_process_left_is_removed(cache_root: Path) -> None:
    (cache_root / "tmp" / "one--dead").mkdir(parents=True)
    make("one", Maker())
    assert list((cache_root / "tmp").iterdir()) == []


def test_four_processes_at_once_make_one_entry(cache_root: Path, tmp_path: Path) -> None:
    script = f"""
import sys, time
from pathlib import Path
from kvcompile.models import cache
def build(folder):
    with open({str(tmp_path / "made")!r}, "a") as log:
        log.write("x")
    (folder / "a").write_bytes(b"1" * 1000)
    time.sleep(0.3)
    (folder / "b").write_bytes(b"2" * 1000)
with cache.use("one", build, what="it") as folder:
    assert (folder / "a").read_bytes() == b"1" * 1000 and (folder / "b").read_bytes() == b"2" * 1000
assert cache.record("verified", "same", {{"n": 1}})
"""
    started = [subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE) for _ in range(4)]
    for process in started:
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors.decode()
    assert (tmp_path / "made").read_text() == "x"
    assert cache.recall("verified", "same") == {"n": 1}


def test_a_process_that_dies_while_making_lets_the_next_one_make(cache_root: Path) -> None:
    script = (
        "import os\nfrom kvcompile.models import cache\n"
        "def build(folder):\n    (folder / 'a').write_bytes(b'1')\n    os._exit(9)\n"
        "with cache.use('one', build, what='it'): pass"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    assert cache.entries() == []
    make("one", Maker())
    assert list((cache_root / "tmp").iterdir()) == []


def test_above_the_limit_the_entry_used_least_recently_goes(cache_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, key in enumerate(["newest", "middle", "oldest"]):
        make(key, Maker(10_000))
        os.utime(cache_root / "models" / key, (1e9 - age, 1e9 - age))
    monkeypatch.setenv("KVCOMPILE_CACHE_LIMIT", "32KiB")
    lines = make("another", Maker(10_000))
    assert lines == ["the cache is above its limit; removed oldest, used least recently"]
    assert {entry.key for entry in cache.entries()} == {"newest", "middle", "another"}


def test_an_entry_in_use_is_never_removed(cache_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCOMPILE_CACHE_LIMIT", "1KiB")
    with cache.use("used", Maker(10_000), what="it") as folder:
        os.utime(folder, (1, 1))
        make("another", Maker(10_000))
        cache.clear()
        assert (folder / "weights").is_file()
    assert [entry.key for entry in cache.entries()] == ["used"]


def test_an_entry_larger_than_the_limit_still_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCOMPILE_CACHE_LIMIT", "1KiB")
    maker = Maker(10_000)
    make("large", maker)
    make("large", maker)
    assert maker.calls == 1


@pytest.mark.parametrize(
    ("given", "expected"), [("", 20 * 1024**3), ("500MiB", 500 * 1024**2), ("1.5 gib", 3 * 1024**3 // 2), ("4096", 4096), ("10B", 10)]
)
def test_the_limit_is_a_size(monkeypatch: pytest.MonkeyPatch, given: str, expected: int) -> None:
    monkeypatch.setenv("KVCOMPILE_CACHE_LIMIT", given)
    assert cache.limit_bytes() == expected


def test_a_limit_that_is_no_size_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCOMPILE_CACHE_LIMIT", "much")
    with pytest.raises(KvcompileError, match=r"KVCOMPILE_CACHE_LIMIT: 'much' is no size\.\n  Write a number and a unit, such as 20GiB"):
        cache.limit_bytes()


def test_a_cache_folder_that_cannot_be_written_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("KVCOMPILE_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(KvcompileError, match=r"the cache folder cannot be written: Not a directory\.\n  Set KVCOMPILE_CACHE_DIR"):
        make("one", Maker())
    assert cache.record("verified", "a", {}) is False
    assert cache.recall("verified", "a") is None
    assert cache.entries() == []
    assert cache.size() == 0


def test_a_cache_that_became_read_only_still_serves(cache_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = Maker()
    make("one", maker)

    def refuse(key: str) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache, "_open_lock", refuse)
    make("one", maker)
    assert maker.calls == 1
    with pytest.raises(KvcompileError, match="the cache folder cannot be written: Permission denied"):
        make("two", maker)


def test_records_are_kept_and_a_corrupt_one_is_absent(cache_root: Path) -> None:
    assert cache.recall("verified", "a") is None
    assert cache.record("verified", "a", {"error": 1e-6})
    assert cache.recall("verified", "a") == {"error": 1e-6}
    for text in ("{", "[1]", "", "\xff"):
        (cache_root / "verified" / "a.json").write_text(text, encoding="latin-1")
        assert cache.recall("verified", "a") is None


def test_records_of_a_kind_are_bounded(monkeypatch: pytest.MonkeyPatch, cache_root: Path) -> None:
    monkeypatch.setattr(cache, "MOST_RECORDS", 3)
    for number in range(5):
        cache.record("verified", f"r{number}", {"n": number})
        os.utime(cache_root / "verified" / f"r{number}.json", (1e9 + number, 1e9 + number))
    assert [number for number in range(5) if cache.recall("verified", f"r{number}")] == [2, 3, 4]


def test_clear_removes_entries_and_records_and_says_how_much(cache_root: Path) -> None:
    make("one", Maker(10_000))
    cache.record("verified", "a", {"n": 1})
    held = cache.size()
    assert held > 10_000
    assert cache.clear() >= 10_000
    assert cache.entries() == []
    assert cache.recall("verified", "a") is None
    assert cache.size() == 0


def test_a_checksum_is_remembered_until_the_file_changes(tmp_path: Path, cache_root: Path) -> None:
    source = tmp_path / "model.gguf"
    source.write_bytes(b"abc")
    first = cache.checksum(source)
    assert first == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    [known] = (cache_root / "checksums").glob("*.json")
    known.write_text(json.dumps({"sha256": "0" * 64}))
    assert cache.checksum(source) == "0" * 64, "the second call did not read the remembered value"
    source.write_bytes(b"abcd")
    assert cache.checksum(source) != first


def test_no_file_of_the_cache_can_be_executed_or_written_by_others(cache_root: Path) -> None:
    make("one", Maker())
    for path in cache_root.rglob("*.json"):
        assert not path.stat().st_mode & (stat.S_IXUSR | stat.S_IWOTH), path


def test_entries_of_other_kinds_are_kept_beside_models(cache_root: Path) -> None:
    makers = {kind: Maker(1000) for kind in cache.KINDS}
    for _ in range(2):
        for kind, maker in makers.items():
            with cache.use("one", maker, what="it", kind=kind) as folder:
                assert folder == cache_root / kind / "one"
    assert [maker.calls for maker in makers.values()] == [1, 1, 1, 1]
    assert {(entry.kind, entry.key) for entry in cache.entries()} == {(kind, "one") for kind in cache.KINDS}
    assert cache.has("one", kind="kernels")
    assert not cache.has("two", kind="kernels")
    assert cache.clear() >= 4000
    assert cache.entries() == []
    assert cache.size() == 0


def test_a_key_is_locked_in_its_own_kind_only(cache_root: Path) -> None:
    with cache.use("one", Maker(), what="it", kind="kernels"):
        make("one", Maker())
        cache.clear()
    assert [(entry.kind, entry.key) for entry in cache.entries()] == [("kernels", "one")]


def test_the_limit_holds_for_all_kinds_together(cache_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for age, kind in enumerate(["models", "segments", "kernels"]):
        with cache.use("old", Maker(10_000), what="it", kind=kind) as folder:
            pass
        os.utime(folder, (1e9 - age, 1e9 - age))
    monkeypatch.setenv("KVCOMPILE_CACHE_LIMIT", "32KiB")
    make("another", Maker(10_000))
    assert {(entry.kind, entry.key) for entry in cache.entries()} == {("models", "old"), ("segments", "old"), ("models", "another")}


def test_only_what_a_dead_process_left_of_this_entry_is_removed(cache_root: Path) -> None:
    for name in ("one--aaaaaaaa", "one--two--aaaaaaaa", "kernels+one--aaaaaaaa", "kernels+one--bbbbbbbb.old"):
        (cache_root / "tmp" / name).mkdir(parents=True)
    with cache.use("one", Maker(), what="it", kind="kernels"):
        pass
    assert {path.name for path in (cache_root / "tmp").iterdir()} == {"one--aaaaaaaa", "one--two--aaaaaaaa"}


def test_folders_of_failed_sources_are_bounded_and_cleared(cache_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MOST_FAILED", 3)
    for number in range(5):
        folder = cache.failed(f"f{number}")
        folder.mkdir(parents=True)
        (folder / "a.cpp").write_text("1")
        os.utime(folder, (1e9 + number, 1e9 + number))
    assert [path.name for path in sorted((cache_root / "failed").iterdir())] == ["f2", "f3", "f4"]
    assert cache.failed("f2").is_dir(), "the one that is asked for stays"
    cache.clear()
    assert list((cache_root / "failed").iterdir()) == []


def test_folders_of_others_in_the_cache_folder_are_left_alone(cache_root: Path) -> None:
    (cache_root / "theirs" / "folder").mkdir(parents=True)
    cache.clear()
    assert (cache_root / "theirs" / "folder").is_dir()
