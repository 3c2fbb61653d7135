import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread():
    """Small products on many threads spend their time waiting for each other; the tests that are about threads set their own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
