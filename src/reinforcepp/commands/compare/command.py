"""The verb: check everything, let both models answer, have the answers judged, tell and write down what came of it."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean

import numpy as np
import torch

from reinforcepp.commands.compare.answering import SIDES, Chosen, Said, ask, choose_for_both, make_ready, reference_of
from reinforcepp.commands.compare.provenance import doubts
from reinforcepp.config import CompareConfig, as_dict
from reinforcepp.data import ColumnNames, PromptRow, count, load_prompts, normalize, read_table, resolve_data
from reinforcepp.data.builtin import JUDGE_NAME
from reinforcepp.files import whole_file, write_json
from reinforcepp.monitoring import echo
from reinforcepp.reports.comparison import text as report
from reinforcepp.reports.comparison.page import as_page
from reinforcepp.reports.comparison.result import (
    Better,
    Figures,
    ModelComparison,
    Pair,
    distinct_runs,
    distinct_share,
    mean_by_prompt,
)
from reinforcepp.reports.comparison.statistics import Array, compare, preferences, ratio_error
from reinforcepp.rewards.sources import load_rewards
from reinforcepp.rewards.trained import check_reward_folder
from reinforcepp.run_dir import check_output, clear, describe_run
from reinforcepp.training.evaluation import mean_kl, standard_error
from reinforcepp.types import Completion

BETTER: dict[float, Better] = {0.0: "A", 0.5: "tie", 1.0: "B"}


def run_compare(config: CompareConfig) -> ModelComparison:
    """Compare the two models, write ``config.output_dir`` and print the outcome, the verdict last.

    Raises:
        ReinforceError: for a model, data, a judge or a folder that can't be used; nothing is written then.
    """
    folder = check_output(config.output_dir, overwrite=config.overwrite)
    comparison = compare_models(config)
    clear(folder)
    describe_run(folder, as_dict(config), {})
    with whole_file(folder / "answers.jsonl") as file:
        file.writelines(json.dumps(asdict(pair), ensure_ascii=False) + "\n" for pair in comparison.pairs)
    write_json(folder / "compare.json", comparison.summary())
    with whole_file(folder / "compare.html") as file:
        file.write(as_page(comparison))
    echo(f"Everything is in {folder}: compare.json, answers.jsonl and, to judge for yourself, compare.html", "green")
    report.show(comparison)
    return comparison


def compare_models(config: CompareConfig) -> ModelComparison:
    """All answers and figures; what can be refused from small files alone is refused before a weight is loaded."""
    rows = prompts_to_answer(config)
    if config.judge_name != JUDGE_NAME:
        check_reward_folder(config.judge_name)
    ready = make_ready(config, rows)
    choice = choose_for_both(config)
    chosen = chosen_answers(config, rows)
    said = ask(config, ready, choice, chosen)
    scores = judged(config, said.answers)
    shaped = {side: _by_prompt(scores[side], config) for side in SIDES}
    lengths = {side: _by_prompt([float(len(c.text)) for c in said.answers[side]], config) for side in SIDES}
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
    notes = [*doubts(config), *said.notes, *report.limits(outcome)]
    if not chosen:
        column = config.column_names["chosen_column"]
        notes.append(
            f"The perplexity is left out: {config.data} has no answers in a column {column!r} for these prompts."
        )
    return ModelComparison(
        settings=as_dict(config),
        judge=config.judge_name,
        reference=ready[reference].name if reference not in SIDES else reference,
        chosen_answers=len(chosen),
        outcome=outcome,
        figures={side: figures_of(config, side, said, scores[side]) for side in SIDES},
        notes=tuple(notes),
        pairs=tuple(_pairs(config, said.answers, scores)),
    )


# --- data -----------------------------------------------------------------------------------------------------------


def prompts_to_answer(config: CompareConfig) -> list[PromptRow]:
    """The held-out prompts, all where none is held out, or a choice among them that the seed decides.

    Raises:
        ReinforceError: as :func:`~reinforcepp.data.load_prompts`.
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
        places = sorted(random.Random(config.seed).sample(range(len(rows)), config.max_prompts))
        rows = [rows[place] for place in places]
    which = f"{count(len(rows), 'held-out prompt')}" if heldout else f"no prompt is held out, so all {len(rows)}"
    echo(f"{data.summary()}; {which} to answer")
    return list(rows)


def chosen_answers(config: CompareConfig, rows: Sequence[PromptRow]) -> list[Chosen]:
    """Each different answer that the data calls chosen for one of the prompts; none where it has no such texts."""
    files = resolve_data(config.data)
    names = ColumnNames(*config.column_names.values())
    table = read_table(files.heldout or files.train, names, pairs=False)
    wanted = {normalize(row.prompt) for row in rows}
    different: dict[tuple[str, str], Chosen] = {}
    for row in table.rows:
        prompt, chosen = row.texts[0], row.cells.get(names.chosen)
        if isinstance(chosen, str) and chosen.strip() and normalize(prompt) in wanted:
            different.setdefault((normalize(prompt), normalize(chosen)), (prompt, chosen))
    return list(different.values())


# --- judging and measuring ------------------------------------------------------------------------------------------


def judged(config: CompareConfig, answers: Mapping[str, Sequence[Completion]]) -> dict[str, list[float]]:
    """The judge's score of every answer.

    What both models said is scored once: its score would hang, by rounding, on the other texts of its batch.
    """
    judge = load_rewards(config.judge_name)
    for reward in judge.trained if torch.cuda.is_available() else ():
        reward.model.to("cuda")
    different = {_identity(answer): answer for side in SIDES for answer in answers[side]}
    echo(f"{config.judge_name} scores {count(len(different), 'different answer')}")
    scores = dict(zip(different, judge.score(list(different.values())).known, strict=True))
    return {side: [scores[_identity(answer)] for answer in answers[side]] for side in SIDES}


def _identity(answer: Completion) -> tuple[int, str, str]:
    return answer.prompt.key, answer.text, answer.finish_reason


def _by_prompt(values: Sequence[float], config: CompareConfig) -> Array:
    """-> (P, S)"""
    return np.array(values, dtype=np.float64).reshape(-1, config.num_samples)


def figures_of(config: CompareConfig, side: str, said: Said, scores: Sequence[float]) -> Figures:
    """One model's figures."""
    answers = said.answers[side]
    kl, kl_error = _kl(config, said.kl_sums.get(side))
    texts = [answer.text for answer in answers]
    return Figures(
        judge=fmean(scores),
        judge_error=standard_error(mean_by_prompt(scores, config.num_samples)),
        length=fmean(len(answer.ids) for answer in answers),
        characters=fmean(map(len, texts)),
        truncated=fmean(answer.finish_reason == "length" for answer in answers),
        distinct=distinct_share(texts),
        distinct_1=distinct_runs(texts, 1),
        distinct_2=distinct_runs(texts, 2),
        kl=kl,
        kl_error=kl_error,
        perplexity=said.perplexity.get(side),
    )


def _kl(config: CompareConfig, sums: Sequence[tuple[float, int]] | None) -> tuple[float | None, float | None]:
    """Mean per token and its standard error over prompts."""
    if sums is None:
        return None, None
    parts_P, sizes_P = (_by_prompt(each, config).sum(axis=1) for each in zip(*sums, strict=True))
    return mean_kl(sums), ratio_error(parts_P, sizes_P)


def _pairs(
    config: CompareConfig, answers: Mapping[str, Sequence[Completion]], scores: Mapping[str, Sequence[float]]
) -> list[Pair]:
    wins = preferences(np.array(scores["A"]), np.array(scores["B"]), config.tie_margin)
    return [
        Pair(
            prompt=a.prompt.text,
            sample=place % config.num_samples,
            answer_a=a.text,
            answer_b=b.text,
            score_a=scores["A"][place],
            score_b=scores["B"][place],
            better=BETTER[float(wins[place])],
            finish_a=a.finish_reason,
            finish_b=b.finish_reason,
        )
        for place, (a, b) in enumerate(zip(answers["A"], answers["B"], strict=True))
    ]
