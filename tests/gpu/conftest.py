"""These tests need a CUDA GPU and are skipped, saying so, where there is none."""

import pytest
import torch


@pytest.fixture(autouse=True)
def gpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, and none is visible")
    yield
    torch.cuda.empty_cache()  # the workers share one GPU's memory


def pytest_runtest_setup(item):
    wanted = item.get_closest_marker("free_gib")
    if wanted is not None and torch.cuda.is_available():
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < wanted.args[0]:
            pytest.skip(f"needs {wanted.args[0]} GiB of free GPU memory, there are {free:.0f}")


def pytest_configure(config):
    config.addinivalue_line("markers", "free_gib(n): needs n GiB of free GPU memory")
