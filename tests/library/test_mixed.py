"""Batches of several adapters on whole models: windows, heads of different widths, checkpoints, generation, training, and what is refused."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
)

from veneer import BOFTConfig, ConfigError, IA3Config, LoHaConfig, LoKrConfig, LoraConfig, OFTConfig, StateError, get_peft_model
from veneer.inject import record

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
METHODS = {
    "lora": lambda t: LoraConfig(r=2, target_modules=t),
    "wide": lambda t: LoraConfig(r=4, target_modules=t, use_rslora=True),
    "dora": lambda t: LoraConfig(r=2, target_modules=t, use_dora=True),
    "loha": lambda t: LoHaConfig(r=2, target_modules=t),
    "lokr": lambda t: LoKrConfig(r=2, target_modules=t),
    "oft": lambda t: OFTConfig(oft_block_size=4, target_modules=t),
    "small": lambda t: OFTConfig(oft_block_size=2, target_modules=t, use_cayley_neumann=False),
    "boft": lambda t: BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=t),
    "ia3": lambda t: IA3Config(target_modules=t),
    "lora2": lambda t: LoraConfig(r=2, target_modules=t),
    "boft2": lambda t: BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=2, target_modules=t),
}


def shake(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if ".veneer." in n:
                p.add_(0.2 * torch.randn(p.shape, generator=generator).to(p))
    return model


def hold(base, targets, names=tuple(METHODS), **options):
    """A model with one adapter for each of these methods."""
    first, *others = names
    model = get_peft_model(base, METHODS[first](targets), first)
    for name in others:
        model.add_adapter(name, METHODS[name](targets))
    return shake(model).eval()


def vit(**options):
    return ViTForImageClassification(
        ViTConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8, **options)
    )


def bert(cls=BertForSequenceClassification, **options):
    return cls(BertConfig(vocab_size=30, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, **options))


def llama(cls=LlamaForCausalLM, **options):
    options = {"vocab_size": 40, "pad_token_id": 0, "eos_token_id": 39, "bos_token_id": 1} | options
    return cls(
        LlamaConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=24, **options)
    )


def alone(model, name, **inputs):
    active = model.active_adapters
    if name == "__base__":
        with model.disable_adapter():
            return model(**inputs)
    model.set_adapter(name)
    out = model(**inputs)
    model.set_adapter(active)
    return out


def same_as_alone(model, names, key="logits", **inputs):
    out = model(**inputs, adapter_names=names)
    for i, name in enumerate(names):
        own = alone(model, name, **{k: v[i : i + 1] for k, v in inputs.items()})
        torch.testing.assert_close(out[key][i], own[key][0], rtol=1e-5, atol=1e-5)
    return out


EVERY = ["boft", "lora", "__base__", "dora", "loha", "lokr", "lora2", "oft", "small", "ia3", "wide", "lora", "boft2", "dora"]


def test_any_mix_of_methods_ranks_and_blocks_on_a_vision_transformer():
    model = hold(vit(), LINEARS)
    x = torch.randn(len(EVERY), 3, 16, 16)
    with torch.no_grad():
        same_as_alone(model, EVERY, pixel_values=x)


def test_windows_of_a_swin_follow_their_picture():
    config = SwinConfig(image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 2], window_size=4)
    model = hold(SwinModel(config), ["q_proj", "v_proj", "fc1", "reduction"], ("lora", "oft", "loha", "boft"))
    with torch.no_grad():
        same_as_alone(
            model, ["oft", "lora", "__base__", "loha", "oft", "boft"], "last_hidden_state", pixel_values=torch.randn(6, 3, 16, 16)
        )


def heads(base, name, widths, targets):
    """One adapter for each width, with a head of its own."""
    model = None
    for adapter, width in widths.items():
        config = LoraConfig(r=2, target_modules=targets, modules_to_save=[name])
        if model is None:
            model = get_peft_model(base, config, adapter)
        else:
            model.add_adapter(adapter, config)
        head = model.get_base_model().get_submodule(name)
        head.veneer[adapter] = nn.Linear(head.in_features, width)
    return shake(model).eval()


def test_heads_of_different_widths_give_each_sample_its_own_logits():
    model = heads(bert(num_labels=3), "classifier", {"a": 2, "b": 5}, ["query", "value"])
    base = model.get_base_model()
    record(base).naming.give(base, "b", dict(enumerate("vwxyz")))
    ids = torch.randint(1, 30, (5, 7))
    names = ["b", "a", "__base__", "a", "b"]
    out = model(input_ids=ids, adapter_names=names)
    assert [len(row) for row in out.logits] == [5, 2, 3, 2, 5]
    for i, name in enumerate(names):
        torch.testing.assert_close(out.logits[i], alone(model, name, input_ids=ids[i : i + 1]).logits[0], rtol=1e-5, atol=1e-5)
    assert out["logits"] is out.logits
    assert out.logits.id2label[0] == dict(enumerate("vwxyz")) and out.logits.id2label[1] is None
    assert out.logits.id2label[2] == model.config.id2label
    (as_tuple,) = model(input_ids=ids, adapter_names=names, return_dict=False)
    assert all(torch.equal(a, b) for a, b in zip(as_tuple, out.logits, strict=True))
    sum(row.logsumexp(-1) for row in out.logits).backward()
    head = model.get_base_model().classifier.veneer["a"]
    assert head.weight.grad.isfinite().all() and head.weight.grad.any()
    with pytest.raises(StateError, match="compute each sample's loss from its own logits"):
        model(input_ids=ids, labels=torch.zeros(5, dtype=torch.long), adapter_names=names)


def test_heads_of_equal_widths_give_one_tensor_and_a_loss():
    model = heads(bert(num_labels=3), "classifier", {"a": 3, "b": 3}, ["query"])
    ids = torch.randint(1, 30, (3, 7))
    out = same_as_alone(model, ["b", "a", "__base__"], input_ids=ids)
    assert out.logits.shape == (3, 3)
    assert model(input_ids=ids, labels=torch.tensor([0, 1, 2]), adapter_names=["b", "a", "b"]).loss.isfinite()


def test_heads_of_tokens_and_heads_that_a_model_picks_rows_of():
    ids = torch.randint(1, 30, (3, 7))
    tokens = heads(bert(BertForTokenClassification, num_labels=3), "classifier", {"a": 2, "b": 4}, ["query"])
    out = tokens(input_ids=ids, adapter_names=["b", "a", "__base__"])
    assert [tuple(row.shape) for row in out.logits] == [(7, 4), (7, 2), (7, 3)]
    last = heads(llama(LlamaForSequenceClassification, num_labels=3), "score", {"a": 2, "b": 4}, ["q_proj"])
    out = last(input_ids=ids, adapter_names=["b", "a", "__base__"])
    for i, name in enumerate(["b", "a", "__base__"]):
        torch.testing.assert_close(out.logits[i], alone(last, name, input_ids=ids[i : i + 1]).logits[0], rtol=1e-5, atol=1e-5)


class Averaged(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.body(x)).softmax(-1)


def test_a_head_whose_output_the_model_goes_on_with_is_refused():
    model = heads(Averaged(), "head", {"a": 2, "b": 5}, ["body"])
    with pytest.raises(StateError, match="computes more from them than it returns"):
        model(torch.randn(2, 4), adapter_names=["a", "b"])
    assert model(torch.randn(2, 4), adapter_names=["a", "a"]).shape == (2, 2)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_by_sample(beams):
    model = hold(llama(), ["q_proj", "v_proj", "up_proj"], ("lora", "oft", "loha", "dora"))
    ids = torch.randint(2, 38, (5, 6))
    names = ["oft", "lora", "__base__", "dora", "oft"]
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
    got = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **options)
    for i, name in enumerate(names):
        own = ids[i : i + 1]
        if name == "__base__":
            with model.disable_adapter():
                expected = model.generate(input_ids=own, attention_mask=torch.ones_like(own), **options)
        else:
            model.set_adapter(name)
            expected = model.generate(input_ids=own, attention_mask=torch.ones_like(own), **options)
        assert torch.equal(got[i], expected[0])


def loss_of(out):
    return out.logits.square().sum()


def separate_gradients(model, ids, names):
    for i, name in enumerate(names):
        model.set_adapter(name)
        loss_of(model(input_ids=ids[i : i + 1])).backward()
    model.set_adapter(sorted(set(names)))
    return collected(model)


def collected(model):
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def equal(found, expected):
    assert found.keys() == expected.keys()
    for n, g in expected.items():
        torch.testing.assert_close(found[n], g, rtol=1e-4, atol=1e-5, msg=lambda m, n=n: f"{n}: {m}")


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints_repeat_the_forward_that_they_belong_to(reentrant):
    names = ["oft", "lora", "dora"]
    model = hold(llama(), ["q_proj", "up_proj"], ("lora", "oft", "dora")).train()
    model.set_adapter(names)
    ids = torch.randint(2, 38, (3, 6))
    expected = separate_gradients(model, ids, names)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    # Only one of the adapters is active: a repetition that asked for it would give the others' gradients to it.
    loss_of(model(input_ids=ids, adapter_names=names)).backward()
    equal(collected(model), expected)
    # Two forwards, and then their backwards.
    first, second = model(input_ids=ids, adapter_names=names), model(input_ids=ids)
    third = model(input_ids=ids, adapter_names=names[::-1])
    loss_of(third).backward()
    collected(model)
    loss_of(first).backward()
    equal(collected(model), expected)
    loss_of(second).backward()
    collected(model)
    both = loss_of(model(input_ids=ids, adapter_names=names)) + loss_of(model(input_ids=ids, adapter_names=names[::-1]))
    with pytest.raises(StateError, match="call backward after each forward"):
        both.backward()


def test_a_checkpoint_of_the_very_first_forwards():
    model = hold(llama(), ["q_proj"], ("lora", "oft")).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    ids = torch.randint(2, 38, (2, 6))
    loss = loss_of(model(input_ids=ids)) + loss_of(model(input_ids=ids, adapter_names=["lora", "oft"]))
    with pytest.raises(StateError, match="call backward after each forward"):
        loss.backward()


def test_stacked_experts_see_their_samples_tokens():
    config = MixtralConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=3,
    )
    target = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}
    model = get_peft_model(MixtralForCausalLM(config), LoraConfig(r=2, **target), "lora")
    model.add_adapter("loha", LoHaConfig(r=1, **target))
    shake(model).eval()
    with torch.no_grad():
        same_as_alone(model, ["loha", "lora", "__base__", "loha"], input_ids=torch.randint(0, 30, (4, 5)))


class Routed(nn.Module):
    """A list of experts, of which the first gets as many tokens as there are samples."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        tokens = x.flatten(0, 1)
        return self.experts[0](tokens[: len(x)]).sum() + self.experts[1](tokens[len(x) :]).sum()


def test_tokens_that_a_router_picks_are_refused():
    model = hold(Routed(), ["0", "1"], ("lora", "oft"))
    with pytest.raises(StateError, match=r"experts\.0: the rows of an input of shape \(3, 4\) are not all tokens"):
        model(torch.randn(3, 6, 4), adapter_names=["lora", "oft", "lora"])


def test_a_compiled_model_is_refused_as_a_whole_and_runs_piece_by_piece():
    torch._dynamo.reset()
    model, x = small(), torch.randn(3, 4)
    names = ["second", "__base__", "first"]
    expected = model(x, adapter_names=names)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"adapter_names cannot be followed by torch\.compile"):
        torch.compile(model, backend="eager", fullgraph=True)(x, adapter_names=names)
    pieces = torch.compile(model, backend="eager")
    for order in (names, names[::-1]):
        torch.testing.assert_close(pieces(x, adapter_names=order), model(x, adapter_names=order))
    torch.testing.assert_close(model(x, adapter_names=names), expected)


def test_training_three_adapters_in_one_step_equals_separate_runs():
    names = ["lora", "oft", "lokr"]
    x, target = torch.randn(3, 4, 3, 16, 16), torch.randn(3, 4, 2)

    def build():
        torch.manual_seed(3)
        model = hold(vit(), LINEARS, names)
        model.set_adapter(names)
        return model

    together, apart = build(), build()
    optimizer = torch.optim.AdamW(together.parameters(), lr=1e-2)
    order = torch.arange(12).view(3, 4).T.flatten()
    for _ in range(3):
        out = together(pixel_values=x.flatten(0, 1)[order], adapter_names=[names[i // 4] for i in order])
        (out.logits - target.flatten(0, 1)[order]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for i, name in enumerate(names):
        apart.set_adapter(name)
        optimizer = torch.optim.AdamW([p for p in apart.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(3):
            (apart(pixel_values=x[i]).logits - target[i]).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    own, other = dict(together.named_parameters()), dict(apart.named_parameters())
    moved = [n for n in own if ".veneer." in n]
    assert len(moved) > 30
    for n in moved:
        torch.testing.assert_close(own[n], other[n], rtol=1e-3, atol=1e-4, msg=lambda m, n=n: f"{n}: {m}")


class Counted(TorchDispatchMode):
    """How many operations run, and how many products with a matrix of W's size."""

    def __init__(self, shape):
        super().__init__()
        self.shape, self.all, self.large = shape, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.all += func.overloadpacket is not torch.ops.aten.view
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            shapes = [tuple(a.shape[-2:]) for a in args if isinstance(a, torch.Tensor) and a.dim() > 1]
            self.large += any(sorted(s) == sorted(self.shape) for s in shapes[-1:])
        return func(*args, **(kwargs or {}))


def counted(model, x, names):
    with torch.no_grad(), Counted((64, 96)) as count:
        model(x, adapter_names=names)
    return count.large, count.all


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr", "oft", "boft", "ia3"])
def test_neither_products_with_the_weight_nor_operations_grow_with_the_adapters(method):
    model = get_peft_model(nn.Sequential(nn.Linear(64, 96)), METHODS[method](["0"]), "n0").eval()
    for i in range(1, 16):
        model.add_adapter(f"n{i}", METHODS[method](["0"]))
    shake(model)
    x = torch.randn(16, 3, 64)
    counted(model, x, ["n0", "n1"] * 8)  # tables that are made once
    large, all_ = counted(model, x, [f"n{i // 8}" for i in range(16)])
    assert large == (2 if method == "dora" else 1)  # the norms of all adapters take one product with W too
    for distinct in (4, 16):
        assert counted(model, x, [f"n{i * distinct // 16}" for i in range(16)]) == (large, all_)
    for i in range(16, 40):
        model.add_adapter(f"n{i}", METHODS[method](["0"]))
    assert counted(model, x, [f"n{i}" for i in range(16)]) == (large, all_)


def test_samples_in_any_order_and_number():
    torch.manual_seed(0)
    for method in METHODS:
        model = get_peft_model(nn.Sequential(nn.Linear(64, 96)), METHODS[method](["0"]), "a").eval()
        for other in "bc":
            model.add_adapter(other, METHODS[method](["0"]))
        shake(model)
        for names in ("abab", "aabb", "bbaa", "abcabcabc", "aab", "ca", ["__base__", "b", "a", "b"]):
            for rows in (1, 40):  # few rows are put in the adapters' order, many meet copies of the adapters' numbers
                x = torch.randn(len(names), rows, 64)
                with torch.no_grad():
                    y = model(x, adapter_names=list(names))
                    for i, name in enumerate(names):
                        torch.testing.assert_close(y[i], alone(model, name, input=x[i : i + 1])[0], rtol=1e-4, atol=1e-5)


def small(**more):
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), LoraConfig(r=1, target_modules=["0"], **more), "first")
    model.add_adapter("second", LoraConfig(r=2, target_modules=["0", "1"]))
    return shake(model)


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        (["first", "secnd", "first"], StateError, r'no adapter is called \'secnd\'.*Did you mean "second"'),
        (["first", "second"], ConfigError, "got 2 names for 3 samples"),
        ([], ConfigError, "got 0 names for 3 samples"),
        ("first", ConfigError, "one name for each sample, in a list"),
    ],
)
def test_wrong_names_are_refused_and_the_model_is_as_it_was(names, error, message):
    model, x = small(), torch.randn(3, 4)
    before = model(x), model.active_adapters, [p.requires_grad for p in model.parameters()]
    with pytest.raises(error, match=message):
        model(x, adapter_names=names)
    assert torch.equal(model(x), before[0])
    assert (model.active_adapters, [p.requires_grad for p in model.parameters()]) == before[1:]


def test_what_is_active_and_trains_is_left_alone_also_by_an_error():
    model, x = small(), torch.randn(3, 4)
    before = model(x), model.active_adapters, [p.requires_grad for p in model.parameters()]
    model(x, adapter_names=["second", "__base__", "first"])
    with pytest.raises(RuntimeError):
        model(torch.randn(3, 5), adapter_names=["second", "__base__", "first"])
    assert torch.equal(model(x), before[0])
    assert (model.active_adapters, [p.requires_grad for p in model.parameters()]) == before[1:]


def test_outputs_can_be_saved():
    model, x = small(), torch.randn(3, 4)
    for y in (model(x), model(x, adapter_names=["second", "__base__", "first"])):
        file = io.BytesIO()
        torch.save(y, file)
        file.seek(0)
        assert torch.equal(torch.load(file), y)


def test_merged_and_disabled_adapters_are_refused():
    model, x = small(), torch.randn(3, 4)
    names = ["second", "__base__", "first"]
    model.merge_adapter()
    with pytest.raises(StateError, match=r"^0: adapters are merged into the weight.*unmerge_adapter"):
        model(x, adapter_names=names)
    model.unmerge_adapter()
    with model.disable_adapter(), pytest.raises(StateError, match="^0: its adapters are switched off"):
        model(x, adapter_names=names)
    assert model(x, adapter_names=names).shape == (3, 2)


class Rows(nn.Module):
    """Hands its layer what a function makes of its input."""

    def __init__(self, f):
        super().__init__()
        self.layer, self.f = nn.Linear(4, 4), f

    def forward(self, x):
        return self.layer(self.f(x))


@pytest.mark.parametrize(
    ("f", "message"),
    [
        (lambda x: x.transpose(0, 1), r"layer: .* along the first or the second dimension of an input of shape \(6, 3, 4\)"),
        (lambda x: x[0], r"layer: the rows of an input of shape \(6, 4\) are not all tokens of the 3 samples"),
        (lambda x: x[:2], r"layer: an input of shape \(2, 6, 4\) does not have the 3 samples"),
        (lambda x: x.mean((0, 1)), r"layer: an input of shape \(4,\) does not have"),
    ],
)
def test_rows_that_belong_to_no_sample_are_refused(f, message):
    model = get_peft_model(Rows(f), LoraConfig(r=1, target_modules=["layer"]), "first")
    model.add_adapter("second", LoraConfig(r=1, target_modules=["layer"]))
    with pytest.raises(StateError, match=message):
        model(torch.randn(3, 6, 4), adapter_names=["first", "second", "first"])
    model(torch.randn(3, 6, 4), adapter_names=["first"] * 3)  # of one adapter all rows are


def test_tokens_in_one_row_follow_their_samples():
    model = hold(Rows(lambda x: x.flatten(0, 1)), ["layer"], ("lora", "oft"))
    x = torch.randn(3, 6, 4)
    y = model(x, adapter_names=["oft", "lora", "__base__"]).unflatten(0, (3, 6))
    for i, name in enumerate(["oft", "lora", "__base__"]):
        torch.testing.assert_close(y[i], alone(model, name, x=x[i : i + 1]), rtol=1e-5, atol=1e-6)


def test_dropout_disturbs_each_sample_in_training_and_none_in_evaluation():
    model = get_peft_model(nn.Sequential(nn.Linear(16, 8)), LoraConfig(r=4, target_modules=["0"], lora_dropout=0.5), "first")
    model.add_adapter("second", LoraConfig(r=4, target_modules=["0"], lora_dropout=0.5))
    shake(model)
    x = torch.randn(2, 16)
    names = ["first", "second"]
    expected = model.eval()(x, adapter_names=names)
    model.train()
    with torch.no_grad():
        many = model(x.repeat_interleave(20_000, 0).view(2, 20_000, 16), adapter_names=names)
    assert not torch.allclose(many[:, 0], many[:, 1])
    torch.testing.assert_close(many.mean(1), expected, rtol=0.05, atol=0.05)


class SequenceFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention, self.layer = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    def forward(self, mask, x, layer=False):
        y, weights = self.attention(x, x, x, key_padding_mask=mask)
        return (self.layer(y) if layer else y), weights


def test_sequence_first_attention_has_its_samples_in_the_second_dimension():
    model = hold(SequenceFirst(), ["attention", "layer"], ("lora", "dora"))
    model(torch.zeros(1, 2, dtype=torch.bool), torch.randn(2, 1, 8), True)
    names = ["dora", "lora", "__base__"]
    for length in (5, 6, 3):
        x, mask = torch.randn(length, 3, 8), torch.zeros(3, length, dtype=torch.bool)
        mask[1, 2:] = True
        y, weights = model(mask, x, adapter_names=names)
        for i, name in enumerate(names):
            own, seen = alone(model, name, mask=mask[i : i + 1], x=x[:, i : i + 1])
            torch.testing.assert_close(y[:, i], own[:, 0], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(weights[i], seen[0], rtol=1e-5, atol=1e-5)
        with pytest.raises(StateError, match=r"^layer: .*(first or the second dimension|does not have the 3 samples)"):
            model(mask, x, True, adapter_names=names)
