"""Every method and option that HF PEFT supports: random adapters of theirs load here, ours load there, with equal outputs and equal merged weights.

Where HF PEFT is known to be wrong, the right value is asserted against the dense formula, and the reason stands beside it.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import veneer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import peft

pytestmark = pytest.mark.filterwarnings("ignore")


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Parameter(torch.randn(3, 6, 12) / 4), nn.Parameter(torch.randn(3, 12, 6) / 4)

    def forward(self, x):
        return sum(torch.tanh(x @ u.mT) @ d.mT for u, d in zip(self.up, self.down, strict=True))


class Model(nn.Module):
    """One layer of every kind, each with its own output."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.lin, self.wide, self.bare = nn.Linear(12, 8), nn.Linear(16, 12), nn.Linear(12, 6, bias=False)
        self.gpt = Conv1D(8, 12)
        self.emb = nn.Embedding(10, 12)
        self.conv1 = nn.Conv1d(4, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.point = nn.Conv2d(4, 8, 1)
        self.conv3 = nn.Conv3d(2, 4, 2)
        self.mha = nn.MultiheadAttention(12, 2, batch_first=True)
        self.experts = Experts()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn_like(p) / 3)

    def forward(self, x, wide, ids, line, image, cube):
        return [
            self.lin(x), self.wide(wide), self.bare(x), self.gpt(x), self.emb(ids), self.conv1(line), self.conv2(image), self.point(image),
            self.conv3(cube), self.mha(x, x, x, need_weights=False)[0], self.experts(x),
        ]  # fmt: skip


def inputs():
    torch.manual_seed(2)
    lines = torch.randn(2, 4, 9), torch.randn(2, 4, 6, 6), torch.randn(2, 2, 3, 3, 3)
    return torch.randn(2, 5, 12), torch.randn(2, 16), torch.randint(10, (2, 5)), *lines


LINEAR, ALL_LORA = ["lin", "wide", "bare", "gpt"], ["lin", "wide", "bare", "gpt", "emb", "conv1", "conv2", "point", "conv3"]
LYCORIS = ["lin", "wide", "bare", "conv1", "conv2", "point"]
CASES = {
    "lora": ("LoraConfig", {"r": 4, "target_modules": ALL_LORA}),
    "lora-scaled": ("LoraConfig", {"r": 4, "lora_alpha": 24, "use_rslora": True, "target_modules": ALL_LORA}),
    "lora-gaussian": ("LoraConfig", {"r": 2, "init_lora_weights": "gaussian", "target_modules": ["lin", "conv2", "emb"]}),
    "lora-orthogonal": ("LoraConfig", {"r": 2, "init_lora_weights": "orthogonal", "target_modules": ["lin", "wide"]}),
    "lora-random": ("LoraConfig", {"r": 2, "init_lora_weights": False, "target_modules": ALL_LORA}),
    "lora-pissa": ("LoraConfig", {"r": 3, "init_lora_weights": "pissa", "target_modules": LINEAR[:3]}),
    "lora-olora": ("LoraConfig", {"r": 3, "init_lora_weights": "olora", "target_modules": LINEAR[:3]}),
    "lora-patterns": ("LoraConfig", {"r": 4, "rank_pattern": {"lin": 2, "conv2": 3}, "alpha_pattern": {"emb": 2}, "target_modules": ALL_LORA}),
    "lora-bias": ("LoraConfig", {"r": 2, "lora_bias": True, "target_modules": ["lin", "wide"]}),
    "lora-trained-bias": ("LoraConfig", {"r": 2, "bias": "lora_only", "target_modules": ["lin", "wide", "conv2"]}),
    "lora-every-bias": ("LoraConfig", {"r": 2, "bias": "all", "target_modules": ["lin", "wide", "conv2"]}),
    "lora-dropout": ("LoraConfig", {"r": 2, "lora_dropout": 0.3, "target_modules": ["lin", "conv2"]}),
    "lora-experts": ("LoraConfig", {"r": 2, "target_modules": [], "target_parameters": ["experts.up", "experts.down"]}),
    "lora-experts-one": ("LoraConfig", {"r": 2, "target_modules": ["lin"], "target_parameters": ["experts.down", "bare.weight"]}),
    "dora": ("LoraConfig", {"r": 4, "use_dora": True, "target_modules": ALL_LORA}),
    "adalora": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "lora_alpha": 6, "total_step": 10, "target_modules": ["lin", "wide", "bare", "gpt", "conv2", "point"]}),
    "adalora-bias": ("AdaLoraConfig", {"init_r": 4, "target_r": 2, "total_step": 10, "bias": "lora_only", "target_modules": ["lin"]}),
    "loha": ("LoHaConfig", {"r": 2, "alpha": 5, "target_modules": LYCORIS}),
    "loha-effective": ("LoHaConfig", {"r": 2, "use_effective_conv2d": True, "target_modules": LYCORIS}),
    "loha-random": ("LoHaConfig", {"r": 2, "init_weights": False, "rank_pattern": {"lin": 3}, "alpha_pattern": {"conv2": 2}, "target_modules": LYCORIS}),
    "loha-dropouts": ("LoHaConfig", {"r": 2, "rank_dropout": 0.2, "module_dropout": 0.1, "target_modules": LYCORIS}),
    "lokr": ("LoKrConfig", {"r": 1, "alpha": 5, "target_modules": LYCORIS}),
    "lokr-full": ("LoKrConfig", {"r": 8, "target_modules": LYCORIS}),
    "lokr-both": ("LoKrConfig", {"r": 1, "decompose_both": True, "decompose_factor": 4, "target_modules": LYCORIS}),
    "lokr-effective": ("LoKrConfig", {"r": 1, "use_effective_conv2d": True, "target_modules": ["lin", "conv2", "point"]}),
    "lokr-lycoris": ("LoKrConfig", {"r": 1, "init_weights": "lycoris", "rank_dropout": 0.1, "rank_dropout_scale": True, "target_modules": LYCORIS}),
    "oft": ("OFTConfig", {"oft_block_size": 4, "target_modules": ["lin", "wide", "bare", "emb", "point"]}),
    "oft-exact": ("OFTConfig", {"oft_block_size": 4, "use_cayley_neumann": False, "target_modules": ["lin", "wide", "emb", "point"]}),
    "oft-terms": ("OFTConfig", {"oft_block_size": 2, "num_cayley_neumann_terms": 3, "target_modules": ["lin", "emb"]}),
    "oft-blocks": ("OFTConfig", {"r": 2, "oft_block_size": 0, "target_modules": ["lin", "wide"]}),
    "oft-shared": ("OFTConfig", {"oft_block_size": 4, "block_share": True, "target_modules": ["lin", "wide", "emb"]}),
    "oft-constrained": ("OFTConfig", {"oft_block_size": 4, "coft": True, "eps": 0.2, "target_modules": ["lin", "emb"]}),
    "oft-nearest": ("OFTConfig", {"oft_block_size": 5, "target_modules": ["lin", "wide"]}),
    "oft-bias": ("OFTConfig", {"oft_block_size": 4, "bias": "oft_only", "target_modules": ["lin"]}),
    "boft": ("BOFTConfig", {"boft_block_size": 4, "target_modules": ["lin", "wide", "bare", "conv2", "point"]}),
    "boft-number": ("BOFTConfig", {"boft_block_size": 0, "boft_block_num": 2, "target_modules": ["lin", "wide"]}),
    "boft-bias": ("BOFTConfig", {"boft_block_size": 4, "bias": "boft_only", "target_modules": ["lin"]}),
    "ia3": ("IA3Config", {"target_modules": ["lin", "wide", "bare", "gpt", "conv2", "conv3"], "feedforward_modules": ["wide", "conv3"]}),
    "vera": ("VeraConfig", {"r": 5, "projection_prng_key": 9, "target_modules": LINEAR}),
    "vera-drawn-again": ("VeraConfig", {"r": 5, "save_projection": False, "d_initial": 0.3, "target_modules": LINEAR}),
    "hra": ("HRAConfig", {"r": 4, "target_modules": ["lin", "wide", "bare", "conv2"]}),
    "hra-orthonormal": ("HRAConfig", {"r": 3, "apply_GS": True, "target_modules": ["lin", "conv2"]}),
    "hra-bias": ("HRAConfig", {"r": 2, "bias": "hra_only", "target_modules": ["lin"]}),
    "fourierft": ("FourierFTConfig", {"n_frequency": 20, "scaling": 30.0, "target_modules": LINEAR}),
    "fourierft-pattern": ("FourierFTConfig", {"n_frequency": 20, "n_frequency_pattern": {"wide": 7}, "random_loc_seed": 5, "target_modules": ["lin", "wide"]}),
}  # fmt: skip


@torch.no_grad()
def randomise(model):
    torch.manual_seed(3)
    for p in model.parameters():
        if p.requires_grad:
            p.add_(0.15 * torch.randn_like(p))


def agree(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def agree_merged(ours, theirs):
    ours, theirs = ours.merge_and_unload().state_dict(), theirs.merge_and_unload().state_dict()
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)
@torch.no_grad()
def test_theirs_loads_here(name, options, tmp_path):
    theirs = peft.get_peft_model(Model(), getattr(peft, name)(**options)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = veneer.PeftModel.from_pretrained(Model(), tmp_path).eval()
    agree(ours(*inputs()), theirs(*inputs()))
    config = ours.peft_config["default"].to_dict()
    assert all(config[k] == v for k, v in options.items() if not isinstance(v, list))
    agree_merged(ours, theirs)


@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)
@torch.no_grad()
def test_ours_loads_there(name, options, tmp_path):
    ours = veneer.get_peft_model(Model(), getattr(veneer, name)(**options)).eval()
    randomise(ours)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(Model(), tmp_path).eval()
    agree(ours(*inputs()), theirs(*inputs()))
    agree_merged(ours, theirs)


@pytest.mark.parametrize(("name", "options"), CASES.values(), ids=CASES)
def test_equal_counts(name, options):
    ours = veneer.get_peft_model(Model(), getattr(veneer, name)(**options))
    theirs = peft.get_peft_model(Model(), getattr(peft, name)(**options))
    trainable, total = theirs.get_nb_trainable_parameters()
    # AdaLoRA there keeps one frozen parameter, the first rank, for each layer.
    total -= sum(p.numel() for n, p in theirs.named_parameters() if "ranknum" in n)
    assert ours.get_nb_trainable_parameters() == (trainable, total)


@torch.no_grad()
def test_multihead_attention_is_the_formula_where_theirs_counts_the_output_projection_twice(tmp_path):
    # HF PEFT 0.21.2 writes W + Δ over out_proj's weight and then merges Δ into it once more, in every forward.
    theirs = peft.get_peft_model(Model(), peft.LoraConfig(r=4, target_modules=["mha"])).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = veneer.PeftModel.from_pretrained(Model(), tmp_path).eval()
    t = {k.removeprefix("base_model.model.mha."): v for k, v in load_file(tmp_path / "adapter_model.safetensors").items()}
    change = 2 * t["base_layer.out_proj.lora_B.weight"] @ t["base_layer.out_proj.lora_A.weight"]
    expected = Model().eval()
    expected.mha.in_proj_weight += 2 * t["lora_B.weight"] @ t["lora_A.weight"]
    expected.mha.out_proj.weight += change
    agree(ours(*inputs()), expected(*inputs()))
    expected.mha.out_proj.weight += change
    agree(theirs(*inputs()), expected(*inputs()))


@torch.no_grad()
def test_multihead_attention_with_a_change_of_the_input_projection_alone(tmp_path):
    ours = veneer.get_peft_model(Model(), veneer.LoraConfig(r=4, target_modules=["mha"])).eval()
    randomise(ours)
    ours.base_model.model.mha.out_proj.veneer["default"]["weight"].lora_B.zero_()
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(Model(), tmp_path).eval()
    agree(ours(*inputs()), theirs(*inputs()))


# Where HF PEFT's forward is wrong, its own merged weights are right, or it has to be helped to compute at all.


@pytest.mark.parametrize(
    ("name", "options", "layer"),
    [
        # Its fold adds overlapping patches up, so not even a fresh adapter leaves the output alone.
        ("OFTConfig", {"oft_block_size": 4, "target_modules": ["conv"]}, {"padding": 1}),
        # Its A has the layer's stride and padding, not its dilation or its padding mode.
        ("LoraConfig", {"r": 2, "target_modules": ["conv"]}, {"padding": 1, "padding_mode": "circular"}),
        ("BOFTConfig", {"boft_block_size": 4, "target_modules": ["conv"]}, {"dilation": 2}),
    ],
    ids=["oft-kernel", "lora-padding-mode", "boft-dilation"],
)
@torch.no_grad()
def test_convolutions_whose_forward_differs_there(name, options, layer, tmp_path):
    def plain():
        torch.manual_seed(4)
        return nn.Sequential(OrderedDict(conv=nn.Conv2d(4, 8, 3, **layer)))

    theirs = peft.get_peft_model(plain(), getattr(peft, name)(**options)).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = veneer.PeftModel.from_pretrained(plain(), tmp_path).eval()
    x = torch.randn(2, 4, 6, 6)
    y = ours(x)
    with suppress(RuntimeError):
        assert not torch.allclose(theirs(x), y, atol=1e-2)
    merged = theirs.merge_and_unload()
    torch.testing.assert_close(y, merged(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.merge_and_unload()(x), y, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_oft_on_pictures_with_channels_last(tmp_path):
    # There, any input of four dimensions is taken for a convolution's.
    theirs = peft.get_peft_model(Model(), peft.OFTConfig(oft_block_size=4, target_modules=["lin"])).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = veneer.PeftModel.from_pretrained(Model(), tmp_path).eval()
    x = torch.randn(2, 3, 3, 12)
    with pytest.raises(RuntimeError):
        theirs.base_model.model.lin(x)
    expected = theirs.base_model.model.lin(x.flatten(0, 2)).unflatten(0, (2, 3, 3))
    torch.testing.assert_close(ours.base_model.model.lin(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("factors", [2, 3])
@torch.no_grad()
def test_butterflies_of_several_factors(factors, tmp_path, monkeypatch):
    # Without its CUDA extension it falls back to one factor and says nothing; the extension only lays blocks on a diagonal.
    from peft.tuners.boft import layer

    class Kernel:
        @staticmethod
        def forward(blocks):
            return [torch.stack([torch.block_diag(*b) for b in blocks])]

    monkeypatch.setattr(layer, "get_fbd_cuda", lambda: Kernel)

    def plain():
        torch.manual_seed(4)
        return nn.Sequential(OrderedDict(lin=nn.Linear(32, 6)))

    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=factors, target_modules=["lin"])
    theirs = peft.get_peft_model(plain(), config).eval()
    randomise(theirs)
    theirs.save_pretrained(tmp_path)
    ours = veneer.PeftModel.from_pretrained(plain(), tmp_path).eval()
    assert ours.base_model.model.lin.veneer["default"]["weight"].boft_R.shape[0] == factors
    x = torch.randn(5, 32)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    agree_merged(ours, theirs)
