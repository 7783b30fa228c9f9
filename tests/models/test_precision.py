"""Float32 master weights of bfloat16 parameters."""

import pytest
import torch

from reinforcepp.models.precision import MasterAdamW, cast_parameters


def linear():
    torch.manual_seed(0)
    return torch.nn.Linear(4, 3)


def train(model, optimizer, steps, passes=1):
    torch.manual_seed(1)
    for _ in range(steps):
        for _ in range(passes):
            inputs = torch.randn(8, 4).to(model.weight.dtype)
            model(inputs).float().square().mean().backward()
            optimizer.collect()
        optimizer.step()
        optimizer.zero_grad()


def test_in_float32_it_equals_adamw():
    ours, theirs = linear(), linear()
    optimizer = MasterAdamW(ours.parameters(), lr=0.1, weight_decay=0.1)
    train(ours, optimizer, 5)
    plain = torch.optim.AdamW(theirs.parameters(), lr=0.1, weight_decay=0.1)
    plain.collect = lambda: None
    train(theirs, plain, 5)
    torch.testing.assert_close(ours.weight, theirs.weight)


def test_steps_too_small_for_bfloat16_add_up():
    model = linear()
    with torch.no_grad():
        model.weight.fill_(1.0)
    optimizer = MasterAdamW(model.parameters(), torch.bfloat16, lr=1e-4, weight_decay=0.0)
    cast_parameters(model, torch.bfloat16)
    train(model, optimizer, 1)
    assert (model.weight == 1).all()  # the next number below 1 is 0.996
    train(model, optimizer, 59)
    assert (model.weight < 1).all()
    torch.testing.assert_close(model.weight, optimizer.masters[0].bfloat16(), rtol=0, atol=0)


def test_gradients_of_several_passes_accumulate_in_float32():
    model = linear()
    optimizer = MasterAdamW(model.parameters(), torch.bfloat16, lr=0.0)
    cast_parameters(model, torch.bfloat16)
    for gradient in (1.0, 2.0**-10, 2.0**-10):
        model.bias.grad = torch.full((3,), gradient, dtype=torch.bfloat16)
        optimizer.collect()
        assert model.bias.grad is None
    assert optimizer.masters[1].grad.tolist() == [1 + 2.0**-9] * 3


def test_gradients_moved_early_are_the_same():
    runs = []
    for early in (False, True):
        model = linear()
        optimizer = MasterAdamW(model.parameters(), torch.bfloat16, early=early, lr=1e-2)
        cast_parameters(model, torch.bfloat16)
        if early:
            model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
            assert model.weight.grad is None and optimizer.masters[0].grad is not None
            optimizer.zero_grad()
        train(model, optimizer, 5, passes=2)
        runs.append(model.weight)
    assert torch.equal(*runs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("early", [False, True])
def test_masters_on_another_device_give_the_same_weights(dtype, early):
    runs = []
    for device in (None, torch.device("cpu")):
        model = linear()
        optimizer = MasterAdamW(model.parameters(), dtype, early=early, device=device, lr=1e-2)
        cast_parameters(model, dtype)
        if device is not None:
            assert all(
                master is not live for master, live in zip(optimizer.masters, optimizer.model_parameters, strict=True)
            )
            model(torch.ones(1, 4, dtype=dtype)).sum().backward()
            assert (model.weight.grad is None) == early
            optimizer.collect()
            assert model.weight.grad is None and optimizer.masters[0].grad is not None
            optimizer.zero_grad()
        train(model, optimizer, 5, passes=2)
        runs.append(model.weight)
    assert torch.equal(*runs)


def test_a_checkpoint_resumes_with_masters_on_another_device_or_none():
    here, there = None, torch.device("cpu")
    ends = []
    for before, after in ((here, here), (here, there), (there, here)):
        model = linear()
        optimizer = MasterAdamW(model.parameters(), device=before, lr=1e-2)
        train(model, optimizer, 3)
        state, weights = optimizer.state_dict(), {name: w.clone() for name, w in model.state_dict().items()}
        fresh = torch.nn.Linear(4, 3)
        resumed = MasterAdamW(fresh.parameters(), device=after, lr=1e-2)
        fresh.load_state_dict(weights)
        resumed.load_state_dict(state)
        train(fresh, resumed, 2)
        ends.append(fresh.weight)
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_an_offloaded_optimizer_uses_no_gpu_memory():
    model = torch.nn.Linear(1024, 1024, bias=False).cuda()
    before = torch.cuda.memory_allocated()
    optimizer = MasterAdamW(model.parameters(), early=True, device=torch.device("cpu"), lr=1e-2)
    start = model.weight.clone()
    model(torch.ones(1, 1024, device="cuda")).sum().backward()
    optimizer.step()
    assert torch.cuda.memory_allocated() - before < 2 * start.nbytes  # the copy made here, and what cuBLAS keeps
    assert optimizer.masters[0].device.type == "cpu" and optimizer.state[optimizer.masters[0]]["exp_avg"].is_cpu
    assert not torch.equal(model.weight, start)


def test_masters_start_in_full_precision():
    model = linear()
    exact = model.weight.detach().clone()
    optimizer = MasterAdamW(model.parameters(), torch.bfloat16)
    cast_parameters(model, torch.bfloat16)
    assert torch.equal(optimizer.masters[0], exact) and not torch.equal(model.weight.float(), exact)


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
        optimizer = MasterAdamW(model.parameters(), dtype, lr=1e-3)
        cast_parameters(model, dtype)
        train(model, optimizer, 3)
        if interrupted:
            weights, state = model.state_dict(), optimizer.state_dict()
            model = linear()
            optimizer = MasterAdamW(model.parameters(), dtype, lr=7.0)
            cast_parameters(model, dtype)
            model.load_state_dict(weights)
            optimizer.load_state_dict(state)
        train(model, optimizer, 3)
        runs.append((model, optimizer))
    (one, first), (other, second) = runs
    assert torch.equal(one.weight, other.weight)
    assert all(torch.equal(a, b) for a, b in zip(first.masters, second.masters, strict=True))
