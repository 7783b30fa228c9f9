"""The weights that NCCL broadcasts are the trainer's own tensors: none of them passes through the CPU."""

import pytest
import torch
from rollout.contract import prepared_model

from reinforcepp.config import AdapterConfig
from reinforcepp.models.lora import base_model, with_adapter
from reinforcepp.rollout.vllm.compat import node_problem
from reinforcepp.rollout.vllm.nccl import _weight_source

pytestmark = pytest.mark.skipif(bool(node_problem()), reason=node_problem())


@pytest.fixture
def moves(monkeypatch):
    """Devices that tensors are moved to, and calls of ``cpu``."""
    moves = []
    to = torch.Tensor.to

    def spy(tensor, *where, **named):
        moves.extend(given for given in [*where, *named.values()] if isinstance(given, (str, torch.device)))
        return to(tensor, *where, **named)

    monkeypatch.setattr(torch.Tensor, "to", spy)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: moves.append("cpu") or tensor)
    return moves


def test_the_spy_sees_a_trip_through_the_cpu(moves):
    torch.ones(2).cpu()
    torch.ones(2).to("cpu")
    torch.ones(2).to(torch.float64)
    assert moves == ["cpu", "cpu"]


@pytest.mark.parametrize("tied", [True, False])
def test_weights_are_the_models_own_tensors_on_their_device(moves, tied):
    model = prepared_model("qwen2", tied=tied).to("meta")
    source, own = _weight_source(model), {id(weight.untyped_storage()) for weight in model.parameters()}
    moves.clear()
    weights = dict(source)
    assert {weight.device.type for weight in weights.values()} == {"meta"}
    assert ("lm_head.weight" in weights) != tied
    assert [(meta.name, meta.dtype, meta.shape) for meta in source.metadata()] == [
        (name, weight.dtype, tuple(weight.shape)) for name, weight in weights.items()
    ]
    assert not moves and own


def test_merged_adapters_stay_on_the_device(moves):
    model = with_adapter(prepared_model("qwen2"), AdapterConfig(use_peft=True), seed=0)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(0.1)
    moves.clear()
    weights = dict(_weight_source(model))
    assert not [where for where in moves if where != weights["model.norm.weight"].device]
    plain = dict(base_model(model).named_parameters())
    merged = "model.layers.0.self_attn.q_proj"
    assert not torch.equal(weights[f"{merged}.weight"], plain[f"{merged}.base_layer.weight"])
