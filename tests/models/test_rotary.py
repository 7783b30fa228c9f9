"""Rotary frequencies that depend on a batch's longest sequence are fixed, so that batches change no log-probabilities."""

import pytest
import tiny
import torch

from reinforcepp.models.loading import meta_model
from reinforcepp.models.logprobs import is_packable, response_logprobs
from reinforcepp.models.reward_models import as_classifier, prepare_scoring
from reinforcepp.models.rotary import fix_frequencies
from reinforcepp.rewards.trained import TrainedReward

KINDS = {
    "dynamic": {"factor": 4.0},
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.0] * 16,
        "long_factor": [1.0 + i for i in range(16)],
        "original_max_position_embeddings": 8,
    },
}
PROMPTS = [[5, 6, 7], [9, 4, 11, 12, 13, 14, 15, 16]]
RESPONSES = [[10, 11], [12, 13, 14, 15, 16, 17, 18, 19]]


def made(kind):
    settings = {"rope_type": kind, "rope_theta": 100.0} | KINDS[kind]
    return tiny.model("llama", rope_parameters=settings, max_position_embeddings=8)


def short_row(model, rows, *, packed=False):
    return response_logprobs(model, PROMPTS[:rows], RESPONSES[:rows], pad_id=0, padding_free=packed)[0][0, :2].detach()


@pytest.mark.parametrize("kind", KINDS)
def test_log_probabilities_do_not_depend_on_other_rows(kind):
    model = made(kind)
    assert not torch.allclose(short_row(model, 1), short_row(model, 2), atol=1e-3)  # why frequencies are fixed
    assert is_packable(model, 8) and not is_packable(model, 9)
    assert fix_frequencies(model, 8) is None and not is_packable(model, 9)
    assert fix_frequencies(model, 16) == kind
    assert is_packable(model, 16)
    expected = short_row(model, 1)
    for packed in (False, True):
        torch.testing.assert_close(short_row(model, 2, packed=packed), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(short_row(model, 1), expected, atol=0, rtol=0)
    whole = made(kind)  # the frequencies are those of transformers for a sequence of the same length
    ids = torch.tensor([PROMPTS[1] + RESPONSES[1]])
    torch.testing.assert_close(model(ids).logits, whole(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_takes_the_frequencies_of_the_trainer(kind):
    model = made(kind)
    fix_frequencies(model, 16)
    worker = meta_model(model.config, model.dtype)
    fix_frequencies(worker, 16)
    worker.load_state_dict(model.state_dict(), assign=True)
    for name, buffer in model.named_buffers():
        part, _, last = name.rpartition(".")
        worker.get_submodule(part)._buffers[last] = buffer
    torch.testing.assert_close(short_row(worker.eval(), 1), short_row(model, 1), atol=0, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_beyond_the_original_context_are_scored_alone(kind):
    reward = TrainedReward(prepare_scoring(as_classifier(made(kind), seed=0)).eval(), tiny.chat_tokenizer())
    reward.model.config.max_position_embeddings = 64  # texts aren't truncated
    rows = [[5, 6, 7], list(range(20, 36)), [8, 9]]
    alone = [reward.score_rows([row])[0] for row in rows]
    assert reward.score_rows(rows) == pytest.approx(alone, abs=1e-6)
