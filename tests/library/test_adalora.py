"""AdaLoRA in training loops of every sort, without a line from the user."""

from __future__ import annotations

import copy
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import get_scheduler

from veneer import AdaLoraConfig, ConfigError, PeftModel, StateError, get_peft_model

STEPS = 12


class Model(nn.Module):
    def __init__(self, layers=2, width=16):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def base(**options):
    torch.manual_seed(0)
    return Model(**options)


def make(model=None, **options):
    torch.manual_seed(1)
    values = {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": STEPS, "target_modules": ["0", "1"]}
    return get_peft_model(model or base(), AdaLoraConfig(**values | options))


def batches(n=STEPS, size=8):
    generator = torch.Generator().manual_seed(2)
    return [(torch.randn(size, 16, generator=generator), torch.randn(size, 16, generator=generator)) for _ in range(n)]


def train(model, data, optimizer=None, *, accumulate=1):
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=1e-2)
    for i, (x, y) in enumerate(data):
        ((model(x) - y).square().mean() / accumulate).backward()
        if (i + 1) % accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
    return optimizer


def adapters(model):
    return [m.veneer["default"]["weight"] for m in model.get_base_model().layers if hasattr(m, "veneer")]


def ranks(model):
    return [int((a.lora_E != 0).sum()) for a in adapters(model)]


def test_the_budget_falls_to_the_target_and_stays():
    model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = []
    for batch in batches():
        train(model, [batch], optimizer)
        seen.append(sum(ranks(model)))
    assert seen[:2] == [12, 12] and seen[STEPS - 4 :] == [4] * 4
    assert all(a >= b for a, b in pairwise(seen))
    assert [int(a.step) for a in adapters(model)] == [STEPS, STEPS]


def test_accumulated_batches_count_as_one_step():
    one, many = make(), make()
    data = batches()
    train(one, data)
    halves = [(x[s], y[s]) for x, y in data for s in (slice(0, 4), slice(4, 8))]
    train(many, halves, accumulate=2)
    assert [int(a.step) for a in adapters(many)] == [STEPS, STEPS]
    for a, b in zip(one.parameters(), many.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_the_penalty_is_there_whatever_the_model_returns():
    free, held = make(orth_reg_weight=0.0), make(orth_reg_weight=2.0)
    data = batches()
    train(free, data, torch.optim.SGD(free.parameters(), lr=0.6)), train(held, data, torch.optim.SGD(held.parameters(), lr=0.6))

    def distance(model):
        return sum(torch.linalg.matrix_norm(a.lora_A @ a.lora_A.mT - torch.eye(6)).item() for a in adapters(model))

    assert distance(held) < 0.7 * distance(free)


def test_the_penaltys_gradient_is_autograds():
    from veneer.methods.schedules.budget import _penalty_gradient

    for rows in (True, False):
        p = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
        gram = p @ p.mT if rows else p.mT @ p
        torch.linalg.matrix_norm(gram - torch.eye(len(gram), dtype=p.dtype)).backward()
        torch.testing.assert_close(_penalty_gradient(p.detach(), rows), p.grad)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    data, whole = batches(), make()
    train(whole, data)
    first = make()
    optimizer = train(first, data[:7])
    first.save_pretrained(tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    again = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    optimizer = torch.optim.AdamW(again.parameters(), lr=1e-2)
    optimizer.load_state_dict(state)
    train(again, data[7:], optimizer)
    assert ranks(again) == ranks(whole)
    for a, b in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_state_dict_holds_the_importance():
    first, second = make(), make()
    train(first, batches(5))
    second.load_state_dict(first.state_dict())
    assert [int(a.step) for a in adapters(second)] == [5, 5]
    assert all(
        torch.equal(a.lora_A_importance, b.lora_A_importance) and a.lora_A_importance.any()
        for a, b in zip(adapters(first), adapters(second), strict=True)
    )


def test_without_a_number_of_steps_the_first_step_is_an_error():
    model = make(total_step=None)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(StateError, match="number of training steps before the first one"):
        train(model, batches(1))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", ["linear", "cosine", "polynomial", "onecycle"])
def test_the_scheduler_tells_the_number_of_steps(name):
    model = make(total_step=None)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    if name == "onecycle":
        torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS)
    else:
        get_scheduler(name, optimizer, num_warmup_steps=0, num_training_steps=STEPS)
    assert model.peft_config["default"].total_step == STEPS
    train(model, batches(), optimizer)
    assert sum(ranks(model)) == 4


def test_a_scheduler_that_counts_epochs_is_not_believed():
    model = make(total_step=None)
    torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.AdamW(model.parameters()), T_max=STEPS)
    assert model.peft_config["default"].total_step is None


def test_a_training_too_short_to_prune_in_is_an_error_before_it_starts():
    model = make(total_step=None)
    with pytest.raises(ConfigError, match="no step to prune in"):
        get_scheduler("linear", torch.optim.AdamW(model.parameters()), num_warmup_steps=0, num_training_steps=5)


def test_another_models_optimizer_does_not_count():
    model, other = make(), nn.Linear(2, 2)
    other(torch.ones(2)).sum().backward()
    torch.optim.SGD(other.parameters(), lr=0.1).step()
    assert [int(a.step) for a in adapters(model)] == [0, 0]


def test_a_copy_has_a_schedule_of_its_own():
    model = make()
    twin = copy.deepcopy(model)
    train(twin, batches())
    assert [int(a.step) for a in adapters(model)] == [0, 0] and sum(ranks(twin)) == 4


def test_loss_scaling_is_undone_before_importance_is_taken():
    plain, scaled = make(), make()
    data = batches(4)
    train(plain, data)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.AdamW(scaled.parameters(), lr=1e-2)
    for x, y in data:
        scaler.scale((scaled(x) - y).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    for a, b in zip(adapters(plain), adapters(scaled), strict=True):
        torch.testing.assert_close(a.lora_A_importance, b.lora_A_importance, rtol=1e-4, atol=1e-8)


class Parallel(Model):
    """Layers side by side, so that each has a task of its own."""

    def forward(self, x):
        return torch.cat([layer(x) for layer in self.layers], -1)


def test_the_budget_goes_to_the_planted_layers():
    torch.manual_seed(0)
    width, planted = 24, {1, 4}
    plain = Parallel(layers=6, width=width)
    target = copy.deepcopy(plain)
    with torch.no_grad():
        for i in planted:
            target.layers[i].weight += torch.randn(width, 3) @ torch.randn(3, width) / 6
    names = [str(i) for i in range(6)]
    model = make(plain, init_r=4, target_r=1, tinit=40, tfinal=60, total_step=200, target_modules=names, orth_reg_weight=0.1, lora_alpha=16)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2, weight_decay=0.0)
    for _ in range(200):
        x = torch.randn(64, width)
        with torch.no_grad():
            y = target(x) + 0.1 * torch.randn(64, 6 * width)
        (model(x) - y).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = ranks(model)
    assert [found[i] for i in sorted(planted)] == [3, 3] and sum(found) == 6, found


def test_a_finished_run_is_written_as_a_lora_of_many_ranks(tmp_path):
    model = make()
    train(model, batches())
    model.eval()
    model.save_as_lora(tmp_path)
    again = PeftModel.from_pretrained(base(), tmp_path)
    config = again.peft_config["default"]
    assert config.peft_type == "LORA" and again.get_nb_trainable_parameters()[1] == sum(p.numel() for p in base().parameters()) + sum(
        r * 32 for r in ranks(model)
    )
    x = torch.randn(5, 16)
    torch.testing.assert_close(again(x), model(x), rtol=1e-5, atol=1e-6)


def test_what_has_no_low_rank_is_not_written_as_lora(tmp_path):
    from veneer import OFTConfig

    model = get_peft_model(base(), OFTConfig(oft_block_size=4, target_modules=["0"]))
    with pytest.raises(StateError, match="give a rank or a tolerance"):
        model.save_as_lora(tmp_path / "a")
    assert not (tmp_path / "a").exists()


class WithLoss(Model):
    """A model whose output carries the loss, which is where HF PEFT adds the penalty."""

    def forward(self, x, y=None):
        out = super().forward(x)
        return SimpleNamespace(loss=(out - y).square().mean(), out=out) if y is not None else out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", [{}, {"deltaT": 3}, {"tinit": 0, "tfinal": 0}, {"orth_reg_weight": 0.0, "beta1": 0.5, "beta2": 0.7}])
def test_equal_to_hf_peft_with_its_calls_made_by_hand(options, tmp_path):
    import peft

    def plain():
        torch.manual_seed(0)
        return WithLoss()

    values = {
        "init_r": 6,
        "target_r": 2,
        "tinit": 2,
        "tfinal": 3,
        "total_step": STEPS,
        "target_modules": ["0", "1"],
        "lora_alpha": 5,
    } | options
    theirs = peft.get_peft_model(plain(), peft.AdaLoraConfig(**values))
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(plain(), tmp_path, is_trainable=True)
    a, b = torch.optim.AdamW(theirs.parameters(), lr=1e-2), torch.optim.AdamW(ours.parameters(), lr=1e-2)
    for step, (x, y) in enumerate(batches(), 1):
        theirs.base_model(x, y).loss.backward()
        a.step()
        theirs.base_model.update_and_allocate(step)
        a.zero_grad()
        ours(x, y).loss.backward()
        b.step()
        b.zero_grad()
        for i, mine in enumerate(adapters(ours)):
            layer = theirs.base_model.model.layers[i]
            for name in ("lora_A", "lora_E", "lora_B"):
                torch.testing.assert_close(getattr(mine, name), getattr(layer, name)["default"], rtol=1e-4, atol=1e-6)
    assert sum(ranks(ours)) == 4


@pytest.mark.filterwarnings("ignore")
def test_a_pruned_file_of_hf_peft_loads_and_goes_on_training(tmp_path):
    import peft

    theirs = peft.get_peft_model(
        base(), peft.AdaLoraConfig(init_r=6, target_r=2, tinit=0, tfinal=2, total_step=6, target_modules=["0", "1"])
    )
    optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-2)
    for step, (x, y) in enumerate(batches(6), 1):
        (theirs(x) - y).square().mean().backward()
        optimizer.step()
        theirs.base_model.update_and_allocate(step)
        optimizer.zero_grad()
    theirs.save_pretrained(tmp_path)
    ours = PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    x = torch.randn(3, 16)
    torch.testing.assert_close(ours(x), theirs.eval()(x), rtol=1e-5, atol=1e-6)
    assert sum(a.lora_E.numel() for a in adapters(ours)) == 4
    train(ours, batches(6))
    assert sum(ranks(ours)) == 4  # there, the first pruning of a loaded adapter zeroes every λ
