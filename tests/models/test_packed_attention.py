"""Packed rows give the log-probabilities and gradients of padded ones."""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.attention import varlen
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from reinforcepp.models import packed_attention
from reinforcepp.models.logprobs import is_packable, response_logprobs, response_states
from reinforcepp.training.learner import training_submodules

PROMPTS = [[5, 6, 7], [9], [4, 8, 15, 16, 23, 42], [3, 1, 4], [1, 5, 9]]
RESPONSES = [[10, 11], [12, 13, 14, 15, 16], [17], [18, 19], [20, 21]]


def lora(model):
    adapted = get_peft_model(model, LoraConfig(target_modules="all-linear", init_lora_weights=False))
    return adapted.eval()


def computed(model, *, padding_free, checkpointing=False):
    """Return log-probabilities, entropy, and the gradient of each parameter for a loss that weights every token."""
    model.zero_grad()
    for part in training_submodules(model, checkpointing=checkpointing):
        part.training = True
    logprobs_BT, entropy_BT, mask_BT = response_logprobs(
        model, PROMPTS, RESPONSES, pad_id=0, temperature=0.7, width=7, padding_free=padding_free, entropy_gradient=True
    )
    weights_BT = torch.arange(1.0, 1 + mask_BT.numel(), device=mask_BT.device).view(mask_BT.shape) / 10
    ((logprobs_BT + 0.3 * entropy_BT) * weights_BT).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logprobs_BT.detach(), entropy_BT.detach(), mask_BT, gradients


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "qwen3", "gemma2", "lora"])
def test_packed_rows_equal_padded_rows(family, checkpointing, monkeypatch):
    model = lora(tiny.model("llama")) if family == "lora" else tiny.model(family).eval()
    padded = computed(model, padding_free=False, checkpointing=checkpointing)
    shapes = []
    model.get_input_embeddings().register_forward_hook(lambda _, ids, __: shapes.append(tuple(ids[0].shape)))
    packed = computed(model, padding_free=True, checkpointing=checkpointing)
    assert shapes[-1] == (1, sum(map(len, PROMPTS + RESPONSES)))  # nothing is padded
    for one, other in zip(padded[:3], packed[:3], strict=True):
        torch.testing.assert_close(other, one, atol=1e-5, rtol=1e-5)
    assert padded[3].keys() == packed[3].keys() and padded[3]
    for name, gradient in padded[3].items():
        torch.testing.assert_close(packed[3][name], gradient, atol=1e-5, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_packed_rows_are_close_in_bfloat16():
    model = tiny.model("qwen2").eval().bfloat16()
    assert is_packable(model)
    packed, padded = (computed(model, padding_free=free)[0] for free in (True, False))
    torch.testing.assert_close(packed, padded, atol=0.05, rtol=0)


def distances(outputs, exact):
    """Return the distance from ``exact`` of log-probabilities, entropy, and all gradients, relative to their size."""
    flat = [
        (out[0], out[1], torch.cat([out[3][name].float().flatten() for name in exact[3]])) for out in (outputs, exact)
    ]
    return [float((one - other).norm() / other.norm()) for one, other in zip(*flat, strict=True)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen2", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_rows_are_as_exact_as_padded_rows_on_a_gpu(family, checkpointing, dtype, monkeypatch):
    """In bfloat16, the kernel for variable lengths computes attention; in float32, it can't."""
    used = []
    kernel = varlen.varlen_attn
    monkeypatch.setattr(varlen, "varlen_attn", lambda *tensors, **given: used.append(1) or kernel(*tensors, **given))
    model = (lora(tiny.model("llama")) if family == "lora" else tiny.model(family)).cuda().eval()
    exact = computed(model, padding_free=False)
    model.to(dtype)
    assert is_packable(model)
    padded, packed = (computed(model, padding_free=free, checkpointing=checkpointing) for free in (False, True))
    assert bool(used) == (dtype == torch.bfloat16)
    for name, of_packed, of_padded in zip(
        ("logprobs", "entropy", "gradients"), *(distances(one, exact) for one in (packed, padded)), strict=True
    ):
        assert of_packed <= 2 * of_padded + 1e-4, f"{name}: {of_packed} packed, {of_padded} padded"


def test_values_of_a_critic_are_those_of_padded_rows():
    model = tiny.model("llama").eval()
    model.set_output_embeddings(nn.Linear(model.config.hidden_size, 1, bias=False))
    (packed_N1, tokens), (padded_N1, _) = (
        response_states(model, PROMPTS, RESPONSES, pad_id=0, padding_free=free) for free in (True, False)
    )
    torch.testing.assert_close(packed_N1, padded_N1, atol=1e-5, rtol=1e-5)
    values_BT = tokens.by_row(packed_N1[:, 0], width=6)
    assert values_BT.shape == (5, 6) and values_BT[1, 5] == values_BT[2, 1] == 0
    assert values_BT[2, 0] == packed_N1[7, 0]


def test_rows_longer_than_a_sliding_window_are_padded():
    model = tiny.model("gemma2").eval()
    assert model.config.sliding_window == 128
    assert is_packable(model, 128) and not is_packable(model, 129)


def test_a_model_that_ignores_segments_is_not_packed():
    model = tiny.model("llama").eval()
    model.set_attn_implementation("eager")
    assert not is_packable(model)
    packed_attention._packable.clear()
    model.config._attn_implementation = "sdpa"
    model.model.layers[0].self_attn.config = tiny.model("llama").config
    model.model.layers[0].self_attn.config._attn_implementation = "eager"
    assert not is_packable(model)  # one layer reads the mask instead
    mixing = tiny.model("llama").eval()
    mixing.model.layers[1].mlp.register_forward_hook(lambda _, __, hidden: hidden + hidden.roll(1, dims=1))
    assert not is_packable(mixing)  # a layer that reads the token before, as convolutions do


def test_a_model_with_sparse_attention_is_not_packed():
    sizes = {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 16,
    }
    heads = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    sparse = {"index_topk": 16, "index_head_dim": 16, "index_n_heads": 2}  # more than the tokens of the probe
    config = DeepseekV32Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, **sizes, **heads, **sparse
    )
    model = DeepseekV32ForCausalLM(config).eval()
    assert model.config._attn_implementation == "sdpa"
    assert not is_packable(model, 32)


def test_sdpa_without_segments_is_unchanged():
    model = tiny.model("llama").eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    before = model(input_ids=ids).logits
    packed_attention.extend_sdpa()
    assert torch.equal(model(input_ids=ids).logits, before)
    query, layer = torch.randn(1, 4, 3, 8), model.model.layers[0].self_attn
    attend = ALL_ATTENTION_FUNCTIONS["sdpa"]  # vision towers give the mask by its name
    assert torch.equal(attend(layer, query, query, query, attention_mask=None)[0], attend(layer, *[query] * 3, None)[0])


class Heads(nn.Module):
    """An attention layer with three heads of queries per head of keys."""

    num_key_value_groups, is_causal = 3, True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masks", [0, 1, 6])
def test_a_single_query_attends_without_copied_keys(monkeypatch, dtype, masks):
    """``masks`` is the number of heads of the mask: one for each head of queries needs the copies."""
    packed_attention.extend_sdpa()
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, heads, length, 8, generator=generator) for heads, length in ((6, 1), (2, 5), (2, 5))]
    mask = torch.rand(2, masks, 1, 5, generator=generator) < 0.7 if masks else None
    expected, _ = sdpa_attention_forward(Heads(), *inputs, mask, scaling=0.5)
    seen = []
    sdpa = nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda q, k, v, **s: seen.append(k.shape) or sdpa(q, k, v, **s)
    )
    attended, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](Heads(), *(x.to(dtype) for x in inputs), mask, scaling=0.5)
    tolerance = 1e-6 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(attended, expected.to(dtype), atol=tolerance, rtol=tolerance)
    assert seen == [(2, 6 if masks == 6 else 2, 5, 8)]


@pytest.mark.parametrize("masked", [True, False])
def test_a_single_query_is_computed_in_the_type_of_the_cache(masked):
    packed_attention.extend_sdpa()
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, 3, length, 8, generator=generator) for length in (1, 5, 5))
    mask = torch.rand(2, 1, 1, 5, generator=generator) < 0.7 if masked else None
    query = query.bfloat16()
    layer = torch.nn.Module()
    expected, _ = sdpa_attention_forward(layer, query.float(), key, value, mask, is_causal=False)
    attended, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](layer, query, key, value, mask)
    assert torch.equal(attended, expected.bfloat16())
