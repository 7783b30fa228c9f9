"""The engine in docs/python.md: training accepts it, and notices if it generates with other weights."""

import re

import pytest
import tiny
from small_trainer import PROMPTS, spread, trainer

from reinforcepp.errors import RolloutError
from scripts import ROOT

SECTION = (ROOT / "docs/python.md").read_text(encoding="utf-8").split("## Use your own engine")[1].split("\n## ")[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("base"), "llama"))


def engine_class():
    names = {}
    exec(re.search("```python\n(.*?)```", SECTION, re.DOTALL)[1], names)
    return names["GenerateEngine"]


def train(base, folder, engine):
    run = trainer(base, folder, spread, PROMPTS, arguments={"engine": engine}, learning_rate=0.05, sync_check_every=1)
    run.train()
    return run


def test_an_own_engine_trains(base, tmp_path):
    run = train(base, tmp_path / "run", engine_class()(base))
    gaps = [entry["sampling/logprob_gap_max"] for entry in run.state.log_history if "loss" in entry]
    assert len(gaps) == run.num_steps and max(gaps) < 1e-4


def test_an_engine_that_keeps_old_weights_is_refused(base, tmp_path):
    class Stale(engine_class()):
        def load_weights(self, model):
            pass

    with pytest.raises(RolloutError, match="out of sync"):
        train(base, tmp_path / "run", Stale(base))
