"""The precision of a training: chosen at its start, kept when it resumes."""

import json

import pytest
import tiny
import torch
from small_trainer import trainer

from reinforcepp import ReinforceConfig, RewardModelConfig, SftConfig
from reinforcepp.config import CompareAlgorithmsConfig, PlanConfig, TrainConfig
from reinforcepp.errors import ConfigError
from reinforcepp.models import precision
from reinforcepp.models.loading import load_config
from reinforcepp.monitoring.run_record import read_run
from reinforcepp.reports.run.page import _environment
from reinforcepp.run_dir import FINISHED
from reinforcepp.training.precision import with_precision
from reinforcepp.training.reward_trainer import train_reward_model
from reinforcepp.training.sft_trainer import train_language_model

NATIVE, EMULATED = (199e9, 102e9), (0.9e9, 77e9)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("base")))


@pytest.fixture
def cpu(monkeypatch):
    """Return a function that sets the speeds of this CPU; no model is too small for bfloat16."""
    monkeypatch.setattr(precision, "SMALL_PARAMETERS", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    return lambda speeds: monkeypatch.setattr(precision, "cpu_flops", lambda: speeds)


def noted(folder):
    found = json.loads((folder / "run.json").read_text())
    return found["settings"]["mixed_precision"], found.get("precision")


def test_a_policy_training_keeps_its_precision_on_another_cpu(base, tmp_path, cpu, capsys):
    cpu(NATIVE)
    usual = {"mixed_precision": "auto", "save_every": 1, "keep_last": 9}
    first = trainer(base, tmp_path / "run", **usual)
    first.train()
    assert first.model.dtype == torch.bfloat16
    reason = (
        "Mixed precision bf16: a core of this CPU reaches 199 GFLOP/s in bfloat16, compared with 102 GFLOP/s in float32"
    )
    assert capsys.readouterr().err.count(f"{reason}.") == 1
    assert noted(tmp_path / "run") == ("bf16", reason)
    assert ("precision", reason) in _environment(read_run(tmp_path / "run"))["packages"]

    cpu(EMULATED)
    resumed = trainer(base, tmp_path / "run", resume=str(tmp_path / "run/checkpoints/step-000001"), **usual)
    resumed.train()
    err = capsys.readouterr().err
    assert resumed.model.dtype == torch.bfloat16
    assert "Mixed precision bf16: as at the start of the run." in err
    assert "a core of this CPU reaches 0.9 GFLOP/s in bfloat16" in err  # a warning
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), resumed.model.parameters(), strict=True))
    with pytest.raises(ConfigError, match="mixed_precision was bf16 and is no"):
        trainer(base, tmp_path / "run", **usual | {"mixed_precision": "no", "resume": True})
    # A trainer made without resume can resume later: train(resume_from_checkpoint=True).
    settings = {"output_dir": str(tmp_path / "run"), "mixed_precision": "auto"}
    for overwrite, expected in ((False, "bf16"), (True, "no")):
        config, _ = with_precision(ReinforceConfig(overwrite=overwrite, **settings), first.model.config)
        assert config.mixed_precision == expected


@pytest.mark.full
@pytest.mark.parametrize(
    ("kind", "train"), [(SftConfig, train_language_model), (RewardModelConfig, train_reward_model)]
)
def test_supervised_trainings_keep_their_precision(kind, train, base, pairs_csv, tmp_path, cpu):
    cpu(NATIVE)
    usual = {"model": base, "data": str(pairs_csv), "output_dir": str(tmp_path / "run"), "mixed_precision": "auto"}
    train(kind(max_steps=2, save_every=1, keep_last=9, batch_size=4, **usual))
    assert noted(tmp_path / "run")[0] == "bf16" and "199 GFLOP/s" in noted(tmp_path / "run")[1]
    cpu(EMULATED)
    resume = str(tmp_path / "run/checkpoints/step-000001")
    train(kind(max_steps=2, save_every=1, keep_last=9, batch_size=4, resume=resume, **usual))
    record = json.loads((tmp_path / "run/run.json").read_text())
    assert record[FINISHED]["settings"]["mixed_precision"] == "bf16"


def test_runs_of_earlier_versions_keep_float32(cpu):
    cpu(NATIVE)
    config = SftConfig(mixed_precision="auto")
    assert with_precision(config, tiny.model().config, {"mixed_precision": "no"})[0].mixed_precision == "no"
    assert with_precision(config, tiny.model().config, {"learning_rate": 1.0})[0].mixed_precision == "no"
    assert with_precision(config, tiny.model().config)[0].mixed_precision == "bf16"


def test_ranks_use_the_choice_of_rank_zero(cpu, monkeypatch):
    from reinforcepp.distributed import ranks

    cpu(EMULATED)
    store = torch.distributed.HashStore()
    monkeypatch.setattr(ranks.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks, "started", lambda: 2)
    monkeypatch.setattr(ranks.distributed.distributed_c10d, "_get_default_store", lambda: store)
    config = SftConfig(mixed_precision="auto")
    for main, expected in ((True, "no"), (False, "no")):  # rank 1 runs on a CPU with bfloat16
        monkeypatch.setattr(ranks, "is_main", lambda main=main: main)
        assert with_precision(config, tiny.model().config)[0].mixed_precision == expected
        cpu(NATIVE)


@pytest.mark.parametrize(
    "kind", [ReinforceConfig, TrainConfig, CompareAlgorithmsConfig, PlanConfig, SftConfig, RewardModelConfig]
)
def test_every_training_chooses_by_default(kind):
    assert kind().mixed_precision == kind(bf16=None).mixed_precision == "auto"
    assert kind(bf16=True).mixed_precision == "bf16" and kind(bf16=False).mixed_precision == "no"


def test_the_built_in_model_computes_in_float32_on_every_device(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    monkeypatch.setattr(precision, "cpu_flops", lambda: NATIVE)
    model = load_config("builtin:tiny")
    assert all(
        with_precision(kind(), model)[0].mixed_precision == "no" for kind in (ReinforceConfig, RewardModelConfig)
    )
