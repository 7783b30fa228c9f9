"""Each family generates with the log-probabilities of its own unpadded forward pass, or is refused by name."""

import pytest
import tiny
import torch
import transformers
from rollout.contract import END_IDS, generate_plainly, prepared_tokenizer, prompts_of

from reinforcepp.errors import RolloutError
from reinforcepp.models.logprobs import response_logprobs
from reinforcepp.rollout.decoding import LADDER, BatchDecoder, cache_dtype, is_plain
from reinforcepp.rollout.self_check import compare_samples
from reinforcepp.rollout.transformers_engine import TransformersEngine
from reinforcepp.types import Sampling

ATTENTION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
FAMILIES = {
    "Mamba": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "Mamba2": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "state_size": 8,
        "num_heads": 4,
        "head_dim": 32,
        "n_groups": 1,
        "chunk_size": 16,
    },
    "FalconMamba": {"hidden_size": 64, "num_hidden_layers": 2, "state_size": 8},
    "Lfm2": ATTENTION | {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    "RecurrentGemma": ATTENTION
    | {"lru_width": 64, "attention_window_size": 16, "block_types": ["recurrent", "attention"], "head_dim": 32},
    "Qwen3Next": ATTENTION
    | {
        "layer_types": ["linear_attention", "full_attention"],
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "num_experts": 2,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
    "Rwkv": {"hidden_size": 64, "num_hidden_layers": 2, "attention_hidden_size": 64},
    "xLSTM": {"hidden_size": 64, "num_blocks": 2, "num_heads": 2},
    "Bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 2},
    "Roberta": ATTENTION | {"is_decoder": True, "max_position_embeddings": 300},
}
WITHOUT_CACHE = {"Rwkv", "xLSTM"}
FEW = {"Mamba", "Lfm2", "RecurrentGemma", "Rwkv", "Roberta"}


def build(family: str, **changes) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    ends = {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(vocab_size=320, **(FAMILIES[family] | ends | changes))
    config.tie_word_embeddings = False
    built = getattr(transformers, f"{family}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if parameter.ndim > 1 and "A_log" not in name:
                parameter.mul_(3)
    built.generation_config.eos_token_id = END_IDS
    return built.eval()


@pytest.mark.parametrize(
    "family", [name if name in FEW else pytest.param(name, marks=pytest.mark.full) for name in FAMILIES]
)
@pytest.mark.filterwarnings("ignore")
def test_samples_have_the_log_probabilities_of_an_unpadded_forward_pass(family):
    """Prompts of several lengths with two samples each, some of which end early."""
    model, tokenizer = build(family), prepared_tokenizer()
    assert not is_plain(model)
    engine = TransformersEngine(model, tokenizer)
    prompts = prompts_of(tokenizer)
    completions = engine.generate(prompts, Sampling(20, num_samples=2, seed=2))
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    assert compare_samples(model, completions).gap_max < 1e-3
    assert (engine.decoding.cache == "none") == (family in WITHOUT_CACHE)
    batch = [c.prompt.ids for c in completions], [c.ids for c in completions]
    with torch.no_grad():
        by_trainer_BT, _, mask_BT = response_logprobs(model, *batch, pad_id=0)
    sampled_N = torch.tensor([logprob for c in completions for logprob in c.logprobs])
    torch.testing.assert_close(by_trainer_BT[mask_BT.bool()], sampled_N, atol=1e-3, rtol=0)
    *_, streamed = engine.stream(prompts[0], Sampling(20, num_samples=2, seed=2))
    assert streamed.ids == completions[0].ids
    if family not in WITHOUT_CACHE | {"Roberta"}:  # whose generate in transformers counts positions from 0
        for greedy in engine.generate(prompts[:3], Sampling(8, temperature=0)):
            assert greedy.ids == generate_plainly(model, greedy.prompt, 8)


def test_plain_families_are_decoded_without_a_probe(monkeypatch):
    monkeypatch.setattr(TransformersEngine, "_probe", None)
    for family in ("gpt2", *tiny.FAMILIES):
        assert TransformersEngine(tiny.model(family), prepared_tokenizer()).decoding == LADDER[0]


def test_a_family_that_cannot_generate_token_by_token_is_refused_by_name():
    """Without ``is_decoder``, every token attends to later ones."""
    model = build("Roberta", is_decoder=False)
    with pytest.raises(RolloutError, match=r"model family roberta: log-probabilities .* by up to [\d.]+ nats\. Use a"):
        TransformersEngine(model, prepared_tokenizer()).generate(prompts_of(prepared_tokenizer())[:1], Sampling(4))


@pytest.mark.filterwarnings("ignore")
def test_generation_without_a_cache_is_reported():
    with pytest.warns(UserWarning, match="rwkv generates without a cache"):
        assert TransformersEngine(build("Rwkv"), prepared_tokenizer()).decoding.cache == "none"


def test_a_copy_of_the_model_is_decoded_alike_without_another_probe(monkeypatch):
    engine = TransformersEngine(build("Lfm2"), prepared_tokenizer())
    decoding = engine.decoding
    monkeypatch.setattr(TransformersEngine, "_probe", None)
    assert engine.with_model(build("Lfm2")).decoding == decoding


@torch.no_grad()
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_bfloat16_models_decode_with_a_float32_cache_on_a_cpu(family):
    """Except models whose heads share keys. The logits are those of the whole sequences in float32, up to rounding."""
    torch.manual_seed(0)
    model, ids = tiny.model(family), torch.randint(1, 320, (2, 9))
    assert cache_dtype(model, "cpu") is None
    expected = model(ids).logits[:, -1]
    model.bfloat16()
    assert cache_dtype(model, "cpu") is (torch.float32 if family == "gpt2" else None)
    assert cache_dtype(model, "cuda") is None
    decoder, positions = BatchDecoder(model, LADDER[0]), torch.arange(9).expand(2, 9)
    decoder.forward(ids[:, :6], torch.ones(2, 6, dtype=torch.long), positions[:, :6])
    for t in range(6, 9):
        logits_BV = decoder.forward(ids[:, t : t + 1], None, positions[:, t : t + 1])
    stored = decoder._cache.layers[0].keys.dtype
    assert stored == (torch.float32 if family == "gpt2" else torch.bfloat16)
    assert (logits_BV - expected).abs().max() < 2e-2 * expected.abs().max()
