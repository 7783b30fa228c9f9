"""``--dry_run``: print the inputs of a training without reading weights or writing files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from reinforcepp.config import PlanConfig, RewardModelConfig, SftConfig, TrainConfig, as_dict
from reinforcepp.data import load_preferences, load_prompts, load_texts
from reinforcepp.environments.episodes import EpisodeRunner
from reinforcepp.models.chat_template import with_chat_template
from reinforcepp.models.conversations import format_example, turn_format
from reinforcepp.models.loading import load_config, load_tokenizer, prompt_limit
from reinforcepp.models.remote_code import allow_remote_code
from reinforcepp.models.tokenization import encode, encode_prompts, end_token_id, split_example
from reinforcepp.planner.command import make_plan, show_plan
from reinforcepp.runtime.terminal import echo, print_output
from reinforcepp.training.episodes import episode_runner, start_environments, template_variables
from reinforcepp.training.precision import with_precision
from reinforcepp.training.schedule import with_learning_rate
from reinforcepp.training.sft_trainer import to_example
from reinforcepp.types import Completion, Preference, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 3
STAND_IN = "..."


def run_dry_run(config: SftConfig | RewardModelConfig | TrainConfig) -> None:
    """Print the settings, the plan and the first rows of a training.

    Raises:
        ReinforceError: For every error that would stop the training before its weights are read.
    """
    if config.trust_remote_code:
        allow_remote_code(config.model)
    model_config = load_config(config.model)
    chosen = with_learning_rate(config, model_config)
    if config.mixed_precision == "auto" or not isinstance(config, TrainConfig):  # otherwise the plan warns about it
        chosen, _ = with_precision(chosen, model_config)
    if isinstance(config, SftConfig):
        show_sft(config)
    elif isinstance(config, RewardModelConfig):
        show_reward_training(config)
    else:
        show_training(config, chosen.mixed_precision)


def show_training(config: TrainConfig, precision: str) -> None:
    """Print the settings, the plan with this precision, and the first prompts of a policy training.

    Raises:
        ReinforceError: For every error that would stop the training before its weights are read.
    """
    data, rows, _ = load_prompts(config.data, **_columns(config), renamed=config.renamed, streaming=config.streaming)
    tokenizer = with_chat_template(load_tokenizer(config.model), config)
    planned = {name.name: getattr(config, name.name) for name in fields(TrainConfig)}
    plan = make_plan(PlanConfig(**planned | {"mixed_precision": precision}))
    _write("Settings", settings(config))
    print_output("\nPlan")
    show_plan(plan)
    limit = prompt_limit(load_config(config.model), config.max_prompt_length, config.max_new_tokens, config.max_length)
    action = config.long_prompts
    make = start_environments(config, None, tokenizer)
    variables = template_variables(make)
    prompts, _ = encode_prompts(
        tokenizer, rows[:ROWS], max_prompt_length=limit, long_prompts=action, variables=variables
    )
    if (runner := episode_runner(config, make, tokenizer, limit, None)) is not None:
        show_episodes(runner, prompts, config.max_new_tokens)
    else:
        for number, prompt in enumerate(prompts, 1):
            note = "; only the completion that follows is trained on"
            mask = [False] * len(prompt.ids)
            _write(f"Prompt {number}: {len(prompt.ids)} tokens{note}", _row(tokenizer, prompt.ids, mask))
    echo(f"{data.summary()}. Nothing was loaded or written. To train, omit --dry_run.", "green")


def show_episodes(runner: EpisodeRunner, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
    """Print an episode for each prompt, with a stand-in for the policy's messages.

    Raises:
        EnvironmentFailed: the environment fails.
    """
    tokenizer = runner.tokenizer
    stand_in = [*encode(tokenizer, STAND_IN), end_token_id(tokenizer)]

    def reply(prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
        return [Completion(prompt, tuple(stand_in), (0.0,) * len(stand_in), STAND_IN, "stop") for prompt in prompts]

    try:
        episodes = runner.run(prompts, Sampling(max_new_tokens), reply)
    finally:
        runner.close()
    for number, episode in enumerate(episodes, 1):
        ids, mask = [*episode.prompt.ids, *episode.ids], [False] * len(episode.prompt.ids) + episode.mask
        rewards = ", ".join(f"{turn.reward:g}" for turn in episode.turns if turn.reward is not None) or "none"
        note = f"; tokens with mask 1 are trained; {STAND_IN!r} stands for the policy; rewards: {rewards}"
        _write(f"Episode {number}: {len(ids)} tokens{note}", _row(tokenizer, ids, mask))


def show_reward_training(config: RewardModelConfig) -> None:
    """Print the settings and the first pairs of a reward model training; errors as in :func:`show_training`."""
    data, pairs, _ = load_preferences(
        config.data,
        **_columns(config),
        criteria=config.parsed_criteria,
        criteria_margins=config.criteria_margins,
        streaming=config.streaming,
    )
    tokenizer = with_chat_template(load_tokenizer(config.model), config)
    _write("Settings", settings(config))
    for number, pair in enumerate(pairs[:ROWS], 1):
        if pair.judgments:
            _write(f"Pair {number} (row {pair.row}), judgments", _judgments(config, pair))
        for kind, answer in (("chosen", pair.chosen), ("rejected", pair.rejected)):
            prompt, variables = pair.conversation, pair.chat_template_kwargs
            context, target = split_example(tokenizer, prompt, answer, variables=variables)
            ids, text = context + target, "".join(format_example(tokenizer, prompt, answer, **variables))
            mask = [index >= len(context) for index in range(len(ids))]
            shown = _row(tokenizer, ids, mask, text + turn_format(tokenizer).end)
            _write(
                f"Pair {number} (row {pair.row}), {kind}: {len(ids)} tokens; the score is read at the last one", shown
            )
    echo(f"{data.summary()}. Nothing was loaded or written. To train, omit --dry_run.", "green")


def _judgments(config: RewardModelConfig, pair: Preference) -> Iterator[str]:
    """Yield a line per criterion."""
    words = {1: "chosen", -1: "rejected", 0: "tie", None: "none"}
    for criterion, (side, margin) in zip(config.parsed_criteria, pair.judgments, strict=True):
        yield f"{criterion.name}: {words[side]}" + (f", margin {margin:g}" if margin else "")


def show_sft(config: SftConfig) -> None:
    """Print the settings and the first rows of SFT; errors as in :func:`show_training`."""
    data, rows, _ = load_texts(config.data, **_columns(config))
    tokenizer = with_chat_template(load_tokenizer(config.model), config)
    _write("Settings", settings(config))
    for number, row in enumerate(rows[:ROWS], 1):
        one = to_example(tokenizer, row)
        ids = [*one.context, *one.target]
        shown = _row(tokenizer, ids, [index >= len(one.context) for index in range(len(ids))])
        _write(f"Row {number} (row {row.row}): {len(ids)} tokens; tokens with mask 1 are trained", shown)
    echo(f"{data.summary()}. Nothing was loaded or written. To train, omit --dry_run.", "green")


def settings(config: Any) -> Iterator[str]:
    """Yield every setting as a line of YAML, with its default if the value differs."""
    import yaml

    defaults = as_dict(type(config)())
    for name, value in as_dict(config).items():
        plain = list(value) if isinstance(value, tuple) else value
        written = yaml.safe_dump(plain, allow_unicode=True, default_flow_style=True, width=10_000)
        line = f"{name}: {written.strip().removesuffix('...').strip()}"
        yield line if value == defaults[name] else f"{line}  # default: {defaults[name]}"


def _row(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], mask: Sequence[bool], text: str | None = None
) -> Iterator[str]:
    """Yield the formatted text, its tokens with their ids, and the mask of the tokens that are trained on."""
    yield f"text    {(str(tokenizer.decode(ids)) if text is None else text)!r}"
    yield "tokens  " + " ".join(f"{str(tokenizer.decode([i]))!r}:{i}" for i in ids)
    yield "mask    " + " ".join("1" if trained else "0" for trained in mask)


def _write(title: str, lines: Iterable[str]) -> None:
    print_output("\n".join([f"\n{title}", *(f"  {line}" for line in lines)]))


def _columns(config: TrainConfig | RewardModelConfig | SftConfig) -> dict[str, Any]:
    return {
        "heldout_fraction": config.heldout_fraction,
        "seed": config.seed,
        **config.column_names,
        "max_bad_rows": config.max_bad_rows,
    }
