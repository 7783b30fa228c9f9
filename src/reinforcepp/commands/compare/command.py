"""The command `compare`: check the inputs, generate with both models, score the responses, print and write the results."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

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
from reinforcepp.config.data_spec import is_reasoning_gym
from reinforcepp.config.reward_spec import parse_source
from reinforcepp.data import (
    GivenRows,
    PromptRow,
    SftColumnNames,
    count,
    load_prompts,
    normalize,
    read_texts,
    resolve_data,
)
from reinforcepp.errors import DataError, RewardError
from reinforcepp.files import check_output_file, whole_file, write_json
from reinforcepp.models.devices import choose_device
from reinforcepp.models.given import check_loaded, name_of, preserve_modes
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
from reinforcepp.reports.comparison.statistics import Array, Rate, preferences, ratio_error
from reinforcepp.reports.comparison.statistics import compare as compare_scores
from reinforcepp.rewards.functions import RewardFunction, function_name
from reinforcepp.rewards.sources import RewardSum, load_rewards
from reinforcepp.rewards.trained import check_reward_folder
from reinforcepp.rollout.engine import preserve_random_state
from reinforcepp.run_dir import check_output, claim_output, clear, describe_run
from reinforcepp.runtime.process import silence
from reinforcepp.runtime.terminal import echo
from reinforcepp.training.evaluation import mean_kl, standard_error
from reinforcepp.types import Completion

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BETTER: dict[float, Better] = {0.0: "A", 0.5: "tie", 1.0: "B"}


@dataclass(frozen=True)
class Comparison(ModelComparison):
    """The results of a comparison: of both models (``metrics``), and each pair of responses (``pairs``)."""

    @property
    def win_rate(self) -> Rate:
        """The share of comparisons that B wins, a tie counting as half: its value, and the 95% interval from low to high."""
        return self.outcome.win_rate

    @property
    def winner(self) -> Literal["A", "B"] | None:
        """The better model, or None if the comparison is inconclusive."""
        return self.outcome.winner

    @property
    def kl(self) -> dict[str, float | None]:
        """The KL to the reference by side, in nats per token; None where it isn't defined or the side is the reference."""
        return {side: metrics.kl for side, metrics in self.metrics.items()}

    def __str__(self) -> str:
        """Return the verdict."""
        return report.verdict(self)

    def save(self, output: str | Path) -> Path:
        """Write the page with metrics and responses to ``output`` and return its path.

        Raises:
            ConfigError: The file can't be written.
        """
        path = check_output_file(str(output))
        with whole_file(path) as file:
            file.write(as_page(self))
        return path


@dataclass(frozen=True)
class Given:
    """What a Python program passes instead of names: rows, loaded models by side, their tokenizer, and a judge."""

    rows: GivenRows | None = None
    models: Mapping[str, PreTrainedModel] = field(default_factory=dict)
    processing_class: PreTrainedTokenizerBase | None = None
    judge: RewardFunction | None = None


def compare(
    model_a: str | Path | PreTrainedModel,
    model_b: str | Path | PreTrainedModel,
    data: str | Path | Dataset | Iterable[Mapping[str, Any]] = CompareConfig.data,
    *,
    judge: str | Path | RewardFunction = CompareConfig.judge,
    reference: str | Path | None = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    prompt_column: str = CompareConfig.prompt_column,
    chosen_column: str = CompareConfig.chosen_column,
    rejected_column: str = CompareConfig.rejected_column,
    columns: Sequence[str] = (),
    heldout_fraction: float = CompareConfig.heldout_fraction,
    seed: int = CompareConfig.seed,
    max_prompts: int = CompareConfig.max_prompts,
    num_samples: int = CompareConfig.num_samples,
    max_prompt_length: int | None = None,
    max_new_tokens: int = CompareConfig.max_new_tokens,
    temperature: float = CompareConfig.temperature,
    top_p: float = CompareConfig.top_p,
    top_k: int = CompareConfig.top_k,
    engine: Literal["auto", "transformers", "vllm"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    tie_margin: float = CompareConfig.tie_margin,
    bootstrap_samples: int = CompareConfig.bootstrap_samples,
    use_cpu: bool = CompareConfig.use_cpu,
    verbose: bool = False,
) -> Comparison:
    """Compare two models' responses to the same prompts, with shared sampling seeds.

    Example:
        >>> from reinforcepp import compare
        >>> settings = {"max_prompts": 4, "max_new_tokens": 8}
        >>> result = compare("builtin:tiny", "builtin:tiny", "builtin:network", **settings)
        >>> result.win_rate.value, result.winner, len(result.pairs)
        (0.5, None, 4)

    Args:
        model_a: Model A: builtin:tiny, a folder, a Hub name, or a loaded model, which stays as it is.
        model_b: Model B, whose win rate is reported.
        data: Rows with a ``prompt``, which are all used; or prompt file, or builtin:network, of which the held-out prompts are.
        judge: Scores responses: builtin:judge for builtin:network, a reward model folder, another reward's name, such as
            my.py:f or judge:MODEL?rubric=..., or a reward function. Prompts are skipped if it gives no score (None).
        reference: Reference model of the KL; default: model A.
        processing_class: The tokenizer of loaded models; default: that of the folder they were loaded from.
        prompt_column: Column with the prompt.
        chosen_column: Column with the preferred response.
        rejected_column: Column with the other response.
        columns: Column names, NAME=COLUMN (prompt=question), also for reward functions.
        heldout_fraction: Fraction of prompts held out for evaluation; built-in data has its own split.
        seed: Seed of the split (use that of the training), sampling and intervals.
        max_prompts: Number of held-out prompts, chosen at random; 0 uses all.
        num_samples: Responses per prompt and model; the n-th of A is compared with the n-th of B.
        max_prompt_length: Most tokens of a formatted prompt. Default: what the context leaves.
        max_new_tokens: Maximum length of a response, in tokens.
        temperature: Sampling temperature; 1 is the model's distribution, 0 greedy, generate uses 0.7.
        top_p: Sample from the likeliest tokens with this probability; KL needs 1.
        top_k: Sample from this many likeliest tokens; 0 disables, KL needs 0.
        engine: Engine; auto uses vLLM if it is installed and runs both models. For loaded models, auto is transformers.
        dtype: Data type of the weights; auto: the models' on a GPU, float32 on a CPU. Loaded models keep their own.
        tie_margin: Score difference up to which a comparison is a tie.
        bootstrap_samples: Bootstrap resamples of the prompts for the 95% intervals.
        use_cpu: Compute on the CPU and hide the GPUs from this process.
        verbose: Print progress and notes to standard error.

    Returns:
        The win rate of B with its interval, the metrics of both models, such as the KL, and the pairs of responses.

    Raises:
        ReinforceError: A setting is invalid, or a model, the data or the judge can't be used.
    """
    named = isinstance(data, (str, Path))
    judge_function = None if isinstance(judge, (str, Path)) else judge
    loaded = {"A": check_loaded(model_a, "model_a"), "B": check_loaded(model_b, "model_b")}
    given = Given(
        rows=None if isinstance(data, (str, Path)) else GivenRows.of(data, "data"),
        models={side: model for side, model in loaded.items() if model is not None},
        processing_class=processing_class,
        judge=judge_function,
    )
    config = CompareConfig(
        model_a=name_of(model_a) if loaded["A"] is None else "model_a",
        model_b=name_of(model_b) if loaded["B"] is None else "model_b",
        data=str(data) if named else "data",
        judge=str(judge) if judge_function is None else function_name(judge_function),
        reference=None if reference is None else str(reference),
        prompt_column=prompt_column,
        chosen_column=chosen_column,
        rejected_column=rejected_column,
        columns=tuple(columns),
        heldout_fraction=heldout_fraction if named else 0.0,
        seed=seed,
        max_prompts=max_prompts,
        num_samples=num_samples,
        max_prompt_length=max_prompt_length,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        engine=engine,
        dtype=dtype,
        tie_margin=tie_margin,
        bootstrap_samples=bootstrap_samples,
        use_cpu=use_cpu,
    )
    with (
        silence(not verbose),
        preserve_random_state(),
        preserve_modes(loaded["A"]),
        preserve_modes(loaded["B"]),
    ):
        return compare_models(config, given)


def run_compare(config: CompareConfig) -> Comparison:
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
        comparison.save(folder / "compare.html")
    echo(
        f"Saved compare.json, answers.jsonl and compare.html to {folder}. Open compare.html to vote yourself.", "green"
    )
    report.show(comparison)
    return comparison


def compare_models(config: CompareConfig, given: Given | None = None) -> Comparison:
    """Return all responses and metrics. Everything that small files reveal is checked before any weights are loaded."""
    choose_device(config.use_cpu)
    given = given or Given()
    rows = prompts_to_answer(config, given.rows)
    named: RewardFunction | str = config.judge_name if given.judge is None else given.judge
    judge: RewardSum | str
    if isinstance(named, str) and parse_source(named).kind == "model":
        check_reward_folder(named)
        judge = named  # Its weights are loaded after those of both models.
    else:
        judge = load_rewards(named)
    models = prepare(config, rows, given.models, given.processing_class)
    choice = choose_for_both(config, models)
    chosen = chosen_answers(config, rows, given.rows)
    measured = measure(config, models, choice, chosen)
    scores = keep_scored(config, measured, judge_scores(config, measured.responses, judge))
    shaped = {side: _by_prompt(scores[side], config) for side in SIDES}
    lengths = {side: _by_prompt([float(len(c.text)) for c in measured.responses[side]], config) for side in SIDES}
    outcome = compare_scores(
        shaped["A"],
        shaped["B"],
        lengths["A"],
        lengths["B"],
        margin=config.tie_margin,
        resamples=config.bootstrap_samples,
        seed=config.seed,
    )
    reference = reference_of(config)
    notes = [*caveats(config, has_folder=given.judge is None), *measured.notes, *report.limits(outcome)]
    if not chosen:
        column = config.column_names["chosen_column"]
        notes.append(f"Skipped the perplexity: {config.data} has no responses in column {column!r} for these prompts.")
    return Comparison(
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


def prompts_to_answer(config: CompareConfig, given: GivenRows | None = None) -> list[PromptRow]:
    """Return the held-out prompts, or all if none are held out, sampled down to ``max_prompts`` by the seed.

    Raises:
        ReinforceError: As :func:`~reinforcepp.data.load_prompts`.
    """
    data, seen, heldout = load_prompts(
        config.data if given is None else given,
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


def chosen_answers(config: CompareConfig, rows: Sequence[PromptRow], given: GivenRows | None = None) -> list[Chosen]:
    """Return the distinct chosen responses of the data for the prompts: the answers that SFT would train on, if any."""
    if given is None and is_reasoning_gym(config.data):  # An entry's answer isn't a response: it lacks the tags.
        return []
    files = resolve_data(config.data if given is None else given)
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


def judge_scores(
    config: CompareConfig, responses: Mapping[str, Sequence[Completion]], reward: str | RewardSum
) -> dict[str, list[float | None]]:
    """Return the judge's score of every response, None if it gave none.

    A response that both models gave is scored once, because its score depends on the other texts of its batch by rounding.
    """
    judge = reward if isinstance(reward, RewardSum) else load_rewards(reward)
    for trained in judge.trained if torch.cuda.is_available() else ():
        trained.model.to("cuda")
    distinct = {_identity(response): response for side in SIDES for response in responses[side]}
    echo(f"{config.judge_name} scores {count(len(distinct), 'distinct response')}")
    scores = dict(zip(distinct, judge.score(list(distinct.values())).total, strict=True))
    return {side: [scores[_identity(response)] for response in responses[side]] for side in SIDES}


def keep_scored(
    config: CompareConfig, measured: Measurements, totals: Mapping[str, Sequence[float | None]]
) -> dict[str, list[float]]:
    """Drop the prompts with a response that the judge didn't score from ``measured``, and return the other scores.

    Raises:
        RewardError: No prompt is left.
    """
    size, rows = config.num_samples, range(len(totals["A"]))
    starts = [
        start
        for start in rows[::size]
        if all(score is not None for side in SIDES for score in totals[side][start : start + size])
    ]
    prompts = len(rows) // size
    if not starts:
        raise RewardError(
            f"judge: {config.judge_name} scored all responses of no prompt, of {prompts}. Use another judge or more prompts."
        )
    if len(starts) < prompts:
        skipped = f"{prompts - len(starts)} of {count(prompts, 'prompt')}"
        measured.notes.append(f"Skipped {skipped}: the judge didn't score all of their responses.")
    kept = [row for start in starts for row in range(start, start + size)]
    measured.responses = {side: [found[row] for row in kept] for side, found in measured.responses.items()}
    measured.kl_sums = {side: [found[row] for row in kept] for side, found in measured.kl_sums.items()}
    return {side: [score for row in kept if (score := totals[side][row]) is not None] for side in SIDES}


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
