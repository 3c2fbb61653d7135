from __future__ import annotations

import toys
from units import after, learnt, texts

from kvcompile.ir.show import difference


def test_each_group_asks_for_a_kernel(golden):
    golden("request_kernels", learnt("request_kernels", toys.planted(), heads=[{"policy": "short", "kv_heads": 0}]))


def test_the_graph_is_not_touched():
    assert difference(*texts("request_kernels", toys.planted())) == ""


def keys(unit) -> list[list[str]]:
    return [[group.request.key for group in site.groups] for site in unit.plan.sites]


def test_equal_layers_share_one_kernel():
    found = keys(after("request_kernels", toys.llama(layers=3), heads=[{"policy": "short", "kv_heads": 1}]))
    assert len({tuple(site) for site in found}) == 1
    assert len(set(found[0])) == 2


def test_what_a_kernel_must_know_is_in_its_request():
    sliding, full = (site.groups[0].request for site in after("request_kernels", toys.gemma2()).plan.sites)
    assert (sliding.sink_tokens, sliding.recent_tokens, full.recent_tokens) == (0, 8, None)
    assert (sliding.soft_cap, sliding.scale, sliding.queries_per_kv) == (5.0, 2**-0.5, 2)
    sinks = [site.groups[0].request.learnt_sinks for site in after("request_kernels", toys.gpt_oss()).plan.sites]
    assert sinks == [True, True]


def test_a_store_of_another_dtype_is_another_kernel():
    policies = {"half": {"zones": ["all"], "store": "bfloat16"}}
    unit = after("request_kernels", toys.llama(layers=2), policies=policies, heads=[{"policy": "half", "layers": 1}])
    one, two = (site.groups[0].request for site in unit.plan.sites)
    assert (one.store_dtype, two.store_dtype, two.compute_dtype) == ("float32", "bfloat16", "float32")
    assert one.key != two.key


def test_where_keys_are_found_prompts_and_single_tokens_ask_for_a_kernel_each():
    window = {"sink_recent": {"sink_tokens": 4, "recent_tokens": 12}}
    zones = {
        "sketch": {"top_k": {"k": 9, "index": "sketch"}},
        "flat": {"top_k": {"k": 9, "index": "flat"}},
        "static": {"static": {"keys": 9}},
    }
    found = {}
    for name, zone in zones.items():
        for store in ("bfloat16", "int8"):
            policies = {"mine": {"zones": [window, zone], "store": store}}
            unit = after("request_kernels", toys.llama(layers=1), policies=policies, heads=[{"policy": "mine"}])
            ((found[name, store],),) = (site.groups for site in unit.plan.sites)
    request = found["sketch", "bfloat16"].request
    assert (request.key_layout, request.recent_tokens, request.store_dtype) == ("rows", None, "bfloat16")
    assert request == found["flat", "bfloat16"].request == found["static", "bfloat16"].request
    assert found["sketch", "bfloat16"].lookup is not None
    assert found["flat", "bfloat16"].lookup is found["static", "bfloat16"].lookup is None
    for name in zones:
        assert found[name, "int8"].requests == ()  # torch reads them
