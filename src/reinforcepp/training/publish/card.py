"""The model card: the origin of a model, its training, its metrics, and how to load it.

Cards are public, so they show what is known to be harmless: numbers, choices from a list, names on the Hub, and names of
built-in parts and of Python functions. Other texts, such as paths, addresses and prompts, are private. Shown texts are escaped.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from reinforcepp.config import ReinforceConfig, RewardModelConfig
from reinforcepp.config.data_spec import data_names, is_reasoning_gym
from reinforcepp.config.hub import REPOSITORY
from reinforcepp.config.values import accepted_values
from reinforcepp.data.builtin import DATA_NAME, MODEL_NAME
from reinforcepp.files import whole_file
from reinforcepp.monitoring.metric_delta import change_of
from reinforcepp.monitoring.run_record import RunRecord
from reinforcepp.reports.run.settings import PER_RUN, TRAININGS, settings_of
from reinforcepp.rewards.card import REWARD_MODEL, RewardCard
from reinforcepp.runtime.process import own_version
from reinforcepp.runtime.terminal import printable
from reinforcepp.training.publish.source import Source

CARD = "README.md"
LAYER = re.compile(r"\w[\w.-]{0,63}")
SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#!|~&:@])")
LAYER_NAMES = ("lora_target_modules",)
"""Settings whose texts a card shows, because they are names of the model's layers. The texts of a new setting stay private."""
LOCAL_MODEL, LOCAL_DATA = "a model in a local folder", "local files"
TAGS = ("reinforcepp", "reinforce-plus-plus", "rlhf", "text-generation")
REWARD_TAGS = ("reinforcepp", "reward-model", "rlhf", "text-classification")
SFT_TAGS = ("reinforcepp", "sft", "text-generation")
METRICS = {
    "kl": ("KL to the reference policy, nats/token", "{:.4f}"),
    "length": ("length, tokens", "{:.1f}"),
    "truncated": ("truncated at the length limit", "{:.0%}"),
    "distinct": ("distinct responses", "{:.0%}"),
}
"""Metrics without a standard error, with their names and formats."""


def model_card(
    source: Source,
    name: str,
    repository: str | None = None,
    *,
    dataset_name: str | None = None,
    tags: Sequence[str] = (),
    adapter: bool = False,
) -> str:
    """Return the card in Markdown, with front matter for the Hub.

    Args:
        source: the model with the record of its training.
        name: title of the card: USER/NAME, or another name.
        repository: USER/NAME, from which readers load the model; default: ``name``, if it is such a name.
        dataset_name: the prompts, instead of the recorded file names.
        tags: tags in addition to those of every card.
        adapter: the files are a LoRA adapter without its base model.
    """
    record = source.record
    usual = SFT_TAGS if record is not None and record.is_sft else TAGS
    header = _front_matter(record, [*usual, *tags], adapter, dataset_name)
    parts = [header, f"# {escaped(name)}", _introduction(source)]
    if record is not None and record.is_sft:
        parts += [_sft_data(source, record), _settings(record)]
    elif record is not None:
        parts += [_data(record, dataset_name), _rewards(record), _results(source, record), _settings(record)]
    return "\n\n".join([*parts, _use(_loadable(repository or name), adapter)]) + "\n"


def reward_model_card(
    record: RunRecord,
    name: str,
    repository: str | None = None,
    *,
    dataset_name: str | None = None,
    tags: Sequence[str] = (),
    adapter: bool = False,
) -> str:
    """Return the card of the reward model whose own record is the only one in ``record``; arguments as for a policy."""
    start = escaped(_sentence_start(_model(record, record.settings.get("model"))))
    parts = [
        _front_matter(record, [*REWARD_TAGS, *tags], adapter, dataset_name),
        f"# {escaped(name)}",
        f"{start}, trained on preferences as a reward model by {_package()}.",
        _rewards(record, dataset_name),
        _settings(record),
        _use_reward(_loadable(repository or name)),
    ]
    return "\n\n".join(parts) + "\n"


def write_card(text: str, folder: Path) -> None:
    """Write the card into the folder of its model."""
    with whole_file(folder / CARD) as card:
        card.write(text)


def escaped(text: Any) -> str:
    """Return ``text`` escaped for Markdown, on one line and without control characters."""
    return SPECIAL.sub(r"\\\1", " ".join(printable(str(text)).split()))


def _front_matter(record: RunRecord | None, tags: Sequence[str], adapter: bool, dataset_name: str | None) -> str:
    task = "text-classification" if "text-classification" in tags else "text-generation"
    front_matter: dict[str, Any] = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": task,
        "tags": list(dict.fromkeys(tags)),
    }
    base = record.settings.get("model") if record is not None else None
    if record is not None and isinstance(base, str) and _hub_name(record, base):
        front_matter = {"base_model": base, **front_matter}
    if dataset_name is not None and re.fullmatch(REPOSITORY, dataset_name, re.ASCII):
        front_matter["datasets"] = [dataset_name]
    return f"---\n{yaml.safe_dump(front_matter, sort_keys=False)}---"


def _introduction(source: Source) -> str:
    record = source.record
    package = _package()
    if record is None:
        return f"A causal language model, exported by {package}. No record of its training was found."
    start = escaped(_sentence_start(_model(record, record.settings.get("model"))))
    if record.is_sft:
        return f"{start}, fine-tuned on {record.facts.get('rows', 'unknown')} rows by {package}."
    estimator = escaped(public_settings(record.facts.get("kind"), record.settings).get("estimator", "unknown"))
    steps = record.facts.get("num_steps")
    done = f"{source.step} of {steps} steps" if source.step is not None else f"{steps} steps"
    return f"{start}, aligned with REINFORCE++ (estimator {estimator}, {done}) by {package}."


def _package() -> str:
    return f"reinforcepp {own_version()}"


def _sft_data(source: Source, record: RunRecord) -> str:
    inputs, measured = record.facts.get("inputs", {}), record.evaluations
    rows = [
        ("training data", _data_names(record, record.settings.get("data"))),
        ("fingerprint of the rows", inputs.get("data", "unknown")),
        ("fingerprint of the initial weights", inputs.get("model", "unknown")),
    ]
    if {"before", "after"} <= measured.keys() and not source.is_checkpoint:
        rows.append(("held-out rows", int(measured["after"]["rows"])))
        for name in ("loss", "perplexity"):
            values = [f"{measured[when][name]:.4g}" for when in ("before", "after")]
            rows.append((f"held-out {name}, before and after", " and ".join(values)))
    return "## Data and results\n\n" + _table(("item", "value"), rows)


def _data(record: RunRecord, name: str | None) -> str:
    inputs = record.facts.get("inputs", {})
    rows = [
        ("prompt data", name or _data_names(record, record.settings.get("data"))),
        ("training prompts", record.facts.get("prompts", "unknown")),
        ("held-out prompts", record.facts.get("heldout_prompts", 0)),
        ("fingerprint of the prompts", inputs.get("data", "unknown")),
        ("fingerprint of the initial weights", inputs.get("model", "unknown")),
    ]
    return "## Data\n\n" + _table(("item", "value"), rows)


def _rewards(record: RunRecord, dataset_name: str | None = None) -> str:
    parts = ["## Reward model"]
    rewards = record.facts.get("rewards", ())
    for index, reward in enumerate(rewards):
        card = reward.get("card")
        if not card:
            parts.append(f"Reward: {escaped(_reward_name(record, index, len(rewards), reward))}.")
            continue
        criteria = {each["name"]: f"output {number}" for number, each in enumerate(card.get("criteria") or (), 1)}
        accuracy = card.get("figures", {}).get("accuracy")
        rows = [
            ("base model", _model(record, card.get("base_model"))),
            ("preference data", dataset_name or _data_names(record, card.get("data"))),
            ("SHA-256 of the preferences", card.get("data_sha256", "unknown")),
            ("training pairs", card.get("train_pairs", "unknown")),
            ("held-out pairs", card.get("heldout_pairs", "unknown")),
        ]
        if outputs := {label: weight for label, weight in (reward.get("outputs") or {}).items() if weight}:
            weights = ", ".join(f"{criteria.get(label, 'output')}: {weight:g}" for label, weight in outputs.items())
            rows.append(("weights of the outputs", weights))
        if len(outputs) < 2:
            known = f"{accuracy:.3f}" if isinstance(accuracy, float) else "not measured"
            rows.append(("accuracy on held-out pairs", known))
        for criterion in card.get("criteria") or ():
            found = criterion["figures"].get("accuracy")
            if len(outputs) > 1 and criterion["name"] in outputs and isinstance(found, float):
                rows.append((f"accuracy of {criteria[criterion['name']]} on held-out pairs", f"{found:.3f}"))
        parts.append(_table(("item", "value"), rows))
    return "\n\n".join(parts)


def _results(source: Source, record: RunRecord) -> str:
    when = "after" if source.is_last else f"step {source.step}"
    before, after = record.evaluations.get("before"), record.evaluations.get(when)
    if before is None or after is None:
        return "## Results\n\nThis model wasn't evaluated on held-out prompts."
    names = {"reward": "reward", "judge": "judge, not used in training"}
    rows: list[Sequence[Any]] = []
    for metric, title in names.items():
        if (change := change_of(metric, before, after)) is not None:
            gain = f"{change.interval}: {change.outcome}"
            rows.append((title, f"{change.before:.3f}", f"{change.after:.3f}", gain))
    for metric, (title, form) in METRICS.items():
        if metric in before and metric in after:
            rows.append((title, form.format(before[metric]), form.format(after[metric]), ""))
    counts = [n for n in (record.facts.get("heldout_prompts"), record.settings.get("eval_prompts")) if n]
    return (
        f"## Results\n\nOne response to each of {min(counts, default=0)} held-out prompts. Training optimizes the reward, so a "
        "higher reward alone doesn't show that responses improved.\n\n"
        + _table(("metric", "before", "after", "change"), rows)
    )


def _settings(record: RunRecord) -> str:
    public = public_settings(record.facts.get("kind"), record.settings)
    rows = [
        (setting.name, setting.value, setting.default)
        for setting in settings_of(record)
        if setting.differs and setting.name in public
    ]
    table = _table(("setting", "value", "default"), rows) if rows else "None."
    return "## Non-default settings\n\n" + table


def _use(shown: str, adapter: bool) -> str:
    merge = f"For vLLM, merge the adapter first: `reinforcepp export {shown} --output_dir merged`"
    vllm = merge if adapter else f"With vLLM: `vllm serve {shown}`"
    return f"""## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{shown}")
model = AutoModelForCausalLM.from_pretrained("{shown}")
messages = [{{"role": "user", "content": "Your question"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=256, do_sample=True, temperature=0.7, top_p=0.9, top_k=50)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```

{vllm}. In the terminal: `reinforcepp chat {shown}`. Prompts are formatted with the tokenizer's
chat template, as in training."""


def _use_reward(shown: str) -> str:
    return f"""## Use

```python
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{shown}")
model = AutoModelForSequenceClassification.from_pretrained("{shown}")
messages = [{{"role": "user", "content": "Your question"}}, {{"role": "assistant", "content": "A response"}}]
inputs = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
print(model(**inputs).logits[0].tolist())
```

As a reward of a policy training: `reinforcepp train --reward_model {shown}`."""


def _loadable(name: str) -> str:
    """Return the name from which readers load the model."""
    return name if re.fullmatch(REPOSITORY, name, re.ASCII) and "/" in name else "PATH_OF_THIS_FOLDER"


def public_settings(kind: str | None, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the configuration ``kind`` that a card can show, see the top of this module."""
    config = next((each for each in (*TRAININGS.values(), ReinforceConfig) if each.__name__ == kind), None)
    known = accepted_values(config) if config is not None else {}
    return {
        name: value
        for name, value in settings.items()
        if name in known and name not in PER_RUN and _is_public(name, value, known[name].choices)
    }


def _is_public(name: str, value: Any, choices: Collection[Any]) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_public(name, each, choices) for each in value)
    if isinstance(value, str):
        return value in choices or (name in LAYER_NAMES and LAYER.fullmatch(value) is not None)
    return value is None or isinstance(value, int | float)


def without_private(card: RewardCard, folder: Path) -> RewardCard:
    """Return the card of a reward model, trained in ``folder``, as it can be published."""
    record = RunRecord(folder)
    model, data = _model(record, card.base_model), _data_names(record, card.data)
    settings = public_settings(RewardModelConfig.__name__, card.settings)
    return replace(card, base_model=model, data=data, settings=settings)


def _hub_name(record: RunRecord, name: str) -> bool:
    """Return whether a model probably came from the Hub: its name is valid there and isn't the path of a folder."""
    parents = (Path.cwd(), *record.folder.resolve().parents)
    return re.fullmatch(REPOSITORY, name, re.ASCII) is not None and not any(
        (parent / name).exists() for parent in parents
    )


def _model(record: RunRecord, name: Any) -> str:
    """Return the name of a model on the Hub or of the built-in one, or that the model is private."""
    if name is None:
        return "a language model"
    text = str(name)
    return text if text == MODEL_NAME or _hub_name(record, text) else LOCAL_MODEL


def _data_names(record: RunRecord, setting: Any) -> str:
    """Return the names of datasets on the Hub, tasks of reasoning-gym and the built-in data; other data is private."""
    if setting is None:
        return "passed from Python"
    parts = [part.strip().partition("?")[0] for part in str(setting).split(",")]
    names = {part.removeprefix("hub:"): part for part in parts}
    public = [
        name
        for name, part in names.items()
        if part == DATA_NAME
        or is_reasoning_gym(part)
        or (_hub_name(record, name) and all(each.hub for each in data_names(part)))
    ]
    return ", ".join([*public, *([LOCAL_DATA] if len(public) < len(names) else [])])


def _reward_name(record: RunRecord, index: int, count: int, reward: Mapping[str, Any]) -> str:
    """Return the public name of a reward without a card: a model's name on the Hub, or the name of a function."""
    sources = record.settings.get("rewards") or [record.settings.get("reward_model")]
    if len(sources) == count and reward.get("public_name") == REWARD_MODEL:
        name = str(sources[index]).rpartition("*")[2].partition("?")[0].strip()
        if "/" in name and _hub_name(record, name):
            return name
    return str(reward.get("public_name") or "a reward function")


def _sentence_start(text: str) -> str:
    return text[0].upper() + text[1:] if text.startswith("a ") else text


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head)]
    shown = [*lines, *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in shown)
