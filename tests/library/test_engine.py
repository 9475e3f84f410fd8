"""The one-node linear with a low-rank change: what it keeps for backward, and that a gradient is never wrong, whatever the model does around it."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import ViTConfig, ViTModel

from veneer import LoraConfig, get_peft_model, strategy


class Block(nn.Module):
    """Normalise, three readers, activate, one reader."""

    def __init__(self, d=8):
        super().__init__()
        self.norm, self.act = nn.LayerNorm(d), nn.GELU()
        self.q, self.k, self.v, self.down = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.between = lambda x: x
        self.after = lambda y: y

    def forward(self, x):
        n = self.between(self.norm(x * 1.0))
        return x + self.after(self.q(n)) * self.k(n) + self.down(self.act(self.v(n)))


def make(change=None, **options):
    torch.manual_seed(0)
    block = Block()
    if change:
        change(block)
    model = get_peft_model(block.double(), LoraConfig(r=2, target_modules=["q", "k", "v", "down"], init_lora_weights=False, **options))
    return model


def x():
    return torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(model, run=None, how="split"):
    start = x().requires_grad_()
    with strategy(how):
        (run or model)(start).square().sum().backward()
    found = [start.grad] + [p.grad for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    return found


def agree(a, b):
    for g, h in zip(a, b, strict=True):
        torch.testing.assert_close(g, h, rtol=1e-10, atol=1e-10)


def made(model, monkeypatch):
    """Counts how often backward makes an input again."""
    from veneer.engine.sources import Source

    calls = []
    plain = Source.make
    monkeypatch.setattr(Source, "make", lambda self, origin: calls.append((id(self), self.made is None)) or plain(self, origin))
    gradients(model)
    return calls


def test_gradients_are_those_of_the_merged_weight():
    model = make()
    agree(gradients(model), gradients(model, how="merged"))


def test_an_input_is_made_once_for_all_its_readers(monkeypatch):
    calls = made(make(), monkeypatch)
    assert len(calls) == 4 and sum(first for _, first in calls) == 2  # q, k and v share one, down has its own


def clone_reshape(n):
    return n.transpose(0, 1).contiguous().transpose(0, 1)


def add_in_place(n):
    return n.add_(0.5)


FALLS_BACK = {
    "a copying reshape": lambda b: setattr(b, "between", clone_reshape),
    "an in-place edit": lambda b: setattr(b, "between", add_in_place),
    "a functional norm": lambda b: setattr(b, "between", lambda n: F.layer_norm(n, (8,))),
    "a hook that replaces the output": lambda b: b.norm.register_forward_hook(lambda m, a, y: y * 2),
    "dropout in between": lambda b: setattr(b, "between", nn.Dropout(0.5)),
}


@pytest.mark.parametrize("change", FALLS_BACK.values(), ids=FALLS_BACK)
def test_where_the_input_is_not_the_noted_output_it_is_kept(change, monkeypatch):
    model = make(change)
    assert len(made(model, monkeypatch)) == 1  # the activation's alone
    torch.manual_seed(2)
    one = gradients(model)
    torch.manual_seed(2)
    agree(one, gradients(model, how="merged"))


@pytest.mark.parametrize("after", [lambda y: y.add_(1.0), lambda y: y.relu_(), lambda y: y.mul_(2.0)], ids=["add", "relu", "mul"])
def test_the_model_may_edit_the_output_in_place(after):
    model = make(lambda b: setattr(b, "after", after))
    agree(gradients(model), gradients(model, how="merged"))


def test_a_view_of_the_noted_output_counts(monkeypatch):
    model = make(lambda b: setattr(b, "between", lambda n: n.view(15, 8).view(3, 5, 8)))
    assert len(made(model, monkeypatch)) == 4
    agree(gradients(model), gradients(model, how="merged"))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing(reentrant, dropout):
    model = make(lora_dropout=dropout).train()
    torch.manual_seed(3)
    plain = gradients(model)
    torch.manual_seed(3)
    agree(plain, gradients(model, lambda s: checkpoint(model, s, use_reentrant=reentrant)))


def test_a_second_backward_over_a_kept_graph_gives_the_same():
    model = make(lora_dropout=0.3)
    loss = model(x()).square().sum()
    loss.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    loss.backward()
    agree(first, [p.grad for p in model.parameters() if p.requires_grad])


def test_a_backward_through_one_reader_only():
    model = make()
    block = model.get_base_model()
    n = block.norm(x().requires_grad_() * 1.0)
    q, k = block.q(n), block.k(n)
    q.sum().backward(retain_graph=True)
    k.sum().backward()
    found = [p.grad for layer in (block.q, block.k) for p in layer.parameters() if p.requires_grad]
    model.zero_grad()
    with strategy("merged"):
        (block.q(n.detach()).sum() + block.k(n.detach()).sum()).backward()
    agree(found, [p.grad for layer in (block.q, block.k) for p in layer.parameters() if p.requires_grad])


def test_a_norm_changed_before_backward_is_an_error_and_no_wrong_gradient():
    model = make()
    loss = model(x().requires_grad_()).square().sum()
    with torch.no_grad():
        model.get_base_model().norm.weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_gradient_of_a_gradient_is_refused():
    model, start = make(), x().requires_grad_()
    (g,) = torch.autograd.grad(model(start).square().sum(), start, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.sum().backward()


def test_autocast_and_half_precision_take_their_own_ways():
    model = make().float()
    with torch.autocast("cpu", torch.bfloat16):
        model(x().float()).float().square().sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in model.parameters() if p.requires_grad)
    half = get_peft_model(Block().bfloat16(), LoraConfig(r=2, target_modules=["q", "v"]))
    half(x().bfloat16()).sum().backward()
    assert all(p.grad.dtype is torch.float32 for p in half.parameters() if p.requires_grad)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_note_for_themselves_and_unloading_leaves_no_hook(copied):
    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)), LoraConfig(r=2, target_modules=["1"]))
    twin = copied(model)
    assert twin.get_base_model()[0]._forward_hooks
    for m in (twin, model):
        m(torch.randn(2, 4)).sum().backward()
        assert not m.unload()[0]._forward_hooks


def test_layers_that_read_one_tensor_share_a_mask_and_a_new_forward_draws_anew():
    torch.manual_seed(0)
    model = get_peft_model(
        nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)}), LoraConfig(r=2, target_modules=["a", "b"], lora_dropout=0.5)
    ).train()
    layers, start = model.get_base_model(), torch.randn(4, 8)
    held = []
    for _ in range(3):
        for name in "ab":
            layers[name](start)
            held.append(start._veneer_mask[0].seed)
    assert held[0] == held[1] and held[2] == held[3] and len(set(held)) == 3


def kept_bytes(model, run):
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(t):
        s = t.untyped_storage()
        if s.data_ptr() not in own:
            kept[s.data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    total = sum(t.untyped_storage().nbytes() for t in kept.values())
    out.backward()
    return total


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_is_kept_for_backward_is_what_the_frozen_model_keeps(dropout):
    def vit():
        torch.manual_seed(0)
        config = ViTConfig(hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=768, image_size=112)
        return ViTModel(config, add_pooling_layer=False)

    floor = vit().requires_grad_(False)
    floor.embeddings.register_forward_hook(lambda m, i, out: out.requires_grad_())
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
    model = get_peft_model(vit(), LoraConfig(r=4, target_modules=targets, lora_dropout=dropout)).train()
    pixels = torch.randn(2, 3, 112, 112)
    base, mine = (kept_bytes(m, lambda m=m: m(pixel_values=pixels).last_hidden_state.square().mean()) for m in (floor, model))
    assert mine < 1.10 * base  # tokens × r numbers of every layer are its 4 / 192
