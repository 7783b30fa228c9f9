"""The responses of models, which generate them in the background, and reward models that order units."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from reinforcepp.commands.generate import load_scorer, sampling_of, started
from reinforcepp.commands.label.files import units_of
from reinforcepp.config import GenerateConfig, LabelConfig
from reinforcepp.config.base import MAX_SEED
from reinforcepp.data import PromptRow, load_prompts
from reinforcepp.data.feedback import Answer, NewUnit, Store
from reinforcepp.data.feedback.answer_files import TOPICS, Answered
from reinforcepp.data.feedback.records import prompt_digest
from reinforcepp.data.rows import template_variables
from reinforcepp.labeling.generation import BackgroundGeneration
from reinforcepp.labeling.units import Score
from reinforcepp.rewards.trained import TrainedReward, check_reward_folder
from reinforcepp.runtime.terminal import echo


@contextmanager
def generation(config: LabelConfig, store: Store, scores: Sequence[Score]) -> Iterator[BackgroundGeneration]:
    """Load the models, and yield the generation of their responses, which has yet to be started.

    Raises:
        ReinforceError: The prompts or a model can't be used.
    """
    rows = _prompts(config, store)
    slots = _slots(config)
    with ExitStack() as stack:
        engines = {}
        for model in config.models if rows else ():
            settings = _settings(config, model, config.temperature[0])
            engines[model] = stack.enter_context(started(settings, rows))

        def respond(indices: Sequence[int]) -> list[NewUnit]:
            answers: dict[int, list[Answer]] = {index: [] for index in indices}
            for index, ((model, temperature), number) in enumerate(slots.items()):
                engine, prompts = engines[model]
                sampling = sampling_of(_settings(config, model, temperature), number)
                # With shared sampling seeds, responses at two temperatures are often the same.
                sampling = replace(sampling, seed=(config.seed + index) % MAX_SEED)
                completions = engine.generate([prompts[row] for row in indices], sampling)
                for completion in completions:
                    answers[completion.prompt.key].append(
                        Answer(
                            completion.text,
                            model,
                            parameters(config, temperature),
                            completion.finish_reason == "length",
                        )
                    )
            return units_of(config, [_answered(rows[index], answers[index]) for index in indices], scores)

        made = BackgroundGeneration(store, rows, respond)
        try:
            yield made
        finally:
            made.stop()


def parameters(config: LabelConfig, temperature: float) -> dict[str, float]:
    """Return the sampling parameters that are stored with a response."""
    return {
        "temperature": temperature,
        "top_p": config.top_p,
        "max_new_tokens": config.max_new_tokens,
        "seed": config.seed,
    }


def load_scores(config: LabelConfig) -> list[Score]:
    """Load the reward models for ``select uncertain``; none otherwise.

    Raises:
        ModelError: A reward model can't be loaded.
    """
    for name in config.reward_model:
        check_reward_folder(name)
    return [_score(load_scorer(name)) for name in config.reward_model]


def _score(reward: TrainedReward) -> Score:
    def score(answered: Sequence[Answered]) -> list[list[float]]:
        flat = [(each, answer) for each in answered for answer in each.answers]
        scores = iter(
            reward(
                [each.prompt for each, _ in flat],
                [answer.text for _, answer in flat],
                ["length" if answer.truncated else "stop" for _, answer in flat],
                chat_template_kwargs=[template_variables(each.columns) for each, _ in flat],
            )
            if flat
            else []
        )
        return [[next(scores) for _ in each.answers] for each in answered]

    return score


def _slots(config: LabelConfig) -> Counter[tuple[str, float]]:
    """Return how many responses to a prompt come from each model at each temperature."""
    return Counter(
        (config.models[i % len(config.models)], config.temperature[i % len(config.temperature)])
        for i in range(config.answers_per_prompt)
    )


def _prompts(config: LabelConfig, store: Store) -> list[PromptRow]:
    """Return the prompts without responses by these models with these sampling parameters, in random order.

    Prompts that the data holds out for evaluations aren't labeled.
    """
    data, seen, _ = load_prompts(config.data or "builtin:network", heldout_fraction=0.0, seed=config.seed)
    echo(data.summary())
    rows = [*seen]
    random.Random(config.seed).shuffle(rows)
    rows = rows[: config.max_prompts or None]
    known = set.intersection(*(store.answered(model, parameters(config, each)) for model, each in _slots(config)))
    return [row for row in rows if _digest(row) not in known]


def _digest(row: PromptRow) -> str:
    return prompt_digest(_prompt(row), row.columns)


def _prompt(row: PromptRow) -> str | list[dict[str, object]]:
    return [dict(each) for each in row.messages] or row.prompt


def _answered(row: PromptRow, answers: Sequence[Answer]) -> Answered:
    distinct = {each.text.strip(): each for each in answers if each.text.strip()}
    topic = next((str(row.columns[name]) for name in TOPICS if row.columns.get(name)), None)
    return Answered(_prompt(row), tuple(distinct.values()), False, topic, row.columns)


def _settings(config: LabelConfig, model: str, temperature: float) -> GenerateConfig:
    return GenerateConfig(
        model=model,
        max_new_tokens=config.max_new_tokens,
        temperature=temperature,
        top_p=config.top_p,
        top_k=0,
        seed=config.seed,
        engine=config.engine,
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
        use_cpu=config.use_cpu,
    )
