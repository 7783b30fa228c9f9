"""SFT: loss on the answer alone, prompts formatted as in RL, held-out metrics, and exact resume."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import tiny
import torch
from models.test_chat_template import CHAT
from safetensors.torch import load_file
from training.termination import send_sigterm_after

from reinforcepp import ReinforceConfig, ReinforceTrainer
from reinforcepp.commands.cli import main
from reinforcepp.config import ChatTemplateConfig, SftConfig
from reinforcepp.data import PromptRow, SftRow, load_texts
from reinforcepp.errors import ConfigError, TrainingDiverged
from reinforcepp.models.chat_template import with_chat_template
from reinforcepp.models.loading import load_policy, load_tokenizer
from reinforcepp.models.logprobs import response_logprobs
from reinforcepp.models.tokenization import encode_example, encode_prompts
from reinforcepp.monitoring.signals import Interrupted
from reinforcepp.training import sft_trainer, supervised_loop
from reinforcepp.training.sft_trainer import HeldOutMetrics, evaluate_heldout, to_example, train_language_model

DIRECTIONS = ("north", "south", "east", "west")
COLORS = ("red", "green", "blue", "white", "black", "grey")


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    """A model without dropout, which tells the same whether it learns or not."""
    return tiny.save(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def texts(tmp_path_factory) -> Path:
    """Plain text with a rule to it."""
    path = tmp_path_factory.mktemp("texts") / "texts.csv"
    lines = [f"The {c} host in the {d} answers the {c} host." for c in COLORS for d in DIRECTIONS]
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([["text"], *[[line] for line in lines]])
    return path


def config(model, data, folder, **settings) -> SftConfig:
    usual = {"batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-3, "heldout_fraction": 0.25}
    usual |= {"save_every": 0, "keep_last": 2}
    return SftConfig(model=str(model), data=str(data), output_dir=str(folder), **(usual | settings))


def log(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# --- examples and loss ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "frame", [{}, {"chat_template": CHAT}, {"system_prompt": "Be short."}], ids=["plain", "chat", "system"]
)
def test_prompt_and_answer_have_the_tokens_of_rl_and_only_the_answer_has_a_loss(llama, frame):
    tokenizer = with_chat_template(load_tokenizer(str(llama)), ChatTemplateConfig(**frame))
    one = to_example(tokenizer, SftRow("Why?", "Because of DNS."))
    (prompt,), _ = encode_prompts(tokenizer, [PromptRow("Why?", {})], max_prompt_length=99)
    assert tuple(one.context) == prompt.ids
    assert [*one.context, *one.target] == encode_example(tokenizer, "Why?", "Because of DNS.")
    assert tokenizer.decode(one.target).strip() == "Because of DNS.<|endoftext|>"


def test_plain_text_has_a_loss_on_all_tokens_and_eos(llama):
    tokenizer = load_tokenizer(str(llama))
    one = to_example(tokenizer, SftRow(None, "Run ip addr show."))
    ids = tokenizer("Run ip addr show.")["input_ids"]
    assert one.context == ids[:1] and one.target == [*ids[1:], tokenizer.eos_token_id]
    assert to_example(tokenizer, SftRow(None, "Run ip addr show.<|endoftext|>")) == one


@pytest.fixture
def batches(monkeypatch) -> list[dict]:
    """Inputs of the trainer's loss, batch by batch."""
    seen = []
    original = supervised_loop.ResumableSftTrainer.compute_loss

    def spy(self, model, inputs, **named):
        seen.append({name: value.clone() for name, value in inputs.items() if isinstance(value, torch.Tensor)})
        return original(self, model, inputs, **named)

    monkeypatch.setattr(supervised_loop.ResumableSftTrainer, "compute_loss", spy)
    return seen


def test_step_loss_is_the_negative_mean_of_rl_log_probabilities(llama, pairs_csv, tmp_path, batches):
    settings = {"batch_size": 6, "micro_batch_size": 3, "num_train_epochs": 1, "system_prompt": "Be short."}
    train_language_model(config(llama, pairs_csv, tmp_path / "out", **settings))
    tokenizer = with_chat_template(load_tokenizer(str(llama)), ChatTemplateConfig(system_prompt="Be short."))
    _, rows, _ = load_texts(pairs_csv, heldout_fraction=0.25, seed=42)
    examples = {tuple(one.context + one.target): one for one in (to_example(tokenizer, row) for row in rows)}
    assert len(batches) == 2 and len(examples) == 6
    seen = []
    for batch in batches:
        for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
            one = examples[tuple(ids[mask.bool()].tolist())]
            padding = [-100] * int((mask == 0).sum())
            assert labels.tolist() == [-100] * len(one.context) + one.target + padding
            seen.append(one)
    assert len(seen) == 6
    contexts, targets = [one.context for one in seen], [one.target for one in seen]
    logprobs, _, mask = response_logprobs(load_policy(str(llama)), contexts, targets, pad_id=0)
    assert log(tmp_path / "out")[0]["loss"] == pytest.approx(-(logprobs.sum() / mask.sum()).item(), abs=1e-4)


def test_heldout_metrics_match_a_loop_over_tokens(llama):
    model, tokenizer = load_policy(str(llama)), load_tokenizer(str(llama))
    rows = [
        SftRow("Why?", "Because."),
        SftRow("Is the gateway up?", "Yes."),
        SftRow(None, "So it is."),
    ]
    examples = [to_example(tokenizer, row) for row in rows]
    total, tokens = 0.0, 0
    for one in examples:
        logits = model(input_ids=torch.tensor([one.context + one.target])).logits[0].log_softmax(-1)
        for index, token in enumerate(one.target):
            total -= logits[len(one.context) + index - 1, token].item()
            tokens += 1
    found = evaluate_heldout(model, examples, pad_id=tokenizer.eos_token_id, batch_size=2)
    assert (found.tokens, found.rows) == (tokens, 3)
    assert found.loss == pytest.approx(total / tokens, abs=1e-5)
    assert found.perplexity == pytest.approx(torch.tensor(found.loss).exp().item(), rel=1e-4)


def test_heldout_loss_falls(llama, texts, tmp_path, capsys):
    metrics = train_language_model(config(llama, texts, tmp_path / "out", num_train_epochs=6, learning_rate=5e-3))
    before, after = metrics["before"], metrics["after"]
    assert after.loss < before.loss - 2 and after.loss < 1.5
    assert (before.rows, before.tokens) == (after.rows, after.tokens) == (6, after.tokens)
    err = capsys.readouterr().err
    assert f"loss {before.loss:.3f} -> {after.loss:.3f}" in err.replace("\n", " ")
    written = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert written["before"] == vars(before) and written["after"] == vars(after)
    assert saved_heldout_loss(tmp_path / "out", texts) == pytest.approx(after.loss, abs=1e-6)


def saved_heldout_loss(folder: Path, data: Path) -> float:
    """Return the held-out loss of a saved model, which must equal the reported one."""
    tokenizer = load_tokenizer(str(folder))
    _, _, unseen = load_texts(data, heldout_fraction=0.25, seed=42)
    examples = [to_example(tokenizer, row) for row in unseen]
    return evaluate_heldout(load_policy(str(folder)), examples, pad_id=tokenizer.eos_token_id, batch_size=6).loss


def test_micro_batches_change_nothing(llama, pairs_csv, tmp_path):
    for name, micro in (("whole", 6), ("split", 1)):
        train_language_model(config(llama, pairs_csv, tmp_path / name, batch_size=6, micro_batch_size=micro))
    whole, split = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "split"))
    assert max(float((whole[name] - split[name]).abs().max()) for name in whole) < 1e-4


def test_a_rising_heldout_loss_warns(llama, pairs_csv, tmp_path, capsys):
    train_language_model(config(llama, pairs_csv, tmp_path / "out", learning_rate=1.0))
    assert "loss on unseen rows rose" in " ".join(capsys.readouterr().err.split())


def test_no_heldout_rows_warns(llama, pairs_csv, tmp_path, capsys):
    found = train_language_model(config(llama, pairs_csv, tmp_path / "out", heldout_fraction=0.0, num_train_epochs=1))
    assert found == {"before": None, "after": None}
    assert "no row was held out" in capsys.readouterr().err
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == {}


# --- precision --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"mixed_precision": "bf16", "gradient_checkpointing": True}, {"use_peft": True, "learning_rate": 1e-2}],
    ids=["bf16", "lora"],
)
def test_memory_saving_settings_train(llama, pairs_csv, tmp_path, settings):
    metrics = train_language_model(config(llama, pairs_csv, tmp_path / "out", num_train_epochs=4, **settings))
    assert metrics["after"].loss < metrics["before"].loss - 0.2
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file() == ("use_peft" in settings)


def test_the_launchers_precision_is_ignored(llama, pairs_csv, tmp_path, monkeypatch):
    for name in ("alone", "launched"):
        train_language_model(config(llama, pairs_csv, tmp_path / name, num_train_epochs=1))
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert log(tmp_path / "alone") == log(tmp_path / "launched")


def test_rl_can_follow_in_the_same_process_with_another_precision(llama, pairs_csv, tmp_path, monkeypatch):
    """Accelerate, which both trainers use, has one precision per process, which the launcher can set."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train_language_model(config(llama, pairs_csv, tmp_path / "warm", mixed_precision="bf16", num_train_epochs=1))
    for precision in ("bf16", "no"):
        args = ReinforceConfig(
            output_dir=str(tmp_path / precision),
            mixed_precision=precision,
            max_steps=1,
            max_new_tokens=4,
            max_prompt_length=40,
            rollout="transformers",
        )
        run = ReinforceTrainer(
            str(tmp_path / "warm"),
            lambda prompts, completions, **_: list(map(len, completions)),
            args,
            [{"prompt": "Why?"}],
        )
        run.train()
        weights = run.policy.get_input_embeddings().weight
        assert run.policy(input_ids=torch.tensor([[1, 2]])).logits.dtype == weights.dtype


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_training_changes_only_the_weights(llama, model_folder, pairs_csv, tmp_path, family):
    """GPT-2 names no pad token, and the library would."""
    base = llama if family == "llama" else model_folder
    train_language_model(config(base, pairs_csv, tmp_path / "out", save_every=1, num_train_epochs=1))
    for name in ("config.json", "generation_config.json"):
        start = json.loads((base / name).read_text())
        for folder in (tmp_path / "out", *(tmp_path / "out" / "checkpoints").iterdir()):
            assert json.loads((folder / name).read_text()) == start
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert {str(value.dtype) for value in saved.values()} == {"torch.float32"}


# --- stop and resume --------------------------------------------------------------------------------------------


ADAFACTOR = {
    "optim": "adafactor",
    "weight_decay": 0.1,
    "lr_scheduler_type": "cosine_with_min_lr",
    "lr_scheduler_kwargs": {"min_lr": 1e-4},
}


@pytest.mark.parametrize(
    ("moment", "extra"), [(2, {}), (5, ADAFACTOR), (3, {"use_peft": True})], ids=["2", "adafactor", "lora"]
)
def test_a_run_stopped_by_a_signal_resumes_exactly(model_folder, pairs_csv, tmp_path, monkeypatch, moment, extra):
    """GPT-2 trains with dropout, so resuming must restore the random generators, too."""
    settings = {"batch_size": 2, "micro_batch_size": 1, "save_every": 2, "keep_last": 1, **extra}
    train_language_model(config(model_folder, pairs_csv, tmp_path / "whole", **settings))
    send_sigterm_after(moment, monkeypatch)
    with pytest.raises(Interrupted) as stop:
        train_language_model(config(model_folder, pairs_csv, tmp_path / "run", **settings))
    assert stop.value.exit_code == 143
    with pytest.raises(ConfigError, match=r"learning_rate was 0\.001 and is 0\.1"):
        train_language_model(
            config(model_folder, pairs_csv, tmp_path / "run", **settings, learning_rate=0.1, resume=True)
        )
    train_language_model(config(model_folder, pairs_csv, tmp_path / "run", **settings, resume=True))
    weights = "adapter_model.safetensors" if "use_peft" in extra else "model.safetensors"
    for name in (weights, "metrics.jsonl", "evaluation.json"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 1
    assert len(log(tmp_path / "run")) == 6
    assert saved_heldout_loss(tmp_path / "run", pairs_csv) == pytest.approx(
        json.loads((tmp_path / "run" / "evaluation.json").read_text())["after"]["loss"], abs=1e-5
    )


def test_resume_rejects_changed_data(llama, pairs_csv, tmp_path):
    data = tmp_path / "pairs.csv"
    data.write_bytes(pairs_csv.read_bytes())
    train_language_model(config(llama, data, tmp_path / "run", num_train_epochs=1, save_every=1))
    data.write_text(data.read_text() + "One more?,Yes.,No.\n")
    with pytest.raises(ConfigError, match="data was"):
        train_language_model(config(llama, data, tmp_path / "run", num_train_epochs=1, save_every=1, resume=True))


def test_gradients_that_are_not_finite_are_skipped_and_then_stop_training(llama, pairs_csv, tmp_path, monkeypatch):
    original = supervised_loop.ResumableSftTrainer.compute_loss
    monkeypatch.setattr(
        supervised_loop.ResumableSftTrainer,
        "compute_loss",
        lambda self, *positional, **named: original(self, *positional, **named) * float("nan"),
    )
    with pytest.raises(TrainingDiverged, match="Step 2: the gradient isn't finite"):
        train_language_model(config(llama, pairs_csv, tmp_path / "run", max_skipped_updates=1))


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def workdir(tmp_path, monkeypatch, llama, pairs_csv) -> Path:
    """The working directory, with ``model`` and ``pairs.csv``."""
    monkeypatch.chdir(tmp_path)
    Path("model").symlink_to(llama)
    Path("pairs.csv").write_bytes(pairs_csv.read_bytes())
    return tmp_path


SFT = ["sft", "--model", "model", "--data", "pairs.csv", "--num_train_epochs", "1", "--output_dir", "warm"]


def test_every_other_command_accepts_the_saved_model(workdir, capsys):
    assert main([*SFT, "--system_prompt", "Be short."]) == 0
    assert "pairs.csv: 8 rows; answers from the column 'chosen'" in capsys.readouterr().err
    few = ["--data", "pairs.csv", "--max_prompt_length", "64", "--max_new_tokens", "4", "--rollout", "transformers"]
    rule = ["--rewards", "rule:length?max=20", "--max_steps", "1", "--batch_size", "2", "--eval_prompts", "0"]
    for arguments in (
        ["reward", "--model", "warm", "--data", "pairs.csv", "--num_train_epochs", "1"],
        ["train", "--model", "warm", *few, *rule],
        ["generate", "--model", "warm", "--prompt", "Why?", "--max_new_tokens", "4", "--engine", "transformers"],
        ["export", "warm", "--output_dir", "plain"],
    ):
        assert main(arguments) == 0, capsys.readouterr().err
    assert "Be short." in load_tokenizer("runs/train").chat_template
    card = Path("plain/README.md").read_text()
    assert "- sft\n" in card and "rlhf" not in card
    assert "fine-tuned on 7 rows by reinforcepp" in card and "held-out loss, before and after" in card
    assert "| num\\_train\\_epochs | 1 | 3 |" in card
    capsys.readouterr()
    for verb in ("report", "doctor"):
        assert main([verb, "warm"]) == 2
        assert "warm: the folder is an SFT run" in capsys.readouterr().err


def test_the_next_training_accepts_an_adapter(workdir, capsys):
    assert main([*SFT, "--use_peft"]) == 0
    assert main([*SFT[:1], "--model", "warm", *SFT[3:-1], "again"]) == 0
    start, end = (load_policy(name).state_dict() for name in ("warm", "again"))
    assert not any(torch.equal(start[name], end[name]) for name in start if "proj" in name)


def test_the_legacy_interface(workdir, capsys):
    from reinforcepp.commands import legacy_cli as classic

    arguments = [
        "--model_name",
        "model",
        "--data_path",
        "pairs.csv",
        "--sft_model_path",
        "warm",
        "--num_train_epochs",
        "1",
    ]
    assert classic.main(["--mode", "train_sft", *arguments]) == 0
    assert Path("warm/model.safetensors").is_file()
    assert classic.main(["--help"]) == 0
    assert "train_sft (reinforcepp sft" in capsys.readouterr().out


def test_a_dry_run_shows_the_loss_mask(workdir, capsys):
    before = sorted(workdir.iterdir())
    assert main([*SFT, "--dry_run"]) == 0
    out = capsys.readouterr().out
    tokenizer = load_tokenizer("model")
    _, rows, _ = load_texts("pairs.csv", heldout_fraction=0.1, seed=42)
    one = to_example(tokenizer, rows[0])
    assert f"  mask    {'0 ' * len(one.context)}{'1 ' * len(one.target)}".rstrip() + "\n" in out
    assert "Row 3 (row " in out and "Row 4" not in out and "num_train_epochs: 1  # default: 3" in out
    assert sorted(workdir.iterdir()) == before


@pytest.mark.parametrize(
    ("rows", "flags", "expected"),
    [
        (["a,b", "1,2"], [], ["bad.csv", "no column 'text'", "--text_column"]),
        (["text"], [], ["bad.csv"]),
        (
            ["text,n", "A dog barks at the gate.,1"],
            ["--max_length", "4"],
            ["bad.csv", "no training row", "max_length 4"],
        ),
        (["text,n", "A dog barks.,1"], ["--mixed_precision", "fp16"], ["fp16", "GPU"]),
        (["text,n", "A dog barks.,1"], ["--batch_size", "8", "--micro_batch_size", "3"], ["micro_batch_size 3"]),
        (["text,n", "A dog barks.,1"], ["--output_dir", "model"], ["output_dir"]),
        (["text,n", "A dog barks.,1"], ["--model", "nowhere/at/all"], ["nowhere/at/all"]),
    ],
)
def test_mistakes_raise_a_short_error(workdir, capsys, rows, flags, expected):
    if torch.cuda.is_available() and "fp16" in flags:
        pytest.skip("there is a GPU")
    Path("bad.csv").write_text("\n".join(rows) + "\n")
    assert main(["sft", "--model", "model", "--data", "bad.csv", *flags]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("error: ") and "Traceback" not in err
    assert [words for words in expected if words not in err] == []
    assert not Path("models").exists()


def test_long_rows_are_skipped_and_counted(workdir, capsys):
    Path("long.csv").write_text(
        "text,n\n" + "\n".join(f"Host {i} is up.,{i}" for i in range(6)) + f"\n{'ping ' * 99},9\n"
    )
    flags = ["--max_length", "20", "--num_train_epochs", "1", "--heldout_fraction", "0"]
    assert main(["sft", "--model", "model", "--data", "long.csv", *flags]) == 0
    assert "Skipped 1 training rows longer than 20 tokens (rows 8)" in capsys.readouterr().err
    assert json.loads(Path("models/sft/run.json").read_text())["rows"] == 6


def test_rows_are_tokenized_together(llama, monkeypatch):
    tokenizer = load_tokenizer(str(llama))
    rows = [SftRow(f"Why {i}?", f"Because of {i}.") if i % 3 else SftRow(None, f"Host {i} is up.") for i in range(60)]
    expected = [to_example(tokenizer, row) for row in rows]
    calls, call = [], type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda *a, **k: calls.append(1) or call(*a, **k))
    assert sft_trainer.to_examples(tokenizer, rows) == expected
    assert len(calls) == 3  # whole texts, prompts, and prompts with answers


def test_examples_are_read_from_disk(llama, texts, tmp_path, monkeypatch):
    fitted, measured, metrics = [], [], HeldOutMetrics(1.0, 1.0, 1, 1)
    monkeypatch.setattr(supervised_loop, "fit", lambda kind, model, tokenizer, rows, *rest: fitted.append(rows))
    monkeypatch.setattr(sft_trainer, "evaluate_heldout", lambda model, rows, **named: measured.append(rows) or metrics)
    train_language_model(config(llama, texts, tmp_path / "out"))
    tokenizer = load_tokenizer(str(llama))
    _, train, heldout = load_texts(texts, heldout_fraction=0.25, seed=42)
    assert fitted[0].cache_files and len(fitted[0]) == len(train)
    assert [row["input_ids"] for row in fitted[0]] == [
        [*one.context, *one.target] for one in (to_example(tokenizer, row) for row in train)
    ]
    assert isinstance(measured[0], sft_trainer.DiskExamples)
    assert list(measured[0]) == measured[0][:99] == [to_example(tokenizer, row) for row in heldout]


def test_rows_as_long_as_the_context_are_kept_by_default():
    from reinforcepp.models.loading import context_length, load_config
    from reinforcepp.training.supervised_setup import DEFAULT_MAX_LENGTH, length_limit

    context = context_length(load_config("builtin:tiny"))
    assert length_limit(SftConfig()) == min(context, DEFAULT_MAX_LENGTH)
    assert length_limit(SftConfig(max_length=64)) == 64
