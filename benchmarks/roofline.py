"""How fast this machine reads memory: 1 GiB once, with vector loads, on 1 thread and on as many as torch takes.

python benchmarks/roofline.py
"""

from __future__ import annotations

import torch
from harness import in_turn, median, pure_read, write

BYTES = 1 << 30
ROUNDS = 15


def main() -> None:
    threads = torch.get_num_threads()
    buffer = torch.ones(BYTES // 8, dtype=torch.int64)
    engines = {str(count): pure_read([buffer], count) for count in sorted({1, threads})}
    seconds = in_turn(engines, ROUNDS)
    rates = {name: BYTES / median(found) / 1e9 for name, found in seconds.items()}
    for name, rate in rates.items():
        print(f"{name} thread{'s' if name != '1' else ' '}  {rate:5.1f} GB/s  (fastest {BYTES / min(seconds[name]) / 1e9:.1f})")
    write("roofline", threads, {"bytes": BYTES, "rounds": ROUNDS, "GB/s by threads": rates})


if __name__ == "__main__":
    main()
