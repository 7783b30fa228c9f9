"""Float32 master weights of bfloat16 parameters."""

from types import SimpleNamespace

import pytest
import torch

from reinforcepp.models.master_weights import MasterWeights
from reinforcepp.models.precision import cast_parameters


def masters_of(model, *dtype, early=False, device=None, **settings):
    return MasterWeights(
        torch.optim.AdamW(model.parameters(), fused=True, **settings), *dtype, early=early, device=device
    )


def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3)


def train(model, masters, steps, passes=1):
    torch.manual_seed(1)
    for _ in range(steps):
        for _ in range(passes):
            inputs = torch.randn(8, 4).to(model.weight.dtype)
            model(inputs).float().square().mean().backward()
            masters.collect()
        masters.optimizer.step()
        masters.optimizer.zero_grad()


def test_in_float32_it_equals_adamw():
    ours, theirs = linear(), linear()
    masters = masters_of(ours, lr=0.1, weight_decay=0.1)
    train(ours, masters, 5)
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.1)
    train(theirs, SimpleNamespace(optimizer=plain, collect=lambda: None), 5)
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_steps_too_small_for_bfloat16_add_up():
    model = linear()
    with torch.no_grad():
        model.weight.fill_(1.0)
    masters = masters_of(model, torch.bfloat16, lr=1e-4, weight_decay=0.0)
    cast_parameters(model, torch.bfloat16)
    train(model, masters, 1)
    assert (model.weight == 1).all()  # the next number below 1 is 0.996
    train(model, masters, 59)
    assert (model.weight < 1).all()
    torch.testing.assert_close(model.weight, masters.masters[0].bfloat16(), rtol=0, atol=0)


def test_gradients_of_several_passes_accumulate_in_float32():
    model = linear()
    masters = masters_of(model, torch.bfloat16, lr=0.0)
    cast_parameters(model, torch.bfloat16)
    for gradient in (1.0, 2.0**-10, 2.0**-10):
        model.bias.grad = torch.full((3,), gradient, dtype=torch.bfloat16)
        masters.collect()
        assert model.bias.grad is None
    assert masters.masters[1].grad.tolist() == [1 + 2.0**-9] * 3


def test_gradients_moved_early_are_the_same():
    runs = []
    for early in (False, True):
        model = linear()
        masters = masters_of(model, torch.bfloat16, early=early, lr=1e-2)
        cast_parameters(model, torch.bfloat16)
        if early:
            model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
            assert model.weight.grad is None and masters.masters[0].grad is not None
            masters.optimizer.zero_grad()
        train(model, masters, 5, passes=2)
        runs.append(model.weight)
    assert torch.equal(*runs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("early", [False, True])
def test_masters_on_another_device_give_the_same_weights(dtype, early):
    runs = []
    for device in (None, torch.device("cpu")):
        model = linear()
        masters = masters_of(model, dtype, early=early, device=device, lr=1e-2)
        cast_parameters(model, dtype)
        if device is not None:
            assert all(
                master is not live for master, live in zip(masters.masters, masters.model_parameters, strict=True)
            )
            model(torch.ones(1, 4, dtype=dtype)).sum().backward()
            assert (model.weight.grad is None) == early
            masters.collect()
            assert model.weight.grad is None and masters.masters[0].grad is not None
            masters.optimizer.zero_grad()
        train(model, masters, 5, passes=2)
        runs.append(model.weight)
    assert torch.equal(*runs)


def test_a_checkpoint_resumes_with_masters_on_another_device_or_none():
    here, there = None, torch.device("cpu")
    ends = []
    for before, after in ((here, here), (here, there), (there, here)):
        model = linear()
        masters = masters_of(model, device=before, lr=1e-2)
        train(model, masters, 3)
        state, weights = masters.state_dict(), {name: w.clone() for name, w in model.state_dict().items()}
        fresh = torch.nn.Linear(4, 3)
        resumed = masters_of(fresh, device=after, lr=1e-2)
        fresh.load_state_dict(weights)
        resumed.load_state_dict(state)
        train(fresh, resumed, 2)
        ends.append(fresh.weight)
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_offloaded_optimizer_uses_no_gpu_memory():
    model = torch.nn.Linear(1024, 1024, bias=False).cuda()
    model(torch.ones(1, 1024, device="cuda")).sum().backward()  # cuBLAS allocates its workspaces, up to 32 MiB each
    model.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated()
    masters = masters_of(model, early=True, device=torch.device("cpu"), lr=1e-2)
    start = model.weight.clone()
    model(torch.ones(1, 1024, device="cuda")).sum().backward()
    masters.optimizer.step()
    assert torch.cuda.memory_allocated() - before < 2 * start.nbytes  # the copy made here
    assert masters.masters[0].device.type == "cpu" and masters.optimizer.state[masters.masters[0]]["exp_avg"].is_cpu
    assert not torch.equal(model.weight, start)


def test_masters_start_in_full_precision():
    model = linear()
    exact = model.weight.detach().clone()
    masters = masters_of(model, torch.bfloat16)
    cast_parameters(model, torch.bfloat16)
    assert torch.equal(masters.masters[0], exact) and not torch.equal(model.weight.float(), exact)


def test_buffers_keep_their_dtype():
    model = linear()
    model.register_buffer("frequencies", torch.tensor([1 / 3]))
    cast_parameters(model, torch.bfloat16)
    assert model.frequencies.dtype == torch.float32 and model.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_round_trips(dtype):
    runs = []
    for interrupted in (False, True):
        model = linear()
        masters = masters_of(model, dtype, lr=1e-3)
        cast_parameters(model, dtype)
        train(model, masters, 3)
        if interrupted:
            weights, state = model.state_dict(), masters.state_dict()
            model = linear()
            masters = masters_of(model, dtype, lr=7.0)
            cast_parameters(model, dtype)
            model.load_state_dict(weights)
            masters.load_state_dict(state)
        train(model, masters, 3)
        runs.append((model, masters))
    (one, first), (other, second) = runs
    assert torch.equal(one.weight, other.weight)
    assert all(torch.equal(a, b) for a, b in zip(first.masters, second.masters, strict=True))
