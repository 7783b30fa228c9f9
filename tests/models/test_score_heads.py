"""Score heads on families whose last layer isn't ``hidden_size`` wide, or that transformers has no sequence classifier for."""

from __future__ import annotations

import pytest
import tiny
import torch
import transformers

from reinforcepp.errors import ModelError
from reinforcepp.models.loading import load_tokenizer
from reinforcepp.models.reward_models import load_reward_weights, new_reward_model
from reinforcepp.models.saving import save_model

LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}
OPT = {
    "hidden_size": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
}
XGLM = {"d_model": 32, "ffn_dim": 64, "num_layers": 1, "attention_heads": 2, "max_position_embeddings": 64}
FAMILIES = {
    "opt-350m": ("OPT", {**OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}, 16),
    "xglm": ("XGLM", XGLM, 32),
    "cohere": ("Cohere", LLAMA, 32),
    "granite": ("Granite", LLAMA, 32),
    "mpt": ("Mpt", {"d_model": 32, "n_layers": 1, "n_heads": 2, "max_seq_len": 64, "expansion_ratio": 2}, 32),
}
IDS = torch.tensor([[5, 6, 7, 8, 9, 0], [5, 6, 7, 0, 0, 0]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reward_model_is_trained_saved_and_loaded(tmp_path, family):
    name, settings, width = FAMILIES[family]
    base, saved = tmp_path / "base", tmp_path / "reward_model"
    saved.mkdir()
    config = getattr(transformers, f"{name}Config")(
        **settings, vocab_size=320, eos_token_id=0, bos_token_id=0, pad_token_id=1
    )
    getattr(transformers, f"{name}ForCausalLM")(config).save_pretrained(base)
    tiny.tokenizer().save_pretrained(base)

    model = new_reward_model(str(base), seed=0).eval()
    assert model.score.weight.shape == (1, width)
    scores = model(input_ids=IDS, attention_mask=MASK).logits
    scores.sum().backward()
    assert all(p.grad is not None for p in model.base_model.parameters() if p.ndim > 1 and p.requires_grad)
    save_model(model, load_tokenizer(str(base)), saved)
    with torch.no_grad():
        loaded = load_reward_weights(saved)
        torch.testing.assert_close(loaded(input_ids=IDS, attention_mask=MASK).logits, scores)
        alone = loaded(input_ids=IDS[1:, :4], attention_mask=MASK[1:, :4]).logits
        torch.testing.assert_close(alone, scores[1:])


def test_a_family_without_a_causal_language_model_is_refused(tmp_path):
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    transformers.ViTModel(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="the type vit has no sequence classifier"):
        new_reward_model(str(tmp_path), seed=0)
