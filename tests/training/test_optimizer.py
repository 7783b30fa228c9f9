"""The optimizer: updates equal those of transformers' Trainer, resuming is exact, and what can't work is refused."""

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import tiny
import torch
from torch.optim.lr_scheduler import LinearLR, MultiStepLR, ReduceLROnPlateau
from torch.overrides import TorchFunctionMode
from transformers import Trainer, TrainingArguments

from reinforcepp import ReinforceConfig
from reinforcepp.distributed.ranks import Ranks
from reinforcepp.errors import ConfigError
from reinforcepp.models.loading import with_fused_gelu
from reinforcepp.training import checkpoint
from reinforcepp.training.builder import start_learners
from reinforcepp.training.critic import Critic
from reinforcepp.training.learner import Learner
from reinforcepp.training.optimizer import with_given_rate
from reinforcepp.types import Completion, Prompt

IDS = torch.tensor([[5, 7, 11, 13], [17, 19, 23, 29]])
STEPS = 6


def learner(tmp_path, model=None, optimizers=(None, None), **settings) -> Learner:
    defaults = {
        "output_dir": str(tmp_path / "run"),
        "learning_rate": 1e-2,
        "max_grad_norm": 1e9,
        "mixed_precision": "no",
    }
    config = ReinforceConfig(**(defaults | settings))
    made, _ = start_learners(model or tiny.model(), config, Ranks((), tmp_path), updates=STEPS, optimizers=optimizers)
    return made


def train(made: Learner, steps: range) -> None:
    for step in steps:
        with made.learning():
            made.backward(made.model(input_ids=IDS + step, labels=IDS + step).loss)
        made.step(made.clip())


def weights(made: Learner) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in made.plain.state_dict().items()}


@pytest.mark.parametrize("optim", ["adamw_torch_fused", "adamw_torch", "adafactor", "sgd", "adagrad", "rmsprop"])
def test_updates_are_those_of_transformers_trainer(tmp_path, optim):
    """With weight decay, from which norms and biases are excluded, and a schedule."""
    settings = {"optim": optim, "adam_beta1": 0.8, "adam_beta2": 0.9, "adam_epsilon": 1e-3, "weight_decay": 0.5}
    made = learner(tmp_path, **settings)
    train(made, range(3))
    model = with_fused_gelu(tiny.model().eval())  # the gradient of a key's bias is rounding error
    args = TrainingArguments(output_dir=str(tmp_path), learning_rate=1e-2, use_cpu=True, report_to="none", **settings)
    optimizer = Trainer(model=model, args=args).create_optimizer()
    for step in range(3):
        model(input_ids=IDS + step, labels=IDS + step).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, theirs in model.state_dict().items():
        torch.testing.assert_close(made.plain.state_dict()[name], theirs, atol=1e-6, rtol=0)


def given(model) -> tuple[torch.optim.Optimizer, MultiStepLR]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return optimizer, MultiStepLR(optimizer, [2, 4], gamma=0.5)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_loading_a_state_discards_gradients_of_a_stopped_step(tmp_path, precision):
    made = learner(tmp_path, mixed_precision=precision)
    saved = made.state()
    norms = []
    for stops in (False, True):
        if stops:  # between two micro-batches
            with made.learning(last=False):
                made.backward(made.model(input_ids=IDS + 9, labels=IDS + 9).loss)
        made.load_state(*saved)
        with made.learning():
            made.backward(made.model(input_ids=IDS, labels=IDS).loss)
        norms.append(made.clip())
    assert norms[0] == norms[1]


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("optim", ["adamw_torch", "adafactor", "adagrad", given])
def test_resuming_is_exact(tmp_path, optim: str | Callable, precision):
    """The state goes through the files of a checkpoint."""

    def start() -> Learner:
        model = tiny.model()
        if callable(optim):
            return learner(tmp_path, model, optim(model), mixed_precision=precision)
        return learner(
            tmp_path, model, optim=optim, weight_decay=0.1, lr_scheduler_type="cosine", mixed_precision=precision
        )

    whole = start()
    train(whole, range(STEPS))
    stopped = start()
    train(stopped, range(3))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    saved = stopped.state()
    groups = checkpoint.save_optimizer(saved[1], "policy", folder)
    resumed = start()
    optimizer = checkpoint.load_optimizer(checkpoint.Checkpoint(folder), "policy", groups)
    resumed.load_state(saved[0], optimizer, saved[2])
    train(resumed, range(3, STEPS))
    assert resumed.scheduler.get_last_lr() == whole.scheduler.get_last_lr()
    for name, value in weights(whole).items():
        assert torch.equal(weights(resumed)[name], value), name
    with pytest.raises(ConfigError, match="Resume with the optimizer of the run's start"):
        learner(tmp_path, optim="rmsprop").load_state(saved[0], optimizer, saved[2])


def test_parameters_outside_a_given_optimizer_are_frozen(tmp_path, capsys):
    model = tiny.model(tied=False)
    optimizer = torch.optim.SGD(model.lm_head.parameters(), lr=0.5)
    before = model.transformer.wte.weight.clone()
    made = learner(tmp_path, model, (optimizer, None), lr_scheduler_type="constant")
    train(made, range(2))
    assert torch.equal(made.plain.transformer.wte.weight, before)
    assert "Learning rate 0.5: that of the given optimizer." in (printed := capsys.readouterr().err)
    assert "tensors aren't in the optimizer; they are frozen" in printed
    assert made.scheduler.get_last_lr() == [0.5]


def test_the_rate_of_a_given_optimizer_is_its_peak():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    LinearLR(optimizer, start_factor=0.1)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    assert with_given_rate(ReinforceConfig(), optimizer).learning_rate == 0.5
    assert with_given_rate(ReinforceConfig(learning_rate=0.1), optimizer).learning_rate == 0.1


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    ("optimizers", "settings", "message"),
    [
        (lambda model: (sgd(tiny.model()), None), {}, "aren't trainable parameters of the given model"),
        (lambda model: (sgd(model), None), {"use_peft": True}, "LoRA weights are created after the optimizer"),
        (lambda model: (sgd(model), None), {"optim": "sgd"}, "optim and optimizers are both given"),
        (lambda model: (None, MultiStepLR(sgd(model), [1])), {}, "a scheduler without its optimizer"),
        (lambda model: (sgd(model), MultiStepLR(sgd(model), [1])), {}, "isn't a schedule of the given optimizer"),
        (lambda model: ((one := sgd(model)), ReduceLROnPlateau(one)), {}, "ReduceLROnPlateau isn't a schedule"),
        (lambda model: (torch.optim.LBFGS(model.parameters()), None), {}, "LBFGS"),
        (lambda model: ("adamw", None), {}, "isn't a torch.optim.Optimizer"),
    ],
)
def test_optimizers_that_cannot_work_are_refused(tmp_path, optimizers, settings, message):
    model = tiny.model()
    with pytest.raises(ConfigError, match=message):
        learner(tmp_path, model, optimizers(model), **settings)


def test_optimizers_that_need_other_packages_are_refused():
    with pytest.raises(ConfigError, match=r"optim must be one of adamw_torch_fused, .*not 'galore_adamw'"):
        ReinforceConfig(optim="galore_adamw")


# --- critic ---------------------------------------------------------------------------------------------------------


class Indices(TorchFunctionMode):
    """Records the types of indices of tensors."""

    def __init__(self):
        super().__init__()
        self.types = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            self.types |= {type(part) for part in (args[1] if isinstance(args[1], tuple) else [args[1]])}
        return function(*args, **(kwargs or {}))


def test_the_critic_indexes_rows_by_tensors():
    """A GPU would wait for the copy of a list."""
    settings = ReinforceConfig(estimator="ppo", learning_rate=1e-5, value_clip=0.2, mixed_precision="no")
    critic = Critic(tiny.model("llama"), Ranks(), settings, steps=1)
    torch.nn.init.normal_(critic.plain.get_output_embeddings().weight)
    given = [((5, 6, 7), (10, 11)), ((9,), (12, 13, 14)), ((4, 8), (15,))]
    completions = [Completion(Prompt("", ids, 0), answer, (), "", "length") for ids, answer in given]
    mask_BT = torch.tensor([[1.0, 1, 0], [1, 1, 1], [1, 0, 0]])
    generator = torch.Generator().manual_seed(0)
    old_BT, returns_BT = (torch.randn(3, 3, generator=generator) for _ in range(2))
    batch = SimpleNamespace(
        values_BT=old_BT, returns_BT=returns_BT, rollout=SimpleNamespace(completions=completions, mask_BT=mask_BT)
    )
    with Indices() as indices:
        loss = critic.loss(batch, [2, 0], 3.0, pad_id=0)
    assert list not in indices.types and torch.Tensor in indices.types
    values_BT = critic.values(completions, [2, 0], 3, pad_id=0)
    rows = [2, 0]
    old, returns, mask = old_BT[rows], returns_BT[rows], mask_BT[rows]
    clipped = old + (values_BT - old).clamp(-0.2, 0.2)
    expected = (torch.maximum((values_BT - returns) ** 2, (clipped - returns) ** 2) / 2 * mask).sum() / 3
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-6)
