import pytest

pytest.register_assert_rewrite("rollout.contract")
