"""The command `compare`: check the inputs, generate with both models, score the responses, print and write the results."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
import torch

from reinforcepp.commands.compare.measurement import (
    SIDES,
    Chosen,
    Measurements,
    choose_for_both,
    measure,
    prepare,
    reference_of,
)
from reinforcepp.commands.compare.provenance import caveats
from reinforcepp.config import CompareConfig, as_dict
from reinforcepp.data import PromptRow, SftColumnNames, count, load_prompts, normalize, read_texts, resolve_data
from reinforcepp.data.builtin import JUDGE_NAME
from reinforcepp.errors import DataError
from reinforcepp.files import whole_file, write_json
from reinforcepp.monitoring import echo
from reinforcepp.reports.comparison import text as report
from reinforcepp.reports.comparison.page import as_page
from reinforcepp.reports.comparison.result import (
    Better,
    ModelComparison,
    ModelMetrics,
    Pair,
    distinct_ngrams,
    distinct_share,
    mean_by_prompt,
)
from reinforcepp.reports.comparison.statistics import Array, compare, preferences, ratio_error
from reinforcepp.rewards.sources import load_rewards
from reinforcepp.rewards.trained import check_reward_folder
from reinforcepp.run_dir import check_output, claim_output, clear, describe_run
from reinforcepp.training.evaluation import mean_kl, standard_error
from reinforcepp.types import Completion

BETTER: dict[float, Better] = {0.0: "A", 0.5: "tie", 1.0: "B"}


def run_compare(config: CompareConfig) -> ModelComparison:
    """Compare the two models, write ``config.output_dir``, and print the results, the verdict last.

    Raises:
        ReinforceError: A model, the data, the judge, or the folder is unusable; nothing is written.
    """
    folder = check_output(config.output_dir, overwrite=config.overwrite)
    with claim_output(config.output_dir, overwrite=config.overwrite):
        comparison = compare_models(config)
        clear(folder)
        describe_run(folder, as_dict(config), {})
        with whole_file(folder / "answers.jsonl") as file:
            file.writelines(json.dumps(pair.record(), ensure_ascii=False) + "\n" for pair in comparison.pairs)
        write_json(folder / "compare.json", comparison.summary())
        with whole_file(folder / "compare.html") as file:
            file.write(as_page(comparison))
    echo(
        f"Saved compare.json, answers.jsonl and compare.html to {folder}. Open compare.html to vote yourself.", "green"
    )
    report.show(comparison)
    return comparison


def compare_models(config: CompareConfig) -> ModelComparison:
    """Return all responses and metrics. Everything that small files reveal is checked before any weights are loaded."""
    rows = prompts_to_answer(config)
    if config.judge_name != JUDGE_NAME:
        check_reward_folder(config.judge_name)
    models = prepare(config, rows)
    choice = choose_for_both(config)
    chosen = chosen_answers(config, rows)
    measured = measure(config, models, choice, chosen)
    scores = judge_scores(config, measured.responses)
    shaped = {side: _by_prompt(scores[side], config) for side in SIDES}
    lengths = {side: _by_prompt([float(len(c.text)) for c in measured.responses[side]], config) for side in SIDES}
    outcome = compare(
        shaped["A"],
        shaped["B"],
        lengths["A"],
        lengths["B"],
        margin=config.tie_margin,
        resamples=config.bootstrap_samples,
        seed=config.seed,
    )
    reference = reference_of(config)
    notes = [*caveats(config), *measured.notes, *report.limits(outcome)]
    if not chosen:
        column = config.column_names["chosen_column"]
        notes.append(f"Skipped the perplexity: {config.data} has no responses in column {column!r} for these prompts.")
    return ModelComparison(
        settings=as_dict(config),
        judge=config.judge_name,
        reference=models[reference].name if reference not in SIDES else reference,
        chosen_answers=len(chosen),
        outcome=outcome,
        metrics={side: metrics_of(config, side, measured, scores[side]) for side in SIDES},
        notes=tuple(notes),
        pairs=tuple(_pairs(config, measured.responses, scores)),
    )


# --- data -----------------------------------------------------------------------------------------------------------


def prompts_to_answer(config: CompareConfig) -> list[PromptRow]:
    """Return the held-out prompts, or all if none are held out, sampled down to ``max_prompts`` by the seed.

    Raises:
        ReinforceError: As :func:`~reinforcepp.data.load_prompts`.
    """
    data, seen, heldout = load_prompts(
        config.data,
        heldout_fraction=config.heldout_fraction,
        seed=config.seed,
        **config.column_names,
        renamed=config.renamed,
    )
    rows = heldout or seen
    if 0 < config.max_prompts < len(rows):
        indices = sorted(random.Random(config.seed).sample(range(len(rows)), config.max_prompts))
        rows = [rows[index] for index in indices]
    which = count(len(rows), "held-out prompt") if heldout else f"all {len(rows)} prompts because none are held out"
    echo(f"{data.summary()}; using {which}")
    return list(rows)


def chosen_answers(config: CompareConfig, rows: Sequence[PromptRow]) -> list[Chosen]:
    """Return the distinct chosen responses of the data for the prompts: the answers that SFT would train on, if any."""
    files = resolve_data(config.data)
    columns = {kind.removesuffix("_column"): name for kind, name in config.column_names.items()}
    names = SftColumnNames(prompt=columns["prompt"], chosen=columns["chosen"])
    try:
        answers = read_texts(files.heldout or files.train, names).rows
    except DataError:  # The data has prompts only.
        return []
    wanted = {normalize(row.prompt) for row in rows}
    distinct: dict[tuple[str, str], Chosen] = {}
    for row in answers:
        prompt = normalize(row.prompt)
        if row.question is not None and prompt in wanted:
            answer = Chosen(row.conversation, row.completion, row.chat_template_kwargs)
            distinct.setdefault((prompt, normalize(row.completion)), answer)
    return list(distinct.values())


# --- judging and measuring ------------------------------------------------------------------------------------------


def judge_scores(config: CompareConfig, responses: Mapping[str, Sequence[Completion]]) -> dict[str, list[float]]:
    """Return the judge's score of every response.

    A response that both models gave is scored once, because its score depends on the other texts of its batch by rounding.
    """
    judge = load_rewards(config.judge_name)
    for reward in judge.trained if torch.cuda.is_available() else ():
        reward.model.to("cuda")
    distinct = {_identity(response): response for side in SIDES for response in responses[side]}
    echo(f"{config.judge_name} scores {count(len(distinct), 'distinct response')}")
    scores = dict(zip(distinct, judge.score(list(distinct.values())).known, strict=True))
    return {side: [scores[_identity(response)] for response in responses[side]] for side in SIDES}


def _identity(response: Completion) -> tuple[int, str, str]:
    return response.prompt.key, response.text, response.finish_reason


def _by_prompt(values: Sequence[float], config: CompareConfig) -> Array:
    """Return the values by prompt. -> (P, S)"""
    return np.array(values, dtype=np.float64).reshape(-1, config.num_samples)


def metrics_of(config: CompareConfig, side: str, measured: Measurements, scores: Sequence[float]) -> ModelMetrics:
    """Return the metrics of one model."""
    responses = measured.responses[side]
    kl, kl_error = _kl(config, measured.kl_sums.get(side))
    texts = [response.text for response in responses]
    return ModelMetrics(
        judge=fmean(scores),
        judge_error=standard_error(mean_by_prompt(scores, config.num_samples)),
        length=fmean(len(response.ids) for response in responses),
        characters=fmean(map(len, texts)),
        truncated=fmean(response.finish_reason == "length" for response in responses),
        distinct=distinct_share(texts),
        distinct_1=distinct_ngrams(texts, 1),
        distinct_2=distinct_ngrams(texts, 2),
        kl=kl,
        kl_error=kl_error,
        perplexity=measured.perplexity.get(side),
    )


def _kl(config: CompareConfig, sums: Sequence[tuple[float, int]] | None) -> tuple[float | None, float | None]:
    """Return the mean per token and its standard error over prompts."""
    if sums is None:
        return None, None
    parts_P, sizes_P = (_by_prompt(each, config).sum(axis=1) for each in zip(*sums, strict=True))
    return mean_kl(sums), ratio_error(parts_P, sizes_P)


def _pairs(
    config: CompareConfig, responses: Mapping[str, Sequence[Completion]], scores: Mapping[str, Sequence[float]]
) -> list[Pair]:
    wins = preferences(np.array(scores["A"]), np.array(scores["B"]), config.tie_margin)
    return [
        Pair(
            prompt=a.prompt.cells["prompt"],
            chat_template_kwargs=a.prompt.chat_template_kwargs,
            sample=index % config.num_samples,
            answer_a=a.text,
            answer_b=b.text,
            score_a=scores["A"][index],
            score_b=scores["B"][index],
            better=BETTER[float(wins[index])],
            finish_a=a.finish_reason,
            finish_b=b.finish_reason,
        )
        for index, (a, b) in enumerate(zip(responses["A"], responses["B"], strict=True))
    ]
