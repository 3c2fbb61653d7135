from __future__ import annotations

import torch
import toys

from kvcompile.models.weights_hash import weights_hash


def test_equal_weights_have_an_equal_hash_and_others_another():
    one, same, other = toys.llama(layers=1), toys.llama(layers=1), toys.llama(layers=1, seed=1)
    assert weights_hash(one) == weights_hash(same) != weights_hash(other)
    assert len(weights_hash(one)) == 64
    with torch.no_grad():
        next(same.parameters()).view(-1)[0] += 1
    assert weights_hash(one) != weights_hash(same)
    assert weights_hash(one) != weights_hash(toys.llama(layers=1).bfloat16())


def test_a_buffer_counts_and_so_do_names():
    class Held(torch.nn.Module):
        def __init__(self, name: str, value: float) -> None:
            super().__init__()
            self.register_buffer(name, torch.tensor(value), persistent=False)

    assert len({weights_hash(Held(*given)) for given in (("a", 1.0), ("a", 2.0), ("b", 1.0))}) == 3
