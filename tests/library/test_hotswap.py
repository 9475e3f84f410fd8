"""Hot-swap: another adapter's numbers in the attached one's tensors; a compiled model goes on as it was compiled."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from torch import nn

from veneer import (
    AdaLoraConfig,
    AdapterFileError,
    BOFTConfig,
    ConfigError,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftModel,
    StateError,
    TargetError,
    VeraConfig,
    get_peft_model,
    hotswap_adapter,
    prepare_model_for_compiled_hotswap,
)

BOTH = ["first", "last"]


class Net(nn.Module):
    """Two layers that adapters reach, a convolution, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.conv, self.last, self.head = nn.Linear(12, 16), nn.Conv1d(1, 2, 3, padding=1), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.first(x))
        h = h + self.conv(h.unsqueeze(1)).sum(1)
        return self.head(torch.relu(self.last(h)))


def net() -> Net:
    torch.manual_seed(1)
    return Net()


def adapter(tmp_path, name, config, seed):
    """The directory of an adapter with random numbers, and its output."""
    model = get_peft_model(net(), config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for n, p in model.named_parameters():
            if p.requires_grad:
                noise = torch.randn(p.shape, generator=generator)
                p.copy_(p * (1 + 0.3 * noise) if n.endswith(("magnitude_vector", "boft_s", ".l")) else p + 0.3 * noise)
    model.save_pretrained(tmp_path / name)
    return tmp_path / name


def loaded(directory, x):
    with torch.no_grad():
        return PeftModel.from_pretrained(net(), directory).eval()(x)


@pytest.fixture
def x():
    return torch.randn(5, 12)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


SWAPS = {
    "lora": (LoraConfig(r=4, lora_alpha=6, target_modules=BOTH), LoraConfig(r=4, lora_alpha=6, target_modules=BOTH)),
    "lora-smaller": (LoraConfig(r=4, target_modules=BOTH), LoraConfig(r=2, target_modules=BOTH)),
    "lora-other-alpha": (LoraConfig(r=4, lora_alpha=16, target_modules=BOTH), LoraConfig(r=4, lora_alpha=3, target_modules=BOTH)),
    "lora-rank-stabilised": (LoraConfig(r=4, target_modules=BOTH), LoraConfig(r=3, use_rslora=True, target_modules=BOTH)),
    "lora-patterns": (
        LoraConfig(r=4, target_modules=BOTH),
        LoraConfig(r=2, rank_pattern={"last": 4}, alpha_pattern={"first": 5}, target_modules=BOTH),
    ),
    "lora-conv": (
        LoraConfig(r=4, target_modules=["conv", "first"]),
        LoraConfig(r=2, lora_alpha=3, target_modules=["conv", "first"]),
    ),
    "lora-own-bias": (
        LoraConfig(r=4, lora_bias=True, target_modules=BOTH),
        LoraConfig(r=2, lora_alpha=3, lora_bias=True, target_modules=BOTH),
    ),
    "lora-fewer-layers": (LoraConfig(r=4, target_modules=BOTH), LoraConfig(r=2, target_modules=["last"])),
    "dora": (
        LoraConfig(r=4, use_dora=True, target_modules=BOTH),
        LoraConfig(r=2, lora_alpha=3, use_dora=True, target_modules=BOTH),
    ),
    "dora-fewer-layers": (
        LoraConfig(r=4, use_dora=True, target_modules=BOTH),
        LoraConfig(r=2, use_dora=True, target_modules=["first"]),
    ),
    "adalora": (
        AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=BOTH),
        AdaLoraConfig(init_r=3, target_r=2, lora_alpha=5, total_step=9, target_modules=BOTH),
    ),
    "loha": (LoHaConfig(r=4, target_modules=BOTH), LoHaConfig(r=2, alpha=3, target_modules=BOTH)),
    "lokr": (
        LoKrConfig(r=1, decompose_factor=2, target_modules=BOTH),
        LoKrConfig(r=1, alpha=3, decompose_factor=2, target_modules=BOTH),
    ),
    "lokr-smaller": (
        LoKrConfig(r=3, decompose_factor=2, target_modules=BOTH),
        LoKrConfig(r=2, alpha=3, decompose_factor=2, target_modules=BOTH),
    ),
    "oft": (OFTConfig(oft_block_size=4, target_modules=BOTH), OFTConfig(oft_block_size=4, target_modules=BOTH)),
    "oft-fewer-layers": (OFTConfig(oft_block_size=4, target_modules=BOTH), OFTConfig(oft_block_size=4, target_modules=["first"])),
    "boft": (BOFTConfig(boft_block_size=2, target_modules=BOTH), BOFTConfig(boft_block_size=2, target_modules=BOTH)),
    "boft-fewer-factors": (
        BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=2, target_modules=BOTH),
        BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=1, target_modules=["first"]),
    ),
    "ia3": (IA3Config(target_modules=BOTH), IA3Config(target_modules=["last"])),
    "vera": (VeraConfig(r=3, target_modules=BOTH), VeraConfig(r=3, target_modules=BOTH)),
    "hra": (HRAConfig(r=4, target_modules=BOTH), HRAConfig(r=4, target_modules=["last"])),
    "fourierft": (
        FourierFTConfig(n_frequency=9, scaling=20.0, target_modules=BOTH),
        FourierFTConfig(n_frequency=6, scaling=30.0, target_modules=BOTH),
    ),
}


@pytest.mark.parametrize("which", SWAPS)
@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_compiled_model_goes_on_with_the_new_adapter(which, tmp_path, x):
    one, two = SWAPS[which]
    first, second = adapter(tmp_path, "one", one, 2), adapter(tmp_path, "two", two, 3)
    model = PeftModel.from_pretrained(net(), first).eval()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    storages = {n: p.data_ptr() for n, p in model.named_parameters()}
    with torch.no_grad():
        close(compiled(x), loaded(first, x))
        hotswap_adapter(compiled, second, "default")
        expected = loaded(second, x)
        close(compiled(x), expected)
        close(model(x), expected)
        model.save_pretrained(tmp_path / "again")
        hotswap_adapter(compiled, first, "default")
        close(compiled(x), loaded(first, x))
    assert not torch.allclose(expected, loaded(first, x), atol=1e-3)
    assert counter.frame_count == 1
    assert {n: p.data_ptr() for n, p in model.named_parameters()} == storages
    close(loaded(tmp_path / "again", x), expected)


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
@torch._dynamo.config.patch(error_on_recompile=True)
def test_a_prepared_model_takes_larger_ranks(tmp_path, x):
    small = adapter(tmp_path, "small", LoraConfig(r=2, lora_alpha=5, target_modules=BOTH, use_dora=True), 2)
    large = adapter(tmp_path, "large", LoraConfig(r=6, rank_pattern={"last": 8}, target_modules=BOTH, use_dora=True), 3)
    model = PeftModel.from_pretrained(net(), small).eval()
    before = loaded(small, x)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    assert model.base_model.model.last.lora_A["default"].weight.shape == (8, 16) and model.peft_config["default"].r == 8
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor")
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        close(compiled(x), before)
        model.load_adapter(large, "default", hotswap=True)
        close(compiled(x), loaded(large, x))
        model.load_adapter(small, "default", hotswap=True)
        close(compiled(x), before)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    model.save_pretrained(tmp_path / "again")
    close(loaded(tmp_path / "again", x), before)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=BOTH), "lora_A"),
        (LoHaConfig(r=4, target_modules=BOTH), "hada_w1_b"),
    ],
)
def test_other_methods_are_prepared_too(config, name, tmp_path, x):
    own = adapter(tmp_path, "own", config, 2)
    model = PeftModel.from_pretrained(net(), own).eval()
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    assert getattr(model.base_model.model.first, name)["default"].shape[0] == 6
    with torch.no_grad():
        close(model(x), loaded(own, x))


def test_preparing_keeps_what_trains_and_updates_other_configurations(x):
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=BOTH))
    yet_to_come = LoraConfig(r=4, rank_pattern={"last": 6}, target_modules=BOTH)
    prepare_model_for_compiled_hotswap(model, target_rank=6, config={"next": yet_to_come})
    assert yet_to_come.r == 6 and yet_to_come.rank_pattern == {}
    model(x).sum().backward()
    trained = [n for n, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 4 and all(model.get_parameter(n).grad is not None for n in trained)


def test_preparing_refuses_before_anything_is_changed(tmp_path, x):
    model = get_peft_model(net(), LoraConfig(r=4, target_modules=BOTH, init_lora_weights=False)).eval()
    y = model(x)
    with pytest.raises(ConfigError, match="larger than the attached"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    with pytest.raises(ConfigError, match="check_compiled"):
        prepare_model_for_compiled_hotswap(model, target_rank=8, check_compiled="no")
    assert torch.equal(model(x), y) and model.peft_config["default"].r == 4
    rotation = get_peft_model(net(), OFTConfig(oft_block_size=4, target_modules=BOTH))
    with pytest.raises(ConfigError, match="OFT has no rank"):
        prepare_model_for_compiled_hotswap(rotation, target_rank=8)
    with pytest.raises(StateError, match="no adapter attached"):
        prepare_model_for_compiled_hotswap(net(), target_rank=8)
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(StateError, match="compiled already"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8)
    with pytest.warns(UserWarning, match="compiled already"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8, check_compiled="warn")
    torch.testing.assert_close(model(x), y)


def test_heads_and_biases_are_swapped_or_become_the_bases_again(tmp_path, x):
    whole = LoraConfig(r=2, target_modules=BOTH, modules_to_save=["head"], bias="lora_only")
    first = adapter(tmp_path, "first", whole, 2)
    second = adapter(tmp_path, "second", whole, 3)
    bare = adapter(tmp_path, "bare", LoraConfig(r=2, target_modules=BOTH), 4)
    model = PeftModel.from_pretrained(net(), first).eval()
    for directory in (second, bare, first):
        model.load_adapter(directory, "default", hotswap=True)
        close(model(x), loaded(directory, x))


REFUSED = [
    (LoraConfig(r=8, target_modules=BOTH), StateError, r"larger than the attached.*target_rank"),
    (LoraConfig(r=2, target_modules=[*BOTH, "head"]), TargetError, "head, which the attached adapter 'default' does not reach"),
    (LoraConfig(r=2, target_modules=BOTH, modules_to_save=["head"]), TargetError, "head, which the attached"),
    (LoraConfig(r=2, target_modules=BOTH, bias="all"), TargetError, "first.bias"),
    (LoraConfig(r=2, target_modules=BOTH, use_dora=True), StateError, "it is Dora, the attached one Lora"),
    (LoHaConfig(r=2, target_modules=BOTH), StateError, "it is Loha, the attached one Lora"),
    (LoraConfig(r=4, target_modules=BOTH, init_lora_weights="pissa"), StateError, "lora_A0"),
    (LoraConfig(r=2, target_modules=BOTH, lora_bias=True), StateError, "with_bias"),
]


@pytest.mark.parametrize(("config", "error", "text"), REFUSED, ids=lambda v: None)
def test_what_cannot_be_swapped_is_refused_before_anything_is_changed(config, error, text, tmp_path, x):
    model = get_peft_model(net(), LoraConfig(r=4, target_modules=BOTH, init_lora_weights=False)).eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    other = adapter(tmp_path, "other", config, 3)
    with pytest.raises(error, match=text):
        hotswap_adapter(model, other, "default")
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items()) and model.peft_config["default"].r == 4


def test_other_refusals(tmp_path, x):
    rotation = adapter(tmp_path, "series", OFTConfig(oft_block_size=4, target_modules=BOTH), 2)
    model = get_peft_model(net(), OFTConfig(oft_block_size=4, target_modules=BOTH, use_cayley_neumann=False))
    with pytest.raises(StateError, match="terms=5, the attached one None"):
        hotswap_adapter(model, rotation, "default")
    with pytest.raises(StateError, match='no adapter is called .defalt.*Did you mean "default"'):
        hotswap_adapter(model, rotation, "defalt")
    blocks = adapter(tmp_path, "blocks", OFTConfig(oft_block_size=2, target_modules=BOTH, use_cayley_neumann=False), 2)
    with pytest.raises(StateError, match="swap adapters of equal shapes"):
        hotswap_adapter(model, blocks, "default")
    seed = adapter(tmp_path, "seed", VeraConfig(r=3, projection_prng_key=4, target_modules=BOTH), 2)
    model = get_peft_model(net(), VeraConfig(r=3, target_modules=BOTH))
    with pytest.raises(StateError, match="another vera_A"):
        hotswap_adapter(model, seed, "default")
    odd = adapter(tmp_path, "odd", HRAConfig(r=3, target_modules=["last"]), 2)
    model = get_peft_model(net(), HRAConfig(r=3, target_modules=BOTH))
    with pytest.raises(StateError, match="leaves first out.*no numbers that change nothing"):
        hotswap_adapter(model, odd, "default")
    wide = tmp_path / "wide"
    get_peft_model(
        nn.ModuleDict({"first": nn.Linear(9, 16), "last": nn.Linear(16, 8)}), HRAConfig(r=3, target_modules=BOTH)
    ).save_pretrained(wide)
    with pytest.raises(AdapterFileError, match="hra_u has shape"):
        hotswap_adapter(model, wide, "default")
    model.eval().merge_adapter()
    with pytest.raises(StateError, match="is merged"):
        hotswap_adapter(model, adapter(tmp_path, "even", HRAConfig(r=3, target_modules=BOTH), 2), "default")


def test_an_adapter_in_training_keeps_its_dropout(tmp_path, x):
    plain = adapter(tmp_path, "plain", LoraConfig(r=2, target_modules=BOTH), 2)
    model = get_peft_model(net(), LoraConfig(r=2, target_modules=BOTH, lora_dropout=0.5))
    with pytest.raises(StateError, match="trained with another dropout"):
        hotswap_adapter(model, plain, "default")
    model.set_adapter("default", inference_mode=True)
    hotswap_adapter(model.eval(), plain, "default")
    close(model(x), loaded(plain, x))


def test_a_weight_on_the_attached_adapter_stays(tmp_path, x):
    first, second = (adapter(tmp_path, n, LoraConfig(r=2, lora_alpha=a, target_modules=["last"]), a) for n, a in (("one", 4), ("two", 6)))
    model = PeftModel.from_pretrained(net(), first).eval()
    model.base_model.model.last.scale_layer(0.5)
    hotswap_adapter(model, second, "default")
    other = PeftModel.from_pretrained(net(), second).eval()
    other.base_model.model.last.scale_layer(0.5)
    close(model(x), other(x))


def test_loading_over_an_adapter_of_another_scale_asks_for_a_hotswap(tmp_path, x):
    other = adapter(tmp_path, "other", LoraConfig(r=2, lora_alpha=16, target_modules=BOTH), 2)
    model = get_peft_model(net(), LoraConfig(r=2, lora_alpha=2, target_modules=BOTH, init_lora_weights=False)).eval()
    y = model(x)
    with pytest.raises(StateError, match=r"the scale 8.0 at first.*has 1.0.*hotswap=True"):
        model.load_adapter(other, "default")
    assert torch.equal(model(x), y)
    model.load_adapter(other, "default", hotswap=True)
    close(model(x), loaded(other, x))
