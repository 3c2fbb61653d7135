"""What heads find, measured on keys made by hand, on toy models, and as a command."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from torch import Tensor

import kvcompile
from kvcompile.cli import main
from kvcompile.heat_map import Cell, heat_map, opacity, percent
from kvcompile.ir.errors import KvcompileError, SpecError
from kvcompile.ir.plan import HeadGroup, Plan
from kvcompile.ir.policy import All, HeadPolicy, Select, SinkRecent, TopK
from kvcompile.ir.sites import AttentionSite
from kvcompile.recall import HeadRecall, Recall, cache_tokens, check_text, held_out, measure_group, measure_recall
from kvcompile.runtime import reference
from kvcompile.runtime.growable import GrowableStore
from kvcompile.runtime.indexes.flat import FlatIndex
from kvcompile.runtime.indexes.index import Found, Keys
from kvcompile.runtime.lookup import LookupStore

TOKENS, SINKS, RECENT, DIM = 1000, 8, 24, 4
COVERED = TOKENS - SINKS - RECENT  # 968, of which whole blocks are 960
LOGIT = 5.0
CAP = 4.0


class Misses(FlatIndex):
    """Finds what it is told to."""

    def __init__(self, positions: list[int], soft_cap: float | None = None) -> None:
        super().__init__(SINKS, SINKS + 960, soft_cap, 0)
        self.positions = positions

    def search(self, query_HGD: Tensor, k: int, select: Select, keys: Keys) -> Found:
        return Found(torch.tensor(self.positions).expand(*query_HGD.shape[:2], -1), k)

    def nbytes(self) -> int:
        return 4000

    def scanned_bytes(self, tail: bool, k: int) -> int:
        return 640


def planted(index: FlatIndex | None, soft_cap: float | None = None, sinks: Tensor | None = None) -> HeadRecall:
    """One KV head, one query head: keys 100, 200, 300 and 400 have the logit LOGIT and values of 1, all others 0 and values of 0."""
    site = AttentionSite(3, "attention", 1, 1, DIM, DIM, 0.5, "float32", soft_cap=soft_cap)
    zone = TopK(4, "flat", select="per_query_head")
    group = HeadGroup((0,), HeadPolicy("lookup", (SinkRecent(SINKS, RECENT), zone)))
    store = LookupStore(GrowableStore(1, DIM, DIM, torch.float32, TOKENS), SinkRecent(SINKS, RECENT), zone, 1, 0.5, soft_cap)
    store.index = index
    key_HTD, value_HTE = torch.zeros(1, TOKENS, DIM), torch.zeros(1, TOKENS, DIM)
    key_HTD[0, 100:500:100, 0] = 1.0
    value_HTE[0, 100:500:100] = 1.0
    asked_HGND = torch.zeros(1, 1, 2, DIM)
    asked_HGND[..., 0] = LOGIT / 0.5
    [found], _ = measure_group(site, group, store, key_HTD, value_HTE, asked_HGND, sinks)
    return found


def error(weight: float, seen: int, zeros: int, extra: float = 0.0) -> float:
    """Of attention to `seen` of the four and to `zeros` others, against attention to all: the values are 1 and 0."""
    exact = 4 * weight / (4 * weight + TOKENS - 4 + extra)
    return 1 - seen * weight / (seen * weight + zeros + extra) / exact


def test_an_index_that_misses_half_has_a_recall_of_a_half():
    found = planted(Misses([100, 150, 300, 350]))
    assert (found.layer, found.kv_head, found.k, found.recall) == (3, 0, 4, 0.5)
    assert found.output_error == pytest.approx(abs(error(math.exp(LOGIT), 2, TOKENS - 960 + 2)), rel=1e-5)
    assert found.scanned_share == pytest.approx((TOKENS - 960 + 4) / TOKENS + 640 / (TOKENS * 2 * DIM * 4))
    assert found.index_bytes == 4000


def test_what_was_not_found_counts_as_missed_and_rows_are_those_found():
    found = planted(Misses([100, -1, -1, -1]))
    assert found.recall == 0.25
    assert found.scanned_share == pytest.approx((TOKENS - 960 + 1) / TOKENS + 640 / (TOKENS * 2 * DIM * 4))


def test_caps_and_learnt_sinks_join_both_sides():
    weight = math.exp(CAP * math.tanh(LOGIT / CAP))
    found = planted(Misses([100, 150, 300, 350], CAP), CAP)
    assert found.output_error == pytest.approx(abs(error(weight, 2, TOKENS - 960 + 2)), rel=1e-5)
    found = planted(Misses([100, 150, 300, 350]), sinks=torch.full((1, 1), 6.0))
    assert found.output_error == pytest.approx(abs(error(math.exp(LOGIT), 2, TOKENS - 960 + 2, math.exp(6.0))), rel=1e-5)


def test_flat_finds_all_and_its_error_is_that_of_leaving_out_the_rest():
    found = planted(None)
    assert found.recall == 1.0
    assert found.output_error == pytest.approx(abs(error(math.exp(LOGIT), 4, TOKENS - 960)), rel=1e-5)
    assert found.scanned_share == pytest.approx((TOKENS - 960 + 4 + 960 / 2) / TOKENS)
    assert found.build_s > 0


def test_of_equal_keys_any_is_right():
    """The last two of six are any two of the keys whose logit is 0, though 8 and 9 are the first of them."""
    zone = TopK(6, "flat", select="per_query_head")
    site = AttentionSite(0, "attention", 1, 1, DIM, DIM, 0.5, "float32")
    group = HeadGroup((0,), HeadPolicy("lookup", (SinkRecent(SINKS, RECENT), zone)))
    store = LookupStore(GrowableStore(1, DIM, DIM, torch.float32, TOKENS), SinkRecent(SINKS, RECENT), zone, 1, 0.5, None)
    store.index = Misses([100, 150, 200, 300, 350, 400])
    key_HTD = torch.zeros(1, TOKENS, DIM)
    key_HTD[0, 100:500:100, 0] = 1.0
    [found], _ = measure_group(site, group, store, key_HTD, torch.ones(1, TOKENS, DIM), torch.ones(1, 1, 1, DIM))
    assert found.recall == 1.0
    assert found.output_error < 1e-6  # all values are equal


def test_held_out_queries_lie_in_the_last_eighth():
    assert cache_tokens(4096) == 3584
    asked = held_out(4096)
    assert (asked[0], asked[-1], len(asked)) == (3584, 3584 + 31 * 16, 32)
    assert held_out(17) == [15, 16]


POLICY = HeadPolicy("lookup", (SinkRecent(64, 256), TopK(0.01, "sketch", tail=True)))


def test_a_short_text_is_told_how_long_it_must_be():
    needed = next(count for count in range(2000) if cache_tokens(count) >= 64 + 256 + 512)
    check_text([POLICY], needed, "--text a.txt")
    with pytest.raises(KvcompileError, match=rf"^--text a.txt: 400 tokens are too few .* needs {needed} \(512 keys .*\n  Give"):
        check_text([POLICY], 400, "--text a.txt")
    with pytest.raises(KvcompileError, match=f"at least {needed} tokens"):
        check_text([POLICY], needed - 1, "text")


@pytest.mark.parametrize(("k", "told"), [(2000, "needs 26[0-9]{2} "), (1.0, "k of policy lookup asks for every key.*\n  Write a smaller")])
def test_a_k_that_takes_every_key_needs_a_longer_text_or_none_will_do(k: int | float, told: str):
    policy = replace(POLICY, zones=(POLICY.zones[0], TopK(k, "sketch")))
    with pytest.raises(KvcompileError, match=told):
        check_text([policy], 1500, "text")


def spec(index: str = "flat", kernels: str = "torch", **zone: object) -> dict[str, Any]:
    top_k = {"k": "2%", "index": index, **zone}
    return {
        "kvcompile": 1,
        "policies": {"find": {"zones": [{"sink_recent": {"sink_tokens": 4, "recent_tokens": 32}}, {"top_k": top_k}]}},
        "heads": [{"policy": "find"}],
        "verify": {"tokens": 16},
        "target": {"segments": "eager", "kernels": kernels},
        "prefill": {"chunk_tokens": 300},
    }


IDS = torch.randint(0, 256, (900,), generator=torch.Generator().manual_seed(1))


@pytest.mark.slow
def test_flat_recalls_everything_in_a_model_with_caps_and_windows(own_cache):
    found = measure_recall(kvcompile.compile(toys.gemma2(), spec()), IDS)
    assert [(head.layer, head.kv_head, head.recall) for head in found.heads] == [(1, 0, 1.0), (1, 1, 1.0)]
    assert found.not_looked_up == "layer 0 (window 8)"
    assert found.shape == (2, 2)
    assert (found.tokens, found.cache_tokens, found.queries) == (900, 788, 32)


class Oracle:
    """A memory of one call that reads the whole text; keeps queries [H, G, T, D], keys, values and learnt sinks [H, G] of each site."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.seen: dict[int, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def attend(self, site: int, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, *others: Any) -> Tensor:
        facts = self.plan.sites[site].site
        by_head = (facts.kv_heads, facts.queries_per_kv)
        query_HGTD, positions = query[0].unflatten(0, by_head), torch.arange(query.shape[2])
        seen = reference.visible(SinkRecent(0, facts.own_window) if facts.own_window else All(), positions, positions)
        state = reference.attend(query_HGTD, key[0], value[0], seen, facts.scale, facts.soft_cap)
        sinks_HG = torch.full(by_head, -torch.inf) if sinks is None else sinks.unflatten(0, by_head)
        self.seen[site] = (query_HGTD, key[0], value[0], sinks_HG)
        return reference.apply_learnt_sinks(state, sinks_HG).out.permute(2, 0, 1, 3).flatten(1, 2)[None].to(query.dtype).contiguous()

    @torch.no_grad()
    def error(self, site: int, head: int, tokens: int, k: int) -> float:
        """Of reading the k largest logits of each query head beside 4 sinks and at least 32 recent tokens."""
        query_HGTD, key_HTD, value_HTE, sinks_HG = (each.double() for each in self.seen[site])
        cache, facts = cache_tokens(tokens), self.plan.sites[site].site
        end = 4 + (cache - 32 - 4) // 32 * 32
        errors = []
        for position in held_out(tokens):
            logit_GT = query_HGTD[head, :, position] @ key_HTD[head, :cache].T * facts.scale
            read_GT = torch.zeros_like(logit_GT, dtype=torch.bool)
            read_GT.scatter_(1, 4 + logit_GT[:, 4:end].topk(k, 1).indices, True)
            read_GT[:, :4] = read_GT[:, end:] = True
            outs = []
            for seen_GT in (torch.ones_like(read_GT), read_GT):
                weight_GT = torch.softmax(torch.cat([logit_GT.masked_fill(~seen_GT, -torch.inf), sinks_HG[head, :, None]], 1), 1)[:, :-1]
                outs.append(weight_GT @ value_HTE[head, :cache])
            errors.append((outs[0] - outs[1]).norm(dim=1) / outs[0].norm(dim=1))
        return float(torch.cat(errors).mean())


@pytest.mark.slow
@pytest.mark.parametrize(("made", "kernels"), [(toys.llama, "generated"), (toys.gpt_oss, "torch")])
def test_the_error_is_that_of_the_models_own_queries_keys_and_sinks(made, kernels, own_cache):
    """The text is read in chunks of 300, its queries in two of them."""
    lines: list[str] = []
    compiled = kvcompile.compile(made(), spec(kernels=kernels, select="per_query_head"))
    found = measure_recall(compiled, IDS, progress=lines.append)
    oracle = Oracle(compiled.plan)
    with torch.no_grad():
        compiled.program.run(IDS[None], torch.arange(len(IDS))[None], oracle, None)
    assert found.heads
    for head in found.heads:
        assert head.recall == 1.0
        assert head.output_error == pytest.approx(oracle.error(head.layer, head.kv_head, len(IDS), head.k), rel=1e-3)
    assert "reading the text: 600 of 900 tokens" in lines


def test_a_sketch_is_measured_beside_heads_that_keep_everything(own_cache):
    asked = spec("sketch", tail=True, select="union")
    asked["heads"] = [{"policy": "find", "layers": [0, 2]}, {"policy": "find", "layers": 1, "kv_heads": 1}]
    found = measure_recall(kvcompile.compile(toys.llama(), asked), IDS)
    assert [(head.layer, head.kv_head) for head in found.heads] == [(0, 0), (0, 1), (1, 1), (2, 0), (2, 1)]
    assert found.not_looked_up == "layer 3 (full); 1 KV head of layer 1 (full)"
    assert all(0.3 < head.recall < 1 and 0 < head.output_error < 0.5 and head.scanned_share < 0.5 for head in found.heads)
    assert all(head.index_bytes > 0 for head in found.heads)
    assert found.worst.output_error == max(head.output_error for head in found.heads)


def test_keys_that_are_drawn_are_measured_too(own_cache):
    asked = spec()
    asked["policies"]["find"]["zones"][1] = {"sample": {"lsh": {"hash_bits": 3, "tables": 40}}}
    found = measure_recall(kvcompile.compile(toys.llama(), asked), IDS)
    assert len(found.heads) == 8
    for head in found.heads:
        assert 0.5 < head.recall <= 1 and 100 < head.k < 752 and 0 < head.output_error < 0.7
        assert head.scanned_share > head.k / 900 and head.index_bytes > 700 * 2 * 40


def test_a_model_without_heads_that_look_up_is_refused(own_cache):
    asked = spec()
    asked["heads"] = [{"policy": "find", "layers": 0}]
    compiled = kvcompile.compile(toys.gemma2(), asked)  # whose layer 0 keeps its window
    with pytest.raises(SpecError, match="no KV head of this model has a policy with a top_k, clusters or sample zone"):
        measure_recall(compiled, IDS)


RECALL = Recall(
    (HeadRecall(0, 0, "find", 20, 0.9, 0.02, 0.1, 2048, 0.1), HeadRecall(2, 1, "find", 20, 0.7, 0.2, 0.12, 2048, 0.1)),
    1600,
    1400,
    32,
    (2, 1, 2),
    "layer 1 (window 8); 2 KV heads of layers 0, 2 (full)",
)


def test_the_summary_names_mean_and_worst():
    assert RECALL.summary() == (
        "2 KV heads: recall@k 0.800, output error 0.1100, 11.0% of full attention's bytes read; indexes 4.0 KiB, built in 0.2 s; "
        "worst: layer 2, KV head 1, output error 0.2000, recall@k 0.700"
    )


def test_the_picture_has_a_cell_for_every_kv_head():
    root = ElementTree.fromstring(RECALL.picture())
    space = "{http://www.w3.org/2000/svg}"
    cells = {group.find(f"{space}title").text: group for group in root.iter(f"{space}g")}  # type: ignore[union-attr]
    kinds = {title: group.find(f"{space}rect").get("class") for title, group in cells.items()}  # type: ignore[union-attr]
    assert sorted(kinds.values()) == ["heat", "heat", "none", "none", "none"]
    told = "layer 2, KV head 1: find: output error 20 %, recall@k 0.700, read 12 %"
    assert cells[told].find(f"{space}text").text == "20"  # type: ignore[union-attr]
    assert kinds["layer 1, KV head 0: not looked up"] == "none"
    assert "prefers-color-scheme: dark" in RECALL.picture()


def test_more_error_is_more_colour_up_to_the_scales_ends():
    assert [opacity(value) for value in (0.0, 1e-2, 1.0, 7.0)] == [0.06, 0.06, 0.85, 0.85]
    assert opacity(0.02) < opacity(0.1) < opacity(0.5)
    assert opacity(0.4) - opacity(0.2) == pytest.approx(opacity(0.2) - opacity(0.1), abs=2e-3)
    assert [percent(value) for value in (0.0004, 0.00996, 0.0994, 0.0996, 1.2)] == ["0.04", "1.0", "9.9", "10", "120"]


def test_a_title_is_text_whatever_it_holds():
    root = ElementTree.fromstring(heat_map("a < b & c", "layer", "KV head", [Cell(0, 0, 0.5, "<x>")]))
    assert [each.text for each in root.iter("{http://www.w3.org/2000/svg}title")] == ["a < b & c", "layer 0, KV head 0: <x>"]


# --- the command ---------------------------------------------------------------------------------------------------------------------

MODEL = '''
import torch
from transformers import LlamaConfig, LlamaForCausalLM

class Bytes:
    """One token a byte."""
    chat_template = None
    eos_token_id = None
    def __call__(self, text, **_options):
        return {"input_ids": list(text.encode())}

def bare():
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=1800, bos_token_id=None, eos_token_id=None)
    return LlamaForCausalLM(config)

def build():
    return bare(), Bytes()
'''
SPEC = """kvcompile: 1
model: {path: "python:kvc_tiny_recall:build"}
policies:
  find:
    zones: [{sink_recent: {sink_tokens: 4, recent_tokens: 64}}, {top_k: {k: 2%, index: sketch, tail: true}}]
heads:
  - {policy: find, layers: 1}
verify: {tokens: 16}
target: {segments: eager, kernels: torch}
"""
TEXT = " ".join(f"Line {number} says {number * number % 97}." for number in range(400))


@pytest.fixture
def asked(tmp_path: Path, own_cache: Path) -> tuple[Path, Path]:
    (tmp_path / "kvc_tiny_recall.py").write_text(MODEL)
    (tmp_path / "tiny.yaml").write_text(SPEC)
    (tmp_path / "text.txt").write_text(TEXT)
    return tmp_path / "tiny.yaml", tmp_path / "text.txt"


def answer(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["recall", *map(str, words)])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_text_is_measured_printed_and_drawn(capsys: pytest.CaptureFixture[str], asked: tuple[Path, Path], tmp_path: Path) -> None:
    code, out, err = answer(capsys, asked[0], "--text", asked[1], "-o", tmp_path / "out")
    assert code == 0, err
    lines = out.splitlines()
    assert lines[0] == "32 held-out queries over a cache of 1575 tokens"  # of 1800, which the model was made for
    assert lines[1].split() == ["layer", "KV", "head", "policy", "k", "recall@k", "output", "error", "read", "index", "build"]
    assert [line.split()[:4] for line in lines[3:5]] == [["1", "0", "find", "32"], ["1", "1", "find", "32"]]
    assert lines[-2] == "not looked up: layer 0 (full)"
    assert lines[-1].startswith("2 KV heads: recall@k 0.")
    assert "kvcompile: reading the text: 1800 of 1800 tokens" in err
    assert f"wrote {tmp_path / 'out' / 'recall.json'}, " in err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["recall.json", "recall.svg", "recall.txt"]
    written = json.loads((tmp_path / "out" / "recall.json").read_text())
    assert (written["tokens"], written["query_kind"], len(written["heads"])) == (1800, "held-out", 2)
    assert out in (tmp_path / "out" / "recall.txt").read_text().replace("\n\n", "\n")
    ElementTree.parse(tmp_path / "out" / "recall.svg")


def test_json_is_one_object_and_tokens_cuts_the_text(capsys: pytest.CaptureFixture[str], asked: tuple[Path, Path]) -> None:
    code, out, err = answer(capsys, asked[0], "--text", asked[1], "--tokens", 1000, "--json")
    found = json.loads(out)
    assert code == 0, err
    assert (found["tokens"], found["cache_tokens"], found["queries"]) == (1000, 875, 32)
    assert found["summary"]["recall"] == pytest.approx(sum(head["recall"] for head in found["heads"]) / 2)
    assert "written" not in found


def test_quiet_prints_no_table(capsys: pytest.CaptureFixture[str], asked: tuple[Path, Path]) -> None:
    code, out, err = answer(capsys, asked[0], "--text", asked[1], "--tokens", 1000, "-q")
    assert (code, err, len(out.splitlines())) == (0, "", 2)


def test_what_cannot_be_measured_is_said_before_the_compile(capsys: pytest.CaptureFixture[str], asked: tuple[Path, Path]) -> None:
    spec, text = asked
    missing = text.with_name("no.txt")
    mend = "\n  Name a text file, or - for stdin.\n"
    assert answer(capsys, spec, "--text", missing)[::2] == (1, f"--text {missing}: cannot be read: No such file or directory.{mend}")
    code, _, err = answer(capsys, spec, "--text", text, "--tokens", 500)
    assert code == 1
    assert f"--text {text}: 500 tokens are too few to look anything up: policy find needs " in err
    code, _, err = answer(capsys, spec, "--text", text, "--set", "heads[0].policy=full")
    assert (code, err.partition("\n")[0].partition("heads: ")[2]) == (
        1,
        "no rule names a policy with a top_k, clusters or sample zone, so that there is nothing to look up.",
    )
    code, _, err = answer(capsys, spec, "--text", text, "--set", 'model.path="python:kvc_tiny_recall:bare"')
    assert code == 1
    assert "the model comes without a tokenizer, so no text can be read.\n  Put the tokenizer's files" in err


@pytest.mark.parametrize("words", [[], ["--text", "x", "--queries", "all"], ["--text", "x", "--tokens", "0"]])
def test_a_wrong_command_line_points_to_the_help(capsys: pytest.CaptureFixture[str], asked: tuple[Path, Path], words: list[str]) -> None:
    code, out, err = answer(capsys, asked[0], *words)
    assert (code, out) == (2, "")
    assert err.endswith("\n  See kvcompile recall --help.\n")
