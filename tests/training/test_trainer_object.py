"""The trainer object as TRL's users know it: its arguments, its attributes, and what its methods return."""

import inspect
import itertools
import json
import re
from statistics import fmean

import pytest
import tiny
import torch
from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict
from small_trainer import PROMPTS, spread, trainer
from transformers import TrainerState
from transformers.trainer_utils import TrainOutput
from trl import RLOOTrainer

from reinforcepp import ConfigError, DataError, ReinforceTrainer, load_policy
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.monitoring import read_metrics
from scripts import ROOT


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return str(tiny.save(tmp_path_factory.mktemp("base")))


def test_the_arguments_have_the_order_of_trl():
    ours, theirs = (list(inspect.signature(kind).parameters) for kind in (ReinforceTrainer, RLOOTrainer))
    assert ours[: len(theirs)] == theirs


def test_train_and_evaluate_return_what_trl_returns(base, tmp_path):
    run = trainer(base, tmp_path / "run", spread, PROMPTS, PROMPTS[:3], eval_every=1)
    before = load_policy(base).state_dict()
    output = run.train()
    log = run.state.log_history
    assert isinstance(output, TrainOutput) and isinstance(run.state, TrainerState)
    assert [entry["step"] for entry in log] == [1, 1, 2, 2, 2]
    steps = [entry for entry in log if "loss" in entry]
    assert steps == read_metrics(tmp_path / "run") and [entry["epoch"] for entry in steps] == pytest.approx(
        [1 / 3, 2 / 3]
    )
    assert (output.global_step, run.state.global_step, run.state.max_steps) == (2, 2, 2)
    assert output.training_loss == pytest.approx(fmean(entry["loss"] for entry in steps), abs=1e-8)
    assert log[-1]["train_loss"] == pytest.approx(output.training_loss, abs=1e-8)
    assert {"train_runtime", "train_loss"} <= set(output.metrics)
    rewards = [run.evaluations[name].reward for name in ("step 1", "after")]
    assert [entry["eval_reward"] for entry in log if "eval_reward" in entry] == pytest.approx(rewards)
    again = run.evaluate()
    assert again["eval_reward"] == run.evaluations["after"].reward and again["eval_samples"] == 3
    assert run.evaluate(metric_key_prefix="test")["test_reward"] == again["eval_reward"]
    assert run.train() == output and run.state.global_step == 2
    changed = [name for name, weight in run.model.state_dict().items() if not torch.equal(weight, before[name])]
    assert changed and run.ref_model is not run.model
    assert run.processing_class.pad_token is not None and run.args.max_steps == 2
    assert (run.train_dataset, run.eval_dataset) == (PROMPTS, PROMPTS[:3]) and run.accelerator.is_main_process
    trained = {id(weight) for group in run.optimizer.param_groups for weight in group["params"]}
    assert trained == {id(weight) for weight in run.model.parameters()}
    assert run.lr_scheduler.get_last_lr()[0] == steps[-1]["learning_rate"]
    run.save_model(tmp_path / "copy")
    assert torch.equal(load_policy(str(tmp_path / "copy")).lm_head.weight, run.model.lm_head.weight)


def test_a_resumed_run_has_the_whole_history(base, tmp_path):
    settings = {"max_steps": 3, "eval_every": 1, "save_every": 1, "keep_last": 2}
    whole = trainer(base, tmp_path / "whole", spread, PROMPTS, PROMPTS[:2], **settings)
    whole.train()
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000002"
    for resume in (str(checkpoint), True):  # from the middle, and the finished run of another process
        resumed = trainer(base, tmp_path / "run", spread, PROMPTS, PROMPTS[:2], resume=resume, **settings)
        output = resumed.train()
        drop = ("time", "train_")
        histories = [
            [{key: value for key, value in entry.items() if not any(part in key for part in drop)} for entry in log]
            for log in (whole.state.log_history, resumed.state.log_history)
        ]
        assert histories[0] == histories[1]
        assert output.global_step == 3
        assert output.training_loss == pytest.approx(whole.state.log_history[-1]["train_loss"], abs=1e-8)


def test_reward_functions_get_the_state_of_the_trainer(base, tmp_path):
    steps = []

    def watching(completion_ids, trainer_state, **_):
        steps.append((trainer_state.global_step, trainer_state.max_steps))
        return [0.0] * len(completion_ids)

    run = trainer(base, tmp_path / "run", watching)
    run.train()
    assert steps == [(0, 2), (1, 2)] and run.rewards.trainer_state is run.state


def test_epochs_can_be_a_fraction_and_save_and_evaluate(base, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr(Ranks, "track", lambda ranks, values, step: logged.append(step))
    args = {
        "max_steps": -1,
        "num_train_epochs": 1.5,
        "save_strategy": "epoch",
        "eval_strategy": "epoch",
        "save_total_limit": 5,
        "logging_steps": 2,
        "logging_first_step": True,
        "reward_clip_range": [0.2, 0.5],
    }
    run = trainer(base, tmp_path / "run", spread, PROMPTS, PROMPTS[:2], **args)
    run.train()
    assert run.num_steps == 5  # 1.5 x 3 steps, rounded up
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-000003"]
    assert list(run.evaluations) == ["before", "step 3", "after"]
    assert logged == [1, 2, 4]
    assert any("reward_clipped_ratio" in entry for entry in run.state.log_history)


def test_trackers_get_the_name_of_the_run(monkeypatch):
    given = {}
    monkeypatch.setattr("accelerate.Accelerator.init_trackers", lambda *_, **arguments: given.update(arguments))
    Ranks().start_trackers({"run_name": "first"}, step=0)
    assert given["init_kwargs"]["wandb"] == {"name": "first"} and given["init_kwargs"]["mlflow"] == {
        "run_name": "first"
    }


# --- runs in one folder -----------------------------------------------------------------------------------------------


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_script_that_runs_again_keeps_the_earlier_run(base, tmp_path, capsys):
    folder = tmp_path / "run"
    trainer(base, folder, keep_last=1).train()
    (folder / "notes.txt").write_text("mine")
    runs = [contents(folder)]
    for number in (1, 2):
        trainer(base, folder, keep_last=1, seed=number).train()
        assert (
            f"Moved the earlier run in {folder} to {folder}/earlier_runs/{number}. To continue a run instead, call "
            "train(resume_from_checkpoint=True)." in capsys.readouterr().err.replace("\n", "")
        )
        moved = contents(folder / "earlier_runs" / str(number))
        assert moved == {name: text for name, text in runs[-1].items() if name != "notes.txt"}
        assert (folder / "notes.txt").read_text() == "mine"
        runs.append({n: text for n, text in contents(folder).items() if not n.startswith("earlier_runs")})
    resumed = trainer(base, folder, keep_last=1, seed=2, resume=True)
    assert resumed.train().global_step == 2
    (folder / "notes.txt").unlink()
    trainer(base, folder, overwrite=True).train()
    assert sorted(path.name for path in (folder / "earlier_runs").iterdir()) == ["1", "2"]


def test_other_files_in_the_folder_stay(base, tmp_path):
    (tmp_path / "data.csv").write_text("mine")
    trainer(base, tmp_path).train()
    assert (tmp_path / "data.csv").read_text() == "mine" and (tmp_path / "model.safetensors").is_file()
    tiny.save(tmp_path / "model")
    before = contents(tmp_path / "model")
    with pytest.raises(ConfigError, match="holds files that reinforcepp didn't write"):
        trainer(base, tmp_path / "model")
    assert contents(tmp_path / "model") == before


def test_a_new_trainer_resumes_with_more_steps(base, tmp_path, capsys):
    settings = {"save_every": 1, "keep_last": 2}
    whole = trainer(base, tmp_path / "whole", max_steps=4, **settings)
    whole.train()
    trainer(base, tmp_path / "run", **settings).train()
    more = trainer(base, tmp_path / "run", max_steps=4, **settings)
    assert more.train(resume_from_checkpoint=True).global_step == 4
    assert "max_steps was 2 and is 4" in " ".join(capsys.readouterr().err.split())
    for name in ("metrics.jsonl", "model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    checkpoint = tmp_path / "whole" / "checkpoints" / "step-000003"
    other = trainer(base, tmp_path / "other", max_steps=4, **settings)
    assert other.train(resume_from_checkpoint=checkpoint).global_step == 4
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
    again = trainer(base, tmp_path / "whole", max_steps=4, seed=9, **settings)
    before = contents(tmp_path / "whole")
    with pytest.raises(ConfigError, match="seed was 42 and is 9"):
        again.train(resume_from_checkpoint=True)
    with pytest.raises(ConfigError, match="no checkpoint to resume from"):
        trainer(base, tmp_path / "new").train(resume_from_checkpoint=True)
    assert contents(tmp_path / "whole") == before


def test_a_finished_run_without_checkpoints_is_returned(base, tmp_path):
    whole = trainer(base, tmp_path / "run")
    whole.train()
    again = trainer(base, tmp_path / "run")
    assert again.train(resume_from_checkpoint=True).global_step == 2
    assert torch.equal(again.model.lm_head.weight, whole.model.lm_head.weight)
    assert again.state.log_history[0] == whole.state.log_history[0]
    with pytest.raises(ConfigError, match="finished after 2 steps and it has no checkpoint, so it can't continue"):
        trainer(base, tmp_path / "run", max_steps=4).train(resume_from_checkpoint=True)


# --- datasets ---------------------------------------------------------------------------------------------------------


def endless(limit=None):
    for number in itertools.count():
        assert limit is None or number < limit, "rows are read that no step uses"
        yield {"prompt": f"Why is host {number} up?", "number": number}


def watching(seen):
    def spread_and_watch(completion_ids, number, **_):
        seen.extend(number)
        return spread(completion_ids)

    return spread_and_watch


def test_an_endless_dataset_is_read_as_far_as_it_is_used(base, tmp_path):
    seen, settings = [], {"max_steps": 3, "save_every": 1, "keep_last": 2}
    stream = IterableDataset.from_generator(endless, gen_kwargs={"limit": 7})  # datasets reads one row ahead
    whole = trainer(base, tmp_path / "whole", watching(seen), stream, **settings)
    whole.train()
    assert seen == [0, 1, 2, 3, 4, 5] and whole.state.epoch == 1
    saved = tmp_path / "whole" / "checkpoints" / "step-000002"
    seen.clear()
    trainer(base, tmp_path / "run", watching(seen), endless(6), **settings).train(resume_from_checkpoint=saved)
    assert seen == [4, 5]
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()
    seen.clear()
    short = itertools.islice(endless(), 3)  # starts over
    trainer(base, tmp_path / "short", watching(seen), short, **settings).train()
    assert seen == [0, 1, 2, 0, 1, 2]
    with pytest.raises(DataError, match="train_dataset: no rows"):
        trainer(base, tmp_path / "none", spread, iter([]))


def test_prompts_keep_their_order_without_shuffling(base, tmp_path):
    seen = []
    rows = Dataset.from_list(list(itertools.islice(endless(), 5)))
    trainer(
        base, tmp_path / "run", watching(seen), rows, max_steps=0, num_train_epochs=2, shuffle_dataset=False
    ).train()
    assert seen == [0, 1, 2, 3, 4] * 2


@pytest.mark.parametrize("kind", [dict, DatasetDict, IterableDatasetDict])
def test_several_datasets_are_evaluated_one_by_one(base, tmp_path, kind):
    rows = [{"prompt": f"Why is host {i} down?"} for i in range(5)]
    parts = {"easy": rows[:2], "hard": rows[2:]}
    sets = kind({name: Dataset.from_list(part) for name, part in parts.items()})
    if kind is IterableDatasetDict:
        sets = kind({name: part.to_iterable_dataset() for name, part in sets.items()})
    run = trainer(base, tmp_path / "run", spread, PROMPTS, sets, eval_every=1, eval_prompts=2)
    run.train()
    (first,) = (entry for entry in run.state.log_history if entry["step"] == 1 and "eval_reward" in entry)
    easy, hard = (run.evaluations["step 1"].parts[name] for name in ("easy", "hard"))
    assert [len(easy.completions), len(hard.completions)] == [2, 2], "eval_prompts of each"
    assert first["eval_easy_reward"] == pytest.approx(easy.reward)
    assert first["eval_hard_completions/mean_length"] == hard.length
    assert first["eval_reward"] == pytest.approx((easy.reward + hard.reward) / 2)
    all_rows = run.evaluate()
    assert all_rows["eval_samples"] == 5
    assert run.evaluate("hard")["eval_reward"] == pytest.approx(all_rows["eval_hard_reward"])
    given = run.evaluate(parts["hard"], metric_key_prefix="test")
    assert given["test_samples"] == 3 and "test_easy_reward" not in given
    other = run.evaluate({"one": rows[:1], "two": rows[1:2]})
    assert other["eval_samples"] == 2 and {"eval_one_reward", "eval_two_kl"} <= set(other)


def test_a_training_dataset_of_several_parts_is_an_error(base, tmp_path):
    """As in TRL, whose trainers need one dataset."""
    parts = DatasetDict(train=Dataset.from_list(PROMPTS))
    with pytest.raises(ConfigError, match=r"train_dataset=dataset\['train'\]"):
        trainer(base, tmp_path / "run", spread, parts)


# --- what scripts do after training -----------------------------------------------------------------------------------


def test_metrics_and_state_are_saved_as_transformers_does(base, tmp_path, capsys):
    run = trainer(base, tmp_path / "run", spread, PROMPTS, PROMPTS[:2])
    metrics = run.train().metrics
    run.log_metrics("train", metrics)
    run.save_metrics("train", metrics)
    run.save_metrics("eval", run.evaluate())
    run.save_state()
    run.log({"mine": 1.0})
    assert "***** train metrics *****" in capsys.readouterr().out
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    assert results["train_loss"] == metrics["train_loss"] and "eval_reward" in results
    saved = TrainerState.load_from_json(str(tmp_path / "run" / "trainer_state.json"))
    assert saved.global_step == 2 and saved.log_history == run.state.log_history[:-1]
    assert run.state.log_history[-1] == {"step": 2, "epoch": pytest.approx(2 / 3), "mine": 1.0}
    assert run.is_world_process_zero()


def test_a_saved_model_does_not_replace_an_earlier_run(base, tmp_path):
    trainer(base, tmp_path / "run").train()
    before = contents(tmp_path / "run")
    trainer(base, tmp_path / "run").save_model()
    assert contents(tmp_path / "run" / "earlier_runs" / "1") == before


def test_the_documented_methods_and_attributes_exist(base, tmp_path):
    section = (
        (ROOT / "docs/migration.md").read_text(encoding="utf-8").split("## Methods and attributes")[1].split("\n## ")[0]
    )
    rows = [line.split("|")[1:3] for line in section.splitlines() if line.startswith("| `")]
    run = trainer(base, tmp_path / "run")
    existing = {
        name: here.strip().startswith("the same") for names, here in rows for name in re.findall("`(.*?)`", names)
    }
    assert {name for name, same in existing.items() if same != hasattr(run, name)} == set()
    assert len(existing) > 25


@pytest.mark.parametrize("name", ["compute_loss", "_calculate_rewards"])
def test_methods_that_are_never_called_are_refused_in_a_subclass(name):
    with pytest.raises(ConfigError, match=rf"Mine\.{name}: ReinforceTrainer never calls it\. Instead, "):
        type("Mine", (ReinforceTrainer,), {name: lambda self: None})


@pytest.mark.parametrize("name", ["environment_factory", "rollout_func"])
def test_arguments_of_agents_are_refused(base, tmp_path, name):
    with pytest.raises(ConfigError, match=f"{name}: isn't supported"):
        trainer(base, tmp_path / "run", arguments={name: [print]})


@pytest.mark.parametrize(
    "settings",
    [{"modules_to_save": ["lm_head"], "bias": "all"}, {"target_modules": r".*\.c_attn", "rank_pattern": {"0.attn": 2}}],
    ids=["modules_to_save", "patterns"],
)
def test_any_lora_config_is_passed_to_peft(base, tmp_path, settings):
    from peft import LoraConfig

    def run_with(folder, **others):
        adapter = LoraConfig(**({"r": 4, "target_modules": ["c_attn"]} | settings))
        others = {"max_steps": 3, "save_every": 1, "keep_last": 2, **others}
        return trainer(base, folder, arguments={"peft_config": adapter}, **others)

    whole = run_with(tmp_path / "whole")
    start = whole.model.get_base_model().lm_head.weight.clone()
    whole.train()
    head_trained = not torch.equal(whole.model.get_base_model().lm_head.weight, start)
    assert head_trained == ("modules_to_save" in settings)
    assert whole.state.log_history[0]["kl"] == pytest.approx(0, abs=1e-6) and whole.state.log_history[2]["kl"] > 1e-6
    reloaded = load_policy(str(tmp_path / "whole"))
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.allclose(reloaded(ids).logits, whole.model(ids).logits, atol=1e-5)
    saved = tmp_path / "whole" / "checkpoints" / "step-000002"
    run_with(tmp_path / "again").train(resume_from_checkpoint=saved)
    for name in ("metrics.jsonl", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_rotary_frequencies_are_fixed_for_the_longest_sequence(tmp_path, capsys):
    factors = {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "factor": 4.0}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 8} | factors
    model = tiny.model("llama", rope_parameters=rope)
    made = trainer(model, tmp_path, arguments={"processing_class": tiny.tokenizer()})
    assert "Rotary frequencies (longrope) are fixed for sequences of 44 tokens" in " ".join(
        capsys.readouterr().err.split()
    )
    assert made.model.model.rotary_emb.rope_type == "default"
