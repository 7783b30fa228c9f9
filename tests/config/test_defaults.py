"""docs/defaults.md: every default next to TRL's and OpenRLHF's, with a reason if it differs."""

import pytest

from reinforcepp.config import ReinforceConfig, RewardModelConfig, SftConfig
from scripts import ROOT, benchmark

page = benchmark("default_settings")
CONFIGS = (ReinforceConfig, RewardModelConfig, SftConfig)


@pytest.mark.parametrize("config_class", CONFIGS)
def test_exactly_the_defaults_that_differ_have_a_reason(config_class):
    rows = {row.setting: row for row in page.rows(config_class)}
    reasons = page.REASONS[config_class].keys()
    assert {name for name, row in rows.items() if row.needs_reason} <= reasons
    assert reasons <= {name for name, row in rows.items() if row.differs}


def test_the_defaults_are_those_of_the_classes():
    policy = {row.setting: row for row in page.rows(ReinforceConfig)}
    assert policy["batch_size"].theirs == {"TRL GRPO": "1", "TRL RLOO": "4", "OpenRLHF": "1024"}
    assert policy["kl_coef"].theirs == {"TRL GRPO": "0", "TRL RLOO": "0.05", "OpenRLHF": "0.01"}
    assert policy["importance_high"][1:] == ("2", {"TRL GRPO": "3", "OpenRLHF": "5"})
    assert policy["dual_clip"].theirs == {"TRL GRPO": "none", "OpenRLHF": "none"}
    sft = {row.setting: row for row in page.rows(SftConfig)}
    assert (sft["learning_rate"].theirs, sft["keep_last"].theirs) == (
        {"TRL": "2e-05", "OpenRLHF": "5e-06"},
        {"TRL": "all", "OpenRLHF": "3"},
    )


def test_the_measurements_exist():
    reasons = " ".join(text for config_class in CONFIGS for text in page.REASONS[config_class].values())
    named = {word.strip("(),.`") for word in reasons.split() if ".json" in word}
    assert named and all((ROOT / "benchmarks/results" / name).is_file() for name in named)
