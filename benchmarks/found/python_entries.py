"""Entries about the Python API: trainers, settings, and types."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

from found.inputs import CHATML, FIXED, entry, error_of, expect, saved, tokenizer
from reinforcepp.monitoring import read_metrics

PROMPTS = [{"prompt": f"How long does dish {i} cook?"} for i in range(4)]


def by_length(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Score completions by their length."""
    return [float(len(text) % 7) for text in completions]


def trainer(base: Any, folder: Path, reward: Any = by_length, data: Any = PROMPTS, **settings: Any) -> Any:
    """Return a trainer for two short steps."""
    from reinforcepp import ReinforceConfig, ReinforceTrainer

    other = {key: settings.pop(key) for key in ("processing_class", "eval_dataset") if key in settings}
    usual: dict[str, Any] = {"output_dir": str(folder), "max_new_tokens": 4, "max_prompt_length": 64, "batch_size": 2}
    usual |= {"rollout": "transformers", "eval_prompts": 0, "max_steps": 2, "save_every": 1}
    return ReinforceTrainer(base, reward, ReinforceConfig(**(usual | settings)), data, **other)


@entry("T1", "trainer.train() twice, and again after a reward error", "nothing of the finished run is deleted")
def second_train(folder: Path) -> str:
    from reinforcepp.errors import RewardError

    base = str(saved(folder / "m"))
    run = trainer(base, folder / "run")
    run.train()
    first = read_metrics(run.folder)
    files = sorted(str(path) for path in (folder / "run").rglob("*") if path.is_file())
    run.train()
    expect(read_metrics(run.folder) == first, "other metrics")
    expect(sorted(str(path) for path in (folder / "run").rglob("*") if path.is_file()) == files, "files differ")
    calls: list[int] = []

    def fails_once(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 2:
            raise ValueError("a passing fault")
        return by_length(prompts, completions)

    broken = trainer(base, folder / "broken", fails_once)
    with suppress(RewardError):
        broken.train()
    return expect(broken.train().global_step == 2, "the second call doesn't finish the run")


@entry("T2", "a PeftModel with a trained adapter as policy", "the reference is the policy as given")
def trained_adapter_as_policy(folder: Path) -> str:
    from peft import LoraConfig, get_peft_model

    from reinforcepp import load_policy

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    tuned = get_peft_model(load_policy(str(saved(folder / "m"))), config)
    run = trainer(tuned, folder / "run", learning_rate=1e-9, processing_class=tokenizer())
    run.train()
    first = run.state.log_history[0]
    return expect(abs(first["kl"]) < 1e-4, first)


@entry("T3", "the caller's tokenizer with a system prompt in the settings", "the caller's object stays as it is")
def callers_tokenizer(folder: Path) -> str:
    tok = tokenizer(CHATML, special=("<|im_start|>", "<|im_end|>"))
    base, before = str(saved(folder / "m", tok)), tok.chat_template
    trainer(base, folder / "run", system_prompt="Be brief.", processing_class=tok)
    return expect(tok.chat_template == before, tok.chat_template)


@entry("T8", "evaluate() with more than 64 held-out prompts", "all rows are used")
def whole_evaluation(folder: Path) -> str:
    rows = [{"prompt": f"How hot is oven {i}?"} for i in range(70)]
    run = trainer(str(saved(folder / "m")), folder / "run", eval_dataset=rows, eval_prompts=4)
    found = run.evaluate()["eval_samples"]
    return expect(found == 70, found)


@entry("T4", "report_to none or None, a Path as output_dir", "accepted as in TRL")
def settings_of_trl(folder: Path) -> str:
    from reinforcepp import ReinforceConfig

    for settings in ({"report_to": "none"}, {"report_to": None}, {"output_dir": folder / "a"}):
        ReinforceConfig(**settings)
    return FIXED


@entry("T5", "num_generations 2.5, kl_coef None, seed 1.5", "an error that names the field")
def numbers_of_wrong_types(folder: Path) -> str:
    return wrong_types(num_generations=2.5, kl_coef=None, seed=1.5)


@entry(
    "T6", "log_completions 'no', warmup_steps 1.5, learning_rate '1e-5'", "an error that names the field, or the number"
)
def texts_as_settings(folder: Path) -> str:
    from reinforcepp import ReinforceConfig

    try:
        if ReinforceConfig(learning_rate="1e-5").learning_rate != 1e-5:  # type: ignore[arg-type]
            raise AssertionError("learning_rate stays a text")
    except ValueError as error:
        expect("learning_rate" in str(error), error)
    return wrong_types(log_completions="no", warmup_steps=1.5)


def wrong_types(**settings: Any) -> str:
    """Check that each setting is refused by its name."""
    from reinforcepp import ReinforceConfig

    for name, value in settings.items():
        error = error_of(lambda name=name, value=value: ReinforceConfig(**{name: value}))
        expect(name in error, error)
    return "refused"


@entry("T7", "a DatasetDict as training data", "its training split is used, or an error names the splits")
def dataset_dict(folder: Path) -> str:
    from datasets import Dataset, DatasetDict

    from reinforcepp.errors import ReinforceError

    splits = DatasetDict(train=Dataset.from_list(PROMPTS), test=Dataset.from_list(PROMPTS))
    try:
        trainer(str(saved(folder / "m")), folder / "run", data=splits)
    except ReinforceError as error:
        expect("train" in str(error), error)
        return "refused"
    return FIXED


@entry("T9", "an output folder that holds a run, from Python", "the error names fields, not flags")
def errors_in_python(folder: Path) -> str:
    base = str(saved(folder / "m"))
    trainer(base, folder / "run").train()
    trainer(base, folder / "run").train()  # keeps the earlier run
    if not (folder / "run" / "earlier_runs" / "1" / "run.json").is_file():
        return "the earlier run is gone"
    error = error_of(lambda: trainer(base, folder / "run", use_dora=True))
    return expect("--" not in error and "use_peft" in error, error)


@entry("T10", "TrlParser with ScriptArguments, ReinforceConfig, and ModelConfig", "works together")
def parser_of_trl(folder: Path) -> str:
    from trl import ModelConfig, ScriptArguments, TrlParser

    from reinforcepp import ReinforceConfig

    parser = TrlParser((ScriptArguments, ReinforceConfig, ModelConfig))
    words = ["--dataset_name", "d", "--output_dir", str(folder / "o"), "--model_name_or_path", "m"]
    _, config, _ = parser.parse_args_and_config(words)
    return expect(config.output_dir == str(folder / "o"), config)
