"""64 forks behind a prefix of 4,096 tokens: what sessions count, and what the process takes, against the prefix and 64 tails.

SmolLM2-135M's shapes in bfloat16 (30 layers, 3 KV heads of 64), policy `full`, keys in blocks as the kernels read them; keys and values are
random numbers, for which no weights are needed.  A tail of 64 tokens fills two pages a head.  Of other lengths the last page of each head's
keys, and of its values, is filled in part, so whole pages are counted.  What remains are the Python and torch objects of 1,920 stores:
3.4 KiB each, 3.6 % where all of them take new pages (with malloc_trim before), far less where, as here, the heap has room from the trace.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/statm")

PREFIX, FORKS = 4096, 64
ROW_BYTES = 64 * 2  # of one head's key, or value
HEADS = 30 * 3 * 2  # of keys and of values

MEASURE = """
import gc, json, mmap, sys
import torch
from transformers import LlamaConfig
from kvcompile.compiler import make_plan
from kvcompile.runtime.model import CompiledModel
from kvcompile.runtime.native import NativeKernels
from kvcompile.runtime.program import Program
from kvcompile.spec import load_spec

def resident():
    gc.collect()
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE

folder, prefix, forks, tail = sys.argv[1], *map(int, sys.argv[2:])
sizes = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3}
LlamaConfig(vocab_size=49152, max_position_embeddings=8192, architectures=["LlamaForCausalLM"], **sizes).save_pretrained(folder)
spec = {"kvcompile": 1, "model": {"path": folder, "dtype": "bfloat16"}}
plan = make_plan(spec)
served = NativeKernels(frozenset(group.request.key for site in plan.sites for group in site.groups))
model = CompiledModel(Program((), {}, 0), plan, load_spec(spec), 49152, served)
key_HTD = torch.randn(3, 512, 64, dtype=torch.bfloat16)

def fill(session, tokens):
    for start in range(0, tokens, 512):
        part_HTD = key_HTD[:, : min(512, tokens - start)]
        for site in plan.sites:
            (store,) = session.stores(site.site.index)
            store.append(part_HTD, part_HTD)
            store.descriptor()  # what a step asks for

def run(prefix, forks, tail):
    base = model.session()
    fill(base, prefix)
    sessions = [base, *(base.fork() for _ in range(forks))]
    for session in sessions[1:]:
        fill(session, tail)
    return sessions

run(600, 2, tail)  # what torch and the allocator keep for themselves
before = resident()
sessions = run(prefix, forks, tail)
print(json.dumps([sum(session.nbytes() for session in sessions), resident() - before]))
"""


@pytest.mark.parametrize("tail", [64, 50])
def test_64_forks_behind_a_prefix_take_the_prefix_and_64_tails(tail, tmp_path, request):
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), str(PREFIX), str(FORKS), str(tail)],
        capture_output=True,
        text=True,
        check=False,
        cwd=request.config.rootpath,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},  # freed memory goes back at once
    )
    assert ran.returncode == 0, ran.stderr
    held, grown = json.loads(ran.stdout.splitlines()[-1])
    wanted = HEADS * (PREFIX + FORKS * tail) * ROW_BYTES
    pages = HEADS * (PREFIX * ROW_BYTES + FORKS * whole_pages(tail * ROW_BYTES))
    print(f"held {held}, wanted {wanted}; the process grew by {grown}, whole pages are {pages}")
    assert abs(held - wanted) <= 0.02 * wanted
    assert abs(grown - pages) <= 0.02 * pages


def whole_pages(nbytes: int) -> int:
    page = os.sysconf("SC_PAGESIZE")
    return -(-nbytes // page) * page
