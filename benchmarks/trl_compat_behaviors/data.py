"""Behaviors of the datasets: formats of prompts, streams, evaluation sets and the order of rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset, DatasetDict, IterableDataset, IterableDatasetDict

from .common import (
    PROMPTS,
    Library,
    Part,
    Recorder,
    error_of,
    load_tokenizer,
    make,
    prompts,
    reads_prompts,
    train,
    trained,
    variant,
)

part = Part("data")


def format_trains(lib: Library, folder: Path, conversational: bool) -> None:
    data, recorder = prompts(conversational=conversational), Recorder()
    trained(lib, folder, train_dataset=data, reward_funcs=recorder)
    assert all(prompt in list(data["prompt"]) for prompt in recorder.all("prompts"))


part.behavior("standard-prompts", "test_train_dataset_format")(partial(format_trains, conversational=False))
part.behavior("conversational-prompts", "test_train_dataset_format")(partial(format_trains, conversational=True))


@part.behavior("prompt-as-TRL-writes-it-standard", "RLOOTrainer._tokenize_prompts")
def plain_prompt(lib: Library, folder: Path) -> None:
    data, tokenizer = prompts(2), load_tokenizer()
    reads_prompts(lib, folder, data, [tokenizer(text)["input_ids"] for text in data["prompt"]])


@variant("prompt-as-TRL-writes-it-standard", "small change", 'prompt_format="plain", if the model has a chat template')
def plain_prompt_format(lib: Library, folder: Path) -> None:
    data, tokenizer = prompts(2), load_tokenizer()
    expected = [tokenizer(text)["input_ids"] for text in data["prompt"]]
    reads_prompts(lib, folder, data, expected, {"prompt_format": "plain"})


def conversation_as_templated(lib: Library, folder: Path, data: Dataset) -> None:
    form = partial(load_tokenizer().apply_chat_template, add_generation_prompt=True, return_dict=False)
    reads_prompts(lib, folder, data, [form(messages) for messages in data["prompt"]])


for id, data in {
    "conversational": prompts(2, conversational=True),
    "system": prompts(2, system="Answer in one sentence."),
    "multiturn": Dataset.from_dict(
        {
            "prompt": [
                [
                    {"role": "user", "content": text},
                    {"role": "assistant", "content": "Do you have root?"},
                    {"role": "user", "content": "Yes, I do."},
                ]
                for text in PROMPTS[:2]
            ]
        }
    ),
}.items():
    part.behavior(f"prompt-as-TRL-writes-it-{id}", "RLOOTrainer._tokenize_prompts")(
        partial(conversation_as_templated, data=data)
    )


@part.behavior("iterable-dataset", "test_train_with_iterable_dataset")
def iterable(lib: Library, folder: Path) -> None:
    trainer = trained(lib, folder, {"max_steps": 3}, train_dataset=prompts(2).to_iterable_dataset())
    assert trainer.state.global_step == 3


@part.behavior("iterable-endless", "IterableDataset with max_steps")
def endless(lib: Library, folder: Path) -> None:
    read = []

    def rows() -> Iterator[dict[str, str]]:
        while len(read) < 20_000:  # as good as endless for a run of two steps
            read.append(PROMPTS[len(read) % 8])
            yield {"prompt": read[-1]}

    trained(lib, folder, train_dataset=IterableDataset.from_generator(rows))
    assert len(read) < 5_000, f"read {len(read)} rows for 2 steps"


@part.behavior("train_dataset-required", "test_train_dataset_required")
def train_dataset_required(lib: Library, folder: Path) -> None:
    assert "train_dataset" in error_of(lambda: make(lib, folder, train_dataset=None))


def evaluation_set(lib: Library, folder: Path, data: Any) -> None:
    trainer = make(lib, folder, {"per_device_eval_batch_size": 3}, eval_dataset=data)
    metrics = trainer.evaluate()
    if isinstance(data, dict):
        assert set(trainer.eval_dataset) == {"data1", "data2"}
        assert all(any(key.startswith(f"eval_{name}_") for key in metrics) for name in ("data1", "data2"))
    else:
        assert trainer.eval_dataset is data
        assert metrics["eval_reward"] > 0
    train(trainer)


rows = prompts(2)
stream = rows.to_iterable_dataset()
for id, data in {
    "dataset": rows,
    "iterable_dataset": stream,
    "dataset_dict": DatasetDict(data1=rows, data2=rows),
    "iterable_dataset_dict": IterableDatasetDict(data1=stream, data2=stream),
    "dict_of_dataset": {"data1": rows, "data2": rows},
}.items():
    part.behavior(f"eval_dataset-{id}", "test_init_with_eval_dataset")(partial(evaluation_set, data=data))


@part.behavior("eval_dataset-none", "test_init_with_eval_dataset")
def no_evaluation_set(lib: Library, folder: Path) -> None:
    assert trained(lib, folder, eval_dataset=None).eval_dataset is None


@part.behavior("extra-column-to-reward", "test_train_reward_func_additional_column")
def extra_column(lib: Library, folder: Path) -> None:
    data, recorder = prompts(topic=["routes", "gateway", "ports", "names"]), Recorder()
    topics = dict(zip(data["prompt"], data["topic"], strict=True))
    trained(lib, folder, train_dataset=data, reward_funcs=recorder)
    assert recorder.all("topic") == [topics[prompt] for prompt in recorder.all("prompts")]


@part.behavior("shuffle_dataset-False", "test_prepare_input_called_with_correct_data")
def order_kept(lib: Library, folder: Path) -> None:
    recorder = Recorder()
    settings = {"shuffle_dataset": False, "max_steps": 8, "learning_rate": 1e-3}
    trained(lib, folder, settings, train_dataset=prompts(8), reward_funcs=recorder)
    assert recorder.all("prompts")[::3] == PROMPTS


@part.behavior("dataloader_num_workers", "test_train_multiple_dataloader_workers")
def workers(lib: Library, folder: Path) -> None:
    trained(lib, folder, {"dataloader_num_workers": 2})
