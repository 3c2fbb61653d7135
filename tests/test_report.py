"""The plan as text, table and JSON; the report's files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kvcompile.ir.errors import KvcompileError
from kvcompile.ir.plan import HeadGroup, Plan, SitePlan
from kvcompile.ir.policy import All, HeadPolicy, Sample, SinkRecent, Store, TopK
from kvcompile.ir.sites import AttentionSite
from kvcompile.report import fold_sites, format_bytes, format_tokens, plan_dict, plan_remarks, plan_text, write_report

FULL = HeadPolicy("full", (All(),))
STREAMING = HeadPolicy("streaming", (SinkRecent(16, 256),))


def site(index: int, *groups: HeadGroup) -> SitePlan:
    facts = AttentionSite(index, f"model.layers.{index}.self_attn", 9, 3, 64, 64, 0.125, "bfloat16")
    return SitePlan(facts, groups)


def plan() -> Plan:
    mixed = [site(n, HeadGroup((n,), FULL), HeadGroup(tuple({0, 1, 2} - {n}), STREAMING)) for n in range(3)]
    return Plan((*mixed, site(3, HeadGroup((0, 1, 2), FULL))), weight_bytes=2 * 1024**2, context_tokens=8192, notes=("a note",))


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (1024**2 - 1, "1.0 MiB"), (5 * 1024**3, "5.0 GiB")],
)
def test_bytes_are_told_in_binary_units(count: int, text: str) -> None:
    assert format_bytes(count) == text


def test_tokens_are_told_in_k() -> None:
    assert [format_tokens(count) for count in (1, 1000, 1024, 131072)] == ["1", "1000", "1K", "128K"]


def test_equal_layers_fold_whichever_heads_they_chose() -> None:
    assert [[each.site.index for each in run] for run in fold_sites(plan())] == [[0, 1, 2], [3]]


def test_layers_of_another_store_do_not_fold() -> None:
    narrow = HeadPolicy("full", (All(),), store=Store("float16"))
    two = Plan((site(0, HeadGroup((0, 1, 2), FULL)), site(1, HeadGroup((0, 1, 2), narrow))))
    assert len(fold_sites(two)) == 2


def test_the_text_of_a_plan() -> None:
    """One KV head costs 256 bytes a token: stored at 8K 256 + 2 * 256 * 272 / 8192 = 273, read 8192 * 256 + 2 * 272 * 256 = 2.1 MiB."""
    expected = """\
Each layer: bytes stored for a token of context, bytes read for a generated token
layers  KV heads                                    8K stored  8K read
------  ------------------------------------------  ---------  -------
0-2     1 full, 2 streaming (sink 16 + recent 256)      273 B  2.1 MiB
3       3 full                                          768 B  6.0 MiB

The model: bytes of a session
context  full cache    stored  less by  stored a token  read a token  less by
-------  ----------  --------  -------  --------------  ------------  -------
8K         24.0 MiB  12.4 MiB     1.9x         1.5 KiB      12.4 MiB     1.9x

weights: 2.0 MiB
the model was made for 8K tokens
note: a note
"""
    assert plan_text(plan(), [8192]) + "\n" == expected


def test_totals_compare_with_the_full_cache() -> None:
    [at_8k] = plan_dict(plan(), [8192])["contexts"]
    full = 4 * 3 * 256 * 8192
    stored = (3 * 1 + 3) * 256 * 8192 + 3 * 2 * 256 * 272
    assert (at_8k["full_bytes"], at_8k["stored_bytes"], at_8k["read_bytes_per_generated_token"]) == (full, stored, stored)
    assert at_8k["stored_bytes_per_context_token"] == stored / 8192


def test_a_plan_on_disk_tells_memory_and_disk_apart() -> None:
    """A layer of 3 KV heads costs 768 bytes a token; in memory one block of 256 tokens, 24 bytes a token of 8192."""
    far = HeadPolicy("far", (All(),), device="disk")
    on_disk = Plan((site(0, HeadGroup((0, 1, 2), far, device="disk")), site(1, HeadGroup((0, 1, 2), STREAMING))))
    text = plan_text(on_disk, [8192])
    assert "Each layer: bytes stored for a token of context, in memory and on disk, bytes read for a generated token" in text
    assert "layers  KV heads                            8K stored  8K on disk    8K read" in text
    assert "0       3 far (all on disk)                      24 B       768 B    6.0 MiB" in text
    assert "1       3 streaming (sink 16 + recent 256)       26 B         0 B  204.0 KiB" in text
    assert "context  full cache     stored  less by  stored a token  on disk a token  read a token  less by" in text
    assert "8K         12.0 MiB  396.0 KiB    31.0x            50 B            768 B       6.2 MiB     1.9x" in text
    assert "blocks from the disk are read into 768.0 KiB of memory, once for all sessions" in text
    found = plan_dict(on_disk, [8192])
    assert found["contexts"][0]["disk_bytes"] == 8192 * 768 and found["sites"][0]["disk_bytes"] == {"8192": 8192 * 768}


def test_remarks_tell_which_contexts_lie_beyond_the_model() -> None:
    assert plan_remarks(plan(), [4096, 32768]) == [
        "weights: 2.0 MiB",
        "the model was made for 8K tokens; bytes at 32K are computed all the same",
        "note: a note",
    ]
    assert plan_remarks(plan(), [4096])[1] == "the model was made for 8K tokens"


@pytest.mark.parametrize(
    ("index", "longer"), [("roargraph", ["4.4 times at 8K", "1.8 times at 32K"]), ("hnsw", ["1.7 times at 8K"]), ("sketch", [])]
)
def test_remarks_tell_of_indexes_that_take_longer_than_the_prompt(index: str, longer: list[str]) -> None:
    policy = HeadPolicy("lookup", (SinkRecent(64, 256), TopK(100, index)))
    looked_up = Plan(tuple(site(n, HeadGroup((0, 1, 2), policy)) for n in range(30)), weight_bytes=2 * 134_515_008)
    told = [remark for remark in plan_remarks(looked_up, [256, 8192, 32768, 131072]) if "longer than reading" in remark]
    assert len(told) == bool(longer)
    assert all(each in told[0] for each in longer) and "256" not in "".join(told) and "128K" not in "".join(told)


def test_remarks_tell_what_is_expected_of_keys_that_are_drawn() -> None:
    policy = HeadPolicy("magicpig", (SinkRecent(4, 64), Sample()))
    drawn = Plan(tuple(site(n, HeadGroup((0, 1, 2), policy)) for n in range(3)), weight_bytes=2 * 134_515_008)
    told = [remark for remark in plan_remarks(drawn, [8192]) if "drawn" in remark]
    assert told == [
        "sample by lsh hash_bits=10 tables=150: how many keys are drawn is known only when they are; read bytes count 2.33% of those "
        "between sinks and window, as where keys of 64 dimensions lie in all directions alike"
    ]
    assert not [remark for remark in plan_remarks(drawn, [8192]) if "longer than reading" in remark]
    many = replace(policy, zones=(policy.zones[0], Sample(16, 1024)))
    slow = replace(drawn, sites=tuple(site(n, HeadGroup((0, 1, 2), many)) for n in range(30)))
    assert 0.3 < slow.build_share(8192) < 1 and 0.001 < drawn.build_share(8192) < 0.1
    indexed = (8192 - 32 - 68) // 32 * 32
    group, facts = drawn.sites[0].groups[0], drawn.sites[0].site
    exact = 8192 - indexed + 3 * round(0.0232790 * indexed)
    scanned = 3 * (2 * 150 / 1024 + 0.25) * indexed + 3 * 4 * 150
    assert group.read_bytes(facts, 8192) == pytest.approx(3 * (exact * 256 + scanned) + 4 * 1504 * 64, rel=1e-4)
    assert group.stored_bytes(facts, 8192) > 3 * (8192 * 256 + 300 * (indexed + 1024))


def test_the_json_of_a_plan_names_every_head() -> None:
    found = json.loads(json.dumps(plan_dict(plan(), [8192])))
    assert [group["kv_heads"] for group in found["sites"][1]["groups"]] == [[1], [0, 2]]
    assert found["sites"][0]["groups"][1]["zones"] == ["sink 16 + recent 256"]
    assert found["sites"][0]["groups"][0]["store_dtype"] == "bfloat16"


def test_a_report_is_two_files_and_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "a" / "b"
    for text in ("first", "second"):
        assert write_report(folder, {"n": text}, text) == [folder / "report.json", folder / "report.txt"]
    assert sorted(path.name for path in folder.iterdir()) == ["report.json", "report.txt"]
    assert (folder / "report.txt").read_text() == "second\n"


def test_a_report_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    write_report(tmp_path, {"n": 1}, "old")
    with pytest.raises(TypeError):
        write_report(tmp_path, {"n": object()}, "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.txt"]
    assert (tmp_path / "report.txt").read_text() == "old\n"


def test_a_folder_that_cannot_be_made_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KvcompileError, match=r"the report cannot be written: Not a directory\.\n  Name another folder with -o\."):
        write_report(tmp_path / "file" / "folder", {}, "")
