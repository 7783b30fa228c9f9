"""Train a reward model from preference pairs with TRL's RewardTrainer (see ``resumable``).

Ours around it: the split by prompt before training, one framing for training and scoring, the score read where the
attention mask ends, held-out figures, and a card with a fingerprint beside the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from reinforcepp.adapters import with_adapter
from reinforcepp.config import RewardModelConfig, as_dict
from reinforcepp.data import load_preferences
from reinforcepp.framing import framed
from reinforcepp.models import load_tokenizer, save_model, weights_hash
from reinforcepp.observe import say
from reinforcepp.preparation import loading
from reinforcepp.reward_card import RewardCard
from reinforcepp.reward_models import load_reward_weights, new_reward_model
from reinforcepp.reward_report import analyse, save_pairs, summary, tell, write_page
from reinforcepp.rewards.measure import score_pairs
from reinforcepp.rewards.trained import TrainedReward, save_reward_model
from reinforcepp.supervised import Beginning, begin, check_left, length_limit, open_folder, within
from reinforcepp.tokens import encode_answer
from reinforcepp.types import Preference

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REPORT_FILE = "report.html"


def train_reward_model(config: RewardModelConfig) -> RewardCard:
    """Train, measure and save a reward model as ``config`` says; returns its card.

    Raises:
        ReinforceError: for anything wrong with data, model or folder, before any weight is loaded.
    """
    folder, saved = open_folder(config)
    data, train, heldout = load_preferences(
        config.data,
        heldout_fraction=config.heldout_fraction,
        seed=config.seed,
        **config.column_names,
    )
    say(data.summary())
    tokenizer = framed(load_tokenizer(config.model), config)
    limit = length_limit(config)

    def length(pair: Preference) -> int:
        return max(len(encode_answer(tokenizer, pair.prompt, answer)) for answer in (pair.chosen, pair.rejected))

    train = within(train, length, limit, "training pairs")
    heldout = within(heldout, length, limit, "held-out pairs")
    check_left(train, "pair", data.source, limit)

    model = new_reward_model(config.model, config.seed, **loading(config))
    inputs = {"model": weights_hash(model), "data": data.sha256}
    if config.use_peft:
        model = with_adapter(model, config, seed=config.seed, head=model.score)
    begun = begin(folder, config, inputs, saved, {"train_pairs": len(train), "heldout_pairs": len(heldout)})
    _fit(model, tokenizer, train, config, begun)
    used = model.eval()
    if config.load_in_4bit:  # whoever uses it adds the adapter to weights in full
        save_model(model, tokenizer, folder)
        used = load_reward_weights(folder)
    scorer = TrainedReward(used, tokenizer, batch_size=config.batch_size * 2)
    on_train = summary(score_pairs(scorer, train))
    pairs = score_pairs(scorer, heldout)
    analysis = analyse(pairs) if pairs else None
    card = RewardCard(
        base_model=config.model,
        data=data.source,
        data_sha256=data.sha256,
        train_pairs=len(train),
        heldout_pairs=len(heldout),
        figures=asdict(analysis.figures) if analysis else {},
        score_mean=on_train.mean_score,
        score_std=on_train.score_std,
        settings=as_dict(config),
        fingerprint=scorer.fingerprint(),
        train_accuracy=on_train.accuracy,
    )
    if pairs:
        save_pairs(pairs, folder)  # before the card, which tells that all is there
    save_reward_model(TrainedReward(model, tokenizer), card, folder)
    tell(card, analysis)
    if analysis:
        write_page(card, pairs, analysis, folder / REPORT_FILE)
    say(
        f"Saved the reward model to {folder}" + (f", its report to {folder / REPORT_FILE}" if analysis else ""), "green"
    )
    return card


def _fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[Preference],
    config: RewardModelConfig,
    begun: Beginning,
) -> None:
    from reinforcepp.resumable import ResumableRewardTrainer, fit  # which loads TRL

    rows = [
        {
            "chosen_ids": encode_answer(tokenizer, p.prompt, p.chosen),
            "rejected_ids": encode_answer(tokenizer, p.prompt, p.rejected),
        }
        for p in pairs
    ]
    fit(ResumableRewardTrainer, model, tokenizer, rows, config, begun)
