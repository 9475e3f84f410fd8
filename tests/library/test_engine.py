"""The one-node linear with a low-rank change: what it keeps for backward, and that a gradient is never wrong, whatever the model does around it."""

from __future__ import annotations

import copy
import pickle
import sys

import pytest
import torch
import torch.nn.functional as F
from measuring import saved_bytes
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaModel, ViTConfig, ViTModel

from veneer import AdaLoraConfig, BOFTConfig, HRAConfig, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, get_peft_model, strategy


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


NAMES = ["q", "k", "v", "down"]
OTHERS = {
    "DoRA": LoraConfig(r=2, target_modules=NAMES, use_dora=True, init_lora_weights=False),
    "LoHa": LoHaConfig(r=3, target_modules=NAMES, init_weights=False),
    "LoKr": LoKrConfig(r=2, target_modules=NAMES, init_weights=False),
    "OFT": OFTConfig(oft_block_size=4, target_modules=NAMES, init_weights=False),
    "OFT, exact": OFTConfig(oft_block_size=4, target_modules=NAMES, init_weights=False, use_cayley_neumann=False),
    "BOFT": BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, target_modules=NAMES, init_weights=False),
    "HRA": HRAConfig(r=2, target_modules=NAMES, init_weights=False),
    "IA3": IA3Config(target_modules=NAMES, feedforward_modules=["down"], init_ia3_weights=False),
}


def make(change=None, config=None, **options):
    torch.manual_seed(0)
    block = Block()
    if change:
        change(block)
    config = config or LoraConfig(r=2, target_modules=NAMES, init_lora_weights=False, **options)
    return get_peft_model(block.double(), copy.deepcopy(config))


def x():
    return torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(model, run=None, how="split"):
    """By the node, or (how = "autograd") by autograd over the merged weight, without it."""
    start = x().requires_grad_()
    with pytest.MonkeyPatch.context() as patch, strategy("merged" if how == "autograd" else how):
        if how == "autograd":
            patch.setattr(sys.modules["veneer.engine.evaluate"], "_in_one_node", lambda *args: None)
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
    plain = Source.pure
    monkeypatch.setattr(Source, "pure", lambda self, *origins: calls.append(id(self)) or plain(self, *origins))
    gradients(model)
    return calls


def test_gradients_are_those_of_the_merged_weight():
    model = make()
    for how in ("split", "merged", "auto"):
        agree(gradients(model, how=how), gradients(model, how="autograd"))


def test_an_input_is_made_once_for_all_its_readers(monkeypatch):
    calls = made(make(), monkeypatch)
    assert len(calls) == len(set(calls)) == 2  # q, k and v share one, down has its own


def test_the_only_reader_has_its_input_made_in_pieces(monkeypatch):
    for options in ({}, {"lora_dropout": 0.3}):
        monkeypatch.setattr("veneer.operators.base.NUMBERS_IN_CACHE", 64)
        model = make(**options)
        calls = made(model, monkeypatch)
        assert len(calls) > 3 and len(set(calls)) == 2
        found = []
        for numbers in (64, 1 << 20):
            monkeypatch.setattr("veneer.operators.base.NUMBERS_IN_CACHE", numbers)
            torch.manual_seed(1)
            found.append(gradients(model))
        agree(*found)
        if not options:
            agree(found[0], gradients(model, how="autograd"))


def test_a_norm_over_several_dimensions_is_made_whole(monkeypatch):
    monkeypatch.setattr("veneer.operators.base.NUMBERS_IN_CACHE", 8)
    torch.manual_seed(0)
    model = get_peft_model(
        nn.Sequential(nn.Linear(8, 8), nn.LayerNorm((5, 8)), nn.Linear(8, 8)).double(),
        LoraConfig(r=2, target_modules=["2"], init_lora_weights=False),
    )
    agree(gradients(model), gradients(model, how="autograd"))


def test_the_norms_of_language_models_are_made_again_too(monkeypatch):
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    torch.manual_seed(0)
    base = LlamaModel(config).double()
    base.layers[0].input_layernorm.weight.data.normal_()
    model = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    trained, ids = [p for p in model.parameters() if p.requires_grad], torch.arange(6).view(2, 3)

    def found():
        return torch.autograd.grad(model(input_ids=ids, inputs_embeds=None).last_hidden_state.square().sum(), trained)

    calls = []
    from veneer.engine.sources import Source

    plain = Source.pure
    monkeypatch.setattr(Source, "pure", lambda self, *origins: calls.append(self.function.__name__) or plain(self, *origins))
    first = found()
    # The first norm's input has no graph, so nothing keeps it and x itself is kept; the second is the feed-forward's, whose product is down_proj's input.
    assert "pure" in calls and calls.count("_product") == 1
    with strategy("composed"):
        agree(first, found())


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
    agree(one, gradients(model, how="autograd"))


@pytest.mark.parametrize("config", [None, *OTHERS.values()], ids=["LoRA", *OTHERS])
@pytest.mark.parametrize("after", [lambda y: y.add_(1.0), lambda y: y.relu_(), lambda y: y.mul_(2.0)], ids=["add", "relu", "mul"])
def test_the_model_may_edit_the_output_in_place(after, config):
    model = make(lambda b: setattr(b, "after", after), config)
    agree(gradients(model), gradients(model, how="autograd"))


def test_a_view_of_the_noted_output_counts(monkeypatch):
    model = make(lambda b: setattr(b, "between", lambda n: n.view(15, 8).view(3, 5, 8)))
    assert len(made(model, monkeypatch)) == 2
    agree(gradients(model), gradients(model, how="autograd"))


class Gated(nn.Module):
    """A layer that reads the product of an activation and another tensor."""

    def __init__(self, d=8):
        super().__init__()
        self.q, self.k, self.down = nn.Linear(d, d), nn.Linear(d, d), nn.Linear(d, d)
        self.other = lambda m, x: m.k(x)
        self.after = lambda n: n

    def forward(self, x):
        return self.down(self.after(F.silu(self.q(x)) * self.other(self, x)))


def gated(change=lambda m: None, **options):
    torch.manual_seed(0)
    base = Gated().double()
    change(base)
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q", "down"], init_lora_weights=False, **options))


def test_a_product_is_made_again_from_its_two_factors(monkeypatch):
    model = gated()
    assert len(made(model, monkeypatch)) == 1
    agree(gradients(model), gradients(model, how="autograd"))
    assert len(made(gated(lora_dropout=0.3), monkeypatch)) == 1


KEEPS_ITS_PRODUCT = {
    "a factor without a gradient, which nothing keeps": lambda m: setattr(m, "other", lambda m, x: m.k(x).detach()),
    "a factor for each feature": lambda m: setattr(m, "other", lambda m, x: m.k(x).sum((0, 1))),
    "an edit of the product in place": lambda m: setattr(m, "after", lambda n: n.add_(0.5)),
    "a copy": lambda m: setattr(m, "after", clone_reshape),
}


@pytest.mark.parametrize("change", KEEPS_ITS_PRODUCT.values(), ids=KEEPS_ITS_PRODUCT)
def test_where_autograd_does_not_keep_both_factors_the_product_is_kept(change, monkeypatch):
    model = gated(change)
    assert not made(model, monkeypatch)
    agree(gradients(model), gradients(model, how="autograd"))


def test_a_product_under_hooks_and_checkpoints_is_right(monkeypatch):
    model = gated()
    plain = gradients(model)
    for reentrant in (False, True):
        agree(plain, gradients(model, lambda s, r=reentrant: checkpoint(model, s, use_reentrant=r)))

    def offloaded(start):
        with torch.autograd.graph.save_on_cpu():
            return model(start)

    agree(plain, gradients(model, offloaded))


def test_a_factor_that_was_edited_before_backward_is_an_error_and_no_wrong_gradient():
    kept = []
    model = gated(lambda m: setattr(m, "other", lambda m, x: kept.append(m.k(x)) or kept[-1]))
    y = model(x().requires_grad_())
    with torch.no_grad():
        kept[-1].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_gradient_checkpointing(reentrant, dropout):
    model = make(lora_dropout=dropout).train()
    torch.manual_seed(3)
    plain = gradients(model)
    torch.manual_seed(3)
    agree(plain, gradients(model, lambda s: checkpoint(model, s, use_reentrant=reentrant)))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("config", OTHERS.values(), ids=OTHERS)
def test_gradient_checkpointing_of_every_form(config, reentrant):
    model = make(config=config)
    plain = gradients(model)
    agree(plain, gradients(model, how="autograd"))
    agree(plain, gradients(model, lambda s: checkpoint(model, s, use_reentrant=reentrant)))


@pytest.mark.parametrize("config", [None, *OTHERS.values()], ids=["LoRA", *OTHERS])
def test_function_transforms_and_gradients_of_gradients_are_composed(config):
    model, start = make(config=config), x()
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def loss(values, start):
        return torch.func.functional_call(model, values, (start,)).square().sum()

    found = torch.func.grad(loss)(trained, start)
    agree(list(found.values()), torch.autograd.grad(model(start).square().sum(), list(trained.values())))
    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(trained, start.unsqueeze(1))
    agree([g.sum(0) for g in each.values()], list(found.values()))

    def twice(how):
        with pytest.MonkeyPatch.context() as patch, strategy(how):
            patch.setattr(sys.modules["veneer.engine.evaluate"], "_in_one_node", lambda *args: None)
            seen = start.clone().requires_grad_()
            (g,) = torch.autograd.grad(model(seen).square().sum(), seen, create_graph=True)
            return torch.autograd.grad(g.square().sum(), list(trained.values()))

    with strategy("composed"):
        seen = start.clone().requires_grad_()
        (g,) = torch.autograd.grad(model(seen).square().sum(), seen, create_graph=True)
        found = torch.autograd.grad(g.square().sum(), list(trained.values()))
    agree(found, twice("merged"))
    assert any(t.abs().max() > 0 for t in found)


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


def test_an_edit_of_data_that_autograd_cannot_see_does_not_change_what_the_input_was():
    model = make()
    expected = gradients(model, how="autograd")
    start = x().requires_grad_()
    loss = model(start).square().sum()
    norm = model.get_base_model().norm
    first = norm.weight.detach().clone()
    norm.weight.data.mul_(2)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, trained)
    norm.weight.data.copy_(first)
    # v reads the norm; what lies behind it (q, k, v) has had its gradient before the norm's own backward.
    agree(found, expected[1:])


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


def small_vit():
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=192, num_hidden_layers=2, num_attention_heads=3, intermediate_size=768, image_size=112)
    return ViTModel(config, add_pooling_layer=False)


TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
# Beyond the frozen model: tokens × r numbers of every layer, small factors, and the outputs of o_proj and fc2 where row factors read them.
KEPT = {
    "LoRA": (LoraConfig(r=4, target_modules=TARGETS), 1.05),
    "LoRA with dropout": (LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.1), 1.07),
    "DoRA": (LoraConfig(r=4, target_modules=TARGETS, use_dora=True), 1.24),
    "LoHa": (LoHaConfig(r=4, target_modules=TARGETS), 1.10),
    "LoKr": (LoKrConfig(r=4, target_modules=TARGETS), 1.05),
    "AdaLoRA": (AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=TARGETS), 1.05),
    "OFT": (OFTConfig(oft_block_size=16, target_modules=TARGETS), 1.10),
    "OFT, exact": (OFTConfig(oft_block_size=16, target_modules=TARGETS, use_cayley_neumann=False), 1.10),
    "BOFT": (BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=TARGETS), 1.26),
    "IA3": (IA3Config(target_modules=TARGETS, feedforward_modules=["fc2"]), 1.26),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize(("config", "limit"), KEPT.values(), ids=KEPT)
def test_what_is_kept_for_backward_is_what_the_frozen_model_keeps(config, limit, autocast):
    floor = small_vit().requires_grad_(False)
    floor.embeddings.register_forward_hook(lambda m, i, out: out.requires_grad_())
    model = get_peft_model(small_vit(), copy.deepcopy(config)).train()
    pixels = torch.randn(8, 3, 112, 112)

    def run(m):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return m(pixel_values=pixels).last_hidden_state.float().square().mean()

    base, mine = (saved_bytes(m, lambda m=m: run(m)) for m in (floor, model))
    assert mine < limit * base


def test_a_gated_feed_forward_keeps_what_the_frozen_one_keeps():
    def llama():
        sizes = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
        return LlamaModel(LlamaConfig(vocab_size=8, **sizes))

    floor = llama().requires_grad_(False)
    floor.embed_tokens.register_forward_hook(lambda m, i, out: out.requires_grad_())
    model, ids = get_peft_model(llama(), LoraConfig(r=2, target_modules="all-linear")), torch.arange(256).view(2, 128) % 8
    base, mine = (saved_bytes(m, lambda m=m: m(input_ids=ids).last_hidden_state.square().mean()) for m in (floor, model))
    assert mine < 1.06 * base


def test_under_autocast_gradients_are_those_of_its_own_operations():
    torch.manual_seed(0)
    block = Block(16)
    model = get_peft_model(block, LoraConfig(r=4, target_modules=["q", "k", "v", "down"], init_lora_weights=False))
    start = torch.randn(3, 5, 16)
    trained = [p for p in model.parameters() if p.requires_grad]

    def found(low):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            out = model(start)
        return torch.autograd.grad(out.float().square().sum(), trained)

    for low, exact in zip(found(True), found(False), strict=True):
        assert low.dtype is torch.float32
        assert (low - exact).norm() < 0.03 * exact.norm()


def test_small_changes_of_a_half_precision_weight_are_not_rounded_away():
    torch.manual_seed(0)
    layer = nn.Linear(16, 16, bias=False).bfloat16()
    model = get_peft_model(nn.Sequential(layer), LoraConfig(r=1, lora_alpha=1, target_modules=["0"]))
    adapter = layer.veneer["default"]["weight"]
    with torch.no_grad():
        adapter.lora_A.fill_(1e-3)
        adapter.lora_B.fill_(1e-2)
    start = torch.zeros(4096, 16, dtype=torch.bfloat16)
    start[:, 0] = 1
    with torch.no_grad():
        layer.weight[:, 0] = 0
    assert model(start).detach().float().mean().item() == pytest.approx(1e-5, rel=0.01)
