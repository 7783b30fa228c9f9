"""The model card: the origin of a model, its training, its metrics, and how to load it.

Names, settings and paths come from users, so they are escaped. The card shows only the last part of a path, because its
readers don't know the author's folders.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from reinforcepp.config.hub import REPOSITORY
from reinforcepp.files import whole_file
from reinforcepp.monitoring.metric_delta import change_of
from reinforcepp.monitoring.run_record import RunRecord
from reinforcepp.reports.run.settings import PER_RUN, settings_of
from reinforcepp.rewards.card import RewardCard
from reinforcepp.runtime import own_version
from reinforcepp.terminal import printable
from reinforcepp.training.publish.source import Source

CARD = "README.md"
SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#!|~&:@])")
SHOWN_ELSEWHERE = ("model", "data", "reward_model", "judge")
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
    start = escaped(_model(record, record.settings.get("model", "A language model")))
    parts = [
        _front_matter(record, [*REWARD_TAGS, *tags], adapter, dataset_name),
        f"# {escaped(name)}",
        f"{start}, trained on preferences as a reward model by {_package()}.",
        _rewards(record),
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
    start = escaped(_model(record, record.settings.get("model", "A language model")))
    if record.is_sft:
        return f"{start}, fine-tuned on {record.facts.get('rows', 'unknown')} rows by {package}."
    estimator = escaped(record.settings.get("estimator", "unknown"))
    steps = record.facts.get("num_steps")
    done = f"{source.step} of {steps} steps" if source.step is not None else f"{steps} steps"
    return f"{start}, aligned with REINFORCE++ (estimator {estimator}, {done}) by {package}."


def _package() -> str:
    return f"reinforcepp {own_version()}"


def _sft_data(source: Source, record: RunRecord) -> str:
    inputs, measured = record.facts.get("inputs", {}), record.evaluations
    rows = [
        ("training data", _file_names(record.settings.get("data", "unknown"))),
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
        ("prompt data", name or _file_names(record.settings.get("data", "a Python program"))),
        ("training prompts", record.facts.get("prompts", "unknown")),
        ("held-out prompts", record.facts.get("heldout_prompts", 0)),
        ("fingerprint of the prompts", inputs.get("data", "unknown")),
        ("fingerprint of the initial weights", inputs.get("model", "unknown")),
    ]
    return "## Data\n\n" + _table(("item", "value"), rows)


def _rewards(record: RunRecord) -> str:
    parts = ["## Reward model"]
    for reward in record.facts.get("rewards", ()):
        card = reward.get("card")
        if not card:
            parts.append(f"Reward function: {escaped(reward.get('name', 'unknown'))}.")
            continue
        accuracy = card.get("figures", {}).get("accuracy")
        rows = [
            ("base model", _model(record, card.get("base_model", "unknown"))),
            ("preference data", _file_names(card.get("data", "unknown"))),
            ("SHA-256 of the preferences", card.get("data_sha256", "unknown")),
            ("training pairs", card.get("train_pairs", "unknown")),
            ("held-out pairs", card.get("heldout_pairs", "unknown")),
        ]
        if outputs := {label: weight for label, weight in (reward.get("outputs") or {}).items() if weight}:
            rows.append(
                ("weights of the outputs", ", ".join(f"{label} {weight:g}" for label, weight in outputs.items()))
            )
        if len(outputs) < 2:
            known = f"{accuracy:.3f}" if isinstance(accuracy, float) else "not measured"
            rows.append(("accuracy on held-out pairs", known))
        for criterion in card.get("criteria") or ():
            found = criterion["figures"].get("accuracy")
            if len(outputs) > 1 and criterion["name"] in outputs and isinstance(found, float):
                rows.append((f"accuracy by {criterion['name']} on held-out pairs", f"{found:.3f}"))
        parts.append(_table(("item", "value"), rows))
    return "\n\n".join(parts)


def _results(source: Source, record: RunRecord) -> str:
    when = "after" if source.is_last else f"step {source.step}"
    before, after = record.evaluations.get("before"), record.evaluations.get(when)
    if before is None or after is None:
        return "## Results\n\nThis model wasn't evaluated on held-out prompts."
    judge = f"judge ({record.facts.get('judge')}), not used in training"
    names = {"reward": "reward", "judge": judge}
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
    rows = [
        (setting.name, setting.value, setting.default)
        for setting in settings_of(record)
        if setting.differs and setting.name not in SHOWN_ELSEWHERE
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


def without_folders(card: RewardCard, folder: Path) -> RewardCard:
    """Return the card of a reward model, trained in ``folder``, without the names of the author's other folders."""
    names = {"model": _model(RunRecord(folder), card.base_model), "data": _file_names(card.data)}
    settings = {name: value for name, value in card.settings.items() if name not in PER_RUN}
    return replace(card, base_model=names["model"], data=names["data"], settings=settings | names)


def _hub_name(record: RunRecord, name: str) -> bool:
    """Return whether a model probably came from the Hub: its name is valid there and isn't the path of a folder."""
    parents = (Path.cwd(), *record.folder.resolve().parents)
    return re.fullmatch(REPOSITORY, name, re.ASCII) is not None and not any(
        (parent / name).exists() for parent in parents
    )


def _model(record: RunRecord, name: Any) -> str:
    text = str(name)
    return text if text.startswith("builtin:") or _hub_name(record, text) else _file_names(text)


def _file_names(paths: Any) -> str:
    """Return the last part of each of the comma-separated paths."""
    return ", ".join(path.strip().rstrip("/").rpartition("/")[2] for path in str(paths).split(","))


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [head, ["---"] * len(head)]
    shown = [*lines, *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in shown)
