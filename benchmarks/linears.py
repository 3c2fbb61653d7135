"""SmolLM2-135M's linear layers at one token, and what a step costs beside linear layers and attention.

    python benchmarks/linears.py [--dtype bfloat16] [--context 512]

Weights are those of the model, read once a step: 30 layers and lm_head.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from decode import ours
from harness import in_turn, median, pure_read, smollm2, smollm2_spec, write
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import kvcompile
from kvcompile.ir.request import LinearRequest
from kvcompile.link import GEMV_TOKENS

ROUNDS = 24


def groups(model: nn.Module) -> list[list[Tensor]]:
    """The weights of one step, those of one input together."""
    found = []
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        found += [[attention.q_proj, attention.k_proj, attention.v_proj], [attention.o_proj], [mlp.gate_proj, mlp.up_proj], [mlp.down_proj]]
    found.append([model.lm_head])
    return [[linear.weight.detach() for linear in group] for group in found]


def replay(all_weights: list[list[Tensor]], call: Callable[[Tensor, list[Tensor]], object]) -> Callable[[], None]:
    inputs = [torch.randn(1, 1, weights[0].shape[1]).to(weights[0].dtype) for weights in all_weights]

    def step() -> None:
        for x, weights in zip(inputs, all_weights, strict=True):
            call(x, weights)

    return step


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--context", type=int, default=512)
    options = parser.parse_args()
    threads = torch.get_num_threads()
    compiled = kvcompile.compile(smollm2_spec(options.dtype, None))
    key = compiled.kernels.name(LinearRequest("linears", "cpu", options.dtype, GEMV_TOKENS).key)
    weights = groups(smollm2(options.dtype).load())
    nbytes = sum(weight.nbytes for group in weights for weight in group)
    engines = {
        "read": pure_read([weight for group in weights for weight in group], threads),
        "ours": replay(weights, lambda x, group: torch.ops.kvc_native.linears(x, group, [], key)),
        "F.linear": replay(weights, lambda x, group: [F.linear(x, weight) for weight in group]),
    }
    seconds = {name: median(found) for name, found in in_turn(engines, ROUNDS).items()}
    step = ours(compiled, options.context)
    plain = median(in_turn({"step": step}, ROUNDS, warm=8)["step"])
    with profile(activities=[ProfilerActivity.CPU]) as profiled:  # slows what lies between the operators, not the operators
        for _ in range(ROUNDS):
            step()
    spent = {event.key: event.cpu_time_total / ROUNDS / 1e3 for event in profiled.key_averages()}
    linear_ms, attention_ms = spent["kvc_native::linears"], spent["kvc_native::attend"]
    result = {
        "bytes": nbytes,
        "ms": {name: 1e3 * found for name, found in seconds.items()},
        "GB/s": nbytes / seconds["ours"] / 1e9,
        "share of pure read": seconds["read"] / seconds["ours"],
        "times F.linear": seconds["F.linear"] / seconds["ours"],
        "step ms": 1e3 * plain,
        "of which": {"linear layers": linear_ms, "attention": attention_ms, "the rest": 1e3 * plain - linear_ms - attention_ms},
    }
    print(f"linear layers {1e3 * seconds['ours']:.1f} ms, {result['GB/s']:.1f} GB/s, {result['share of pure read']:.0%} of a pure read, "
          f"{result['times F.linear']:.1f} times F.linear")  # fmt: skip
    print(f"a step at {options.context} tokens {1e3 * plain:.1f} ms: linear layers {linear_ms:.1f}, attention {attention_ms:.1f}, "
          f"the rest {1e3 * plain - linear_ms - attention_ms:.1f}")  # fmt: skip
    write(f"linears_{options.dtype}", threads, {"rounds": ROUNDS, "context": options.context, **result})


if __name__ == "__main__":
    main()
