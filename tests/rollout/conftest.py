import pytest

pytest.register_assert_rewrite("rollout.contract")


def pytest_configure(config):
    config.addinivalue_line("markers", "gpu: needs a CUDA device, and is skipped where there is none")
