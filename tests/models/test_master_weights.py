"""Float32 master weights of bfloat16 parameters."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from reinforcepp.models.master_weights import MasterWeights, sums_fit
from reinforcepp.models.precision import cast_parameters


def masters_of(model, *dtype, device=None, sum_device=None, **settings):
    optimizer = torch.optim.AdamW(model.parameters(), fused=True, **settings)
    return MasterWeights(optimizer, *dtype, device=device, sum_device=sum_device)


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
        (model.bias * gradient).sum().backward()
        assert model.bias.grad is None
    masters.collect()
    assert masters.masters[1].grad.tolist() == [1 + 2.0**-9] * 3
    assert masters.masters[0].grad is None  # no pass used it


CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sum_device", [None, CPU])
def test_masters_on_another_device_give_the_same_weights(dtype, sum_device):
    runs = []
    for device in (None, CPU):
        model = linear()
        masters = masters_of(model, dtype, device=device, sum_device=sum_device, lr=1e-2)
        cast_parameters(model, dtype)
        if device is not None:
            assert all(
                master is not live for master, live in zip(masters.masters, masters.model_parameters, strict=True)
            )
        train(model, masters, 5, passes=3)
        runs.append(model.weight)
    assert torch.equal(*runs)


class Transfers(TorchDispatchMode):
    """Records the copies between the meta device, which stands for a GPU, and the CPU; copies from it are zeros."""

    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        options = options or {}
        if function is torch.ops.aten.copy_.default and arguments[0].device != arguments[1].device:
            to, source = arguments[:2]
            self.made.append((source.device.type, to.device.type, to.dtype, to.numel()))
            return to.zero_() if source.is_meta else to
        if function is torch.ops.aten._to_copy.default and options.get("device") == CPU != arguments[0].device:
            return torch.zeros(arguments[0].shape, dtype=options.get("dtype"))
        return function(*arguments, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sum_device", [None, CPU])
def test_an_offloaded_optimizer_moves_gradients_and_weights_once_per_step(dtype, sum_device):
    model = torch.nn.Linear(4, 3, bias=False, device="meta")
    with Transfers() as transfers:
        masters = masters_of(model, dtype, device=CPU, sum_device=sum_device, lr=1e-2)
        cast_parameters(model, dtype)
        for _ in range(3):
            model(torch.ones(8, 4, dtype=dtype, device="meta")).sum().backward()
        masters.collect()
        masters.optimizer.step()
    *gradients, weight = transfers.made
    assert weight == ("cpu", "meta", dtype, 12)
    sums = [torch.float32] if sum_device is None else [torch.float32, dtype, dtype]
    assert gradients == [("meta", "cpu", each, 12) for each in sums]


def test_gradients_that_are_large_for_the_gpu_are_summed_in_cpu_memory():
    assert sums_fit(5_000_000_000, 80e9) and not sums_fit(7_600_000_000, 80e9) and sums_fit(7_600_000_000, 141e9)


def test_discarded_gradients_do_not_reach_the_masters():
    model = linear()
    masters = masters_of(model, torch.bfloat16, lr=0.0)
    cast_parameters(model, torch.bfloat16)
    for factor in (100.0, 1.0):
        masters.discard()
        (model.bias * factor).sum().backward()
    masters.collect()
    assert masters.masters[1].grad.tolist() == [1.0] * 3


def test_ranks_add_up_their_sums_once_per_step():
    """The second rank has no gradient of the weight, the first has none of the bias, and none has one of the third."""
    calls = []

    def with_the_other_rank(tensors):
        calls.append([tuple(t.shape) for t in tensors])
        if len(calls) == 1:
            tensors[0] += torch.tensor([0.0, 1.0, 0.0])
        else:
            tensors[1] += 2.0

    model = torch.nn.ParameterList([torch.nn.Parameter(torch.ones(2)) for _ in range(3)])
    masters = masters_of(model, torch.bfloat16, lr=0.0)
    cast_parameters(model, torch.bfloat16)
    for _ in range(3):
        model[0].sum().backward()
    masters.collect(with_the_other_rank)
    assert calls == [[(3,)], [(2,), (2,)]]
    assert [None if m.grad is None else m.grad.tolist() for m in masters.masters] == [[3.0, 3.0], [2.0, 2.0], None]


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
    masters = masters_of(model, device=torch.device("cpu"), lr=1e-2)
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
