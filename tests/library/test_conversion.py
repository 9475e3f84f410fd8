"""Truncation of operators, and any adapter as plain LoRA."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import veneer
from veneer import operators as op
from veneer.conversion import factors, lora_of

torch.manual_seed(0)


def low(out, in_, r):
    return op.LowRank(torch.randn(out, r, dtype=torch.float64), torch.randn(r, in_, dtype=torch.float64))


ROWS = op.Rows(groups=2, period=6, start=2, width=2)
STRUCTURED = {
    "low rank": low(12, 10, 4),
    "of more than its size": low(6, 5, 9),
    "dense": op.Dense(torch.randn(12, 10, dtype=torch.float64)),
    "sum": low(12, 10, 2) + low(12, 10, 3),
    "sum with dense": low(12, 10, 2) + op.Dense(torch.randn(12, 10, dtype=torch.float64)),
    "hadamard": op.Hadamard(low(12, 10, 2), low(12, 10, 2)),
    "kronecker": op.Kronecker(op.Dense(torch.randn(3, 2, dtype=torch.float64)), op.Dense(torch.randn(4, 5, dtype=torch.float64))),
    "kronecker of low rank": op.Kronecker(low(3, 4, 1), low(4, 5, 2)),
    "into rows": op.IntoRows(op.Dense(torch.randn(4, 10, dtype=torch.float64)), ROWS),
    "scaled rows": op.Product(op.Diagonal(torch.randn(12, dtype=torch.float64)), low(12, 10, 3)),
    "a matrix times a low rank": op.Product(op.Dense(torch.randn(12, 12, dtype=torch.float64)), low(12, 10, 3)),
    "a low rank times a matrix": op.Product(low(12, 10, 3), op.Dense(torch.randn(10, 10, dtype=torch.float64))),
}


@pytest.mark.parametrize("S", STRUCTURED.values(), ids=STRUCTURED)
def test_truncation_is_the_best_of_its_rank(S):
    M = S.dense()
    U, s, Vh = torch.linalg.svd(M, full_matrices=False)
    for rank in (1, 2, 3):
        best = (U[:, :rank] * s[:rank]) @ Vh[:rank]
        T, error = op.truncated(S, rank=rank)
        assert T.rank <= rank and T.shape == S.shape
        torch.testing.assert_close(torch.tensor(error, dtype=M.dtype), (M - best).norm() / M.norm(), rtol=1e-6, atol=1e-9)
        torch.testing.assert_close((M - T.dense()).norm(), (M - best).norm(), rtol=1e-6, atol=1e-9 * float(M.norm()))
    for tolerance in (0.0, 0.2, 0.6):
        T, error = op.truncated(S, tolerance=tolerance)
        assert error <= tolerance + 1e-12 and abs(float((M - T.dense()).norm() / M.norm()) - error) < 1e-9
        if T.rank:
            assert tolerance < 1e-9 or op.truncated(S, rank=T.rank)[1] == error
        if T.rank > 1:
            assert float(s[T.rank - 1 :].norm() / s.norm()) > tolerance
    whole, error = op.truncated(S)
    assert error == 0
    torch.testing.assert_close(whole.dense(), M)


@pytest.mark.parametrize("S", STRUCTURED.values(), ids=STRUCTURED)
def test_what_structure_shows_is_the_map_itself(S):
    factors = S.low_rank()
    if factors is not None:
        torch.testing.assert_close(factors.dense(), S.dense())
    U, Vh = S.spectrum().vectors(3)
    torch.testing.assert_close(U.mT @ S.dense() @ Vh.mT, torch.diag(S.spectrum().s[:3]))
    assert (S.spectrum().s.diff() <= 0).all()


SQUARE = [
    op.Diagonal(torch.randn(8)),
    op.BlockDiagonal(torch.randn(2, 4, 4)),
    op.Butterfly(torch.randn(2, 2, 4, 4)),
    op.IdentityPlus(op.LowRank(torch.randn(8, 2), torch.randn(2, 8))),
]


@pytest.mark.parametrize("S", SQUARE, ids=lambda S: type(S).__name__)
def test_minus_identity(S):
    torch.testing.assert_close(S.minus_identity().dense(), S.dense() - torch.eye(8))


def test_truncation_without_a_dense_matrix(monkeypatch):
    big = [low(3000, 2000, 4) + low(3000, 2000, 4), op.Kronecker(op.Dense(torch.randn(50, 40)), op.Dense(torch.randn(60, 50)))]
    for cls in (op.LowRank, op.Sum, op.Kronecker):
        monkeypatch.setattr(cls, "dense", lambda self: pytest.fail("made dense"))
    for S in big:
        T, error = op.truncated(S, rank=5)
        assert T.rank == 5 and 0 < error < 1


def test_truncation_of_nothing_and_of_wrong_numbers():
    zero = op.Dense(torch.zeros(4, 5, dtype=torch.bfloat16))
    T, error = op.truncated(zero, rank=2)
    assert (T.rank, error, T.B.dtype) == (0, 0.0, torch.float32)
    for wrong in ({"rank": 0}, {"rank": 1, "tolerance": 0.1}, {"tolerance": 1.0}, {"tolerance": -0.1}):
        with pytest.raises(ValueError, match="rank|tolerance"):
            op.truncated(zero, **wrong)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(11, 12)
        self.a = nn.Linear(12, 16)
        self.conv = nn.Conv2d(1, 6, (3, 2), padding=1)
        self.attn = nn.MultiheadAttention(16, 2, batch_first=True)
        self.b = nn.Linear(16, 12, bias=False)

    def forward(self, ids):
        h = self.a(self.emb(ids))
        h = h + self.attn(h, h, h, need_weights=False)[0]
        return self.b(h).mean() + self.conv(h[:, None]).flatten(1)


IDS = torch.arange(10).view(2, 5)


def adapted(config, dtype=torch.float32):
    torch.manual_seed(1)
    model = veneer.get_peft_model(Net().to(dtype), config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
    return model


EXACT = {
    "LoRA": veneer.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["emb", "a", "conv", "attn", "b"], rank_pattern={"a": 2}),
    "LoRA with a bias": veneer.LoraConfig(r=3, lora_bias=True, target_modules=["a"], modules_to_save=["b"]),
    "AdaLoRA": veneer.AdaLoraConfig(init_r=4, target_r=2, total_step=9, target_modules=["a", "b", "conv"]),
    "VeRA": veneer.VeraConfig(r=3, target_modules=["a", "b"]),
    "LoHa": veneer.LoHaConfig(r=2, target_modules=["a", "b", "conv"]),
    "LoKr": veneer.LoKrConfig(r=2, target_modules=["a", "b", "conv"]),
    "LoKr of full factors": veneer.LoKrConfig(r=99, target_modules=["a", "b"]),
    "HRA": veneer.HRAConfig(r=4, target_modules=["a", "b"]),
}
NEAREST = {
    "DoRA": veneer.LoraConfig(r=3, use_dora=True, target_modules=["a", "b", "conv", "emb"]),
    "OFT": veneer.OFTConfig(oft_block_size=4, target_modules=["a", "b", "emb"]),
    "BOFT": veneer.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=1, target_modules=["a", "b"]),
    "FourierFT": veneer.FourierFTConfig(n_frequency=40, scaling=10.0, target_modules=["a", "b"]),
    "(IA)3": veneer.IA3Config(target_modules=["a", "b"], feedforward_modules=["b"]),
    "LoHa on a convolution": veneer.LoHaConfig(r=2, use_effective_conv2d=True, target_modules=["conv"]),
}


def as_lora(model, **how):
    done = veneer.convert(model, new_name="lora", **how)
    with torch.no_grad():
        y = model(IDS)
        model.set_adapter("lora")
        return done, y, model(IDS)


@pytest.mark.parametrize("config", EXACT.values(), ids=EXACT)
def test_low_rank_changes_are_exactly_lora(config, tmp_path):
    model = adapted(config)
    done, y, same = as_lora(model, save_directory=tmp_path / "out")
    assert done.error == 0 and model.peft_config["lora"].peft_type == "LORA"
    torch.testing.assert_close(same, y, rtol=1e-4, atol=1e-5)
    torch.manual_seed(1)
    again = veneer.PeftModel.from_pretrained(Net(), tmp_path / "out").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS), y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", NEAREST.values(), ids=NEAREST)
def test_every_other_change_is_the_nearest_lora(config):
    model = adapted(config)
    before = list(model.peft_config)
    with pytest.raises(veneer.StateError, match="give a rank or a tolerance"):
        veneer.convert(model, new_name="lora")
    assert list(model.peft_config) == before
    dense = {c: model.base_model.model.get_submodule(c).get_delta_weight("default") for c in veneer.convert(model, rank=2).layers}
    for how in ({"rank": 2}, {"tolerance": 0.4}):
        for layer, c in veneer.convert(model, **how).layers.items():
            M = dense[layer].mT if layer == "emb" else dense[layer].flatten(1)
            s = torch.linalg.svdvals(M.double())
            assert abs(float(s[c.rank :].norm() / s.norm()) - c.error) < 1e-4 and abs(c.norm - float(s.norm())) < 1e-3
            assert c.rank <= 2 if "rank" in how else c.error <= 0.4
    done, y, nearly = as_lora(model, tolerance=1e-6)
    assert done.error <= 1e-6
    torch.testing.assert_close(nearly, y, rtol=1e-3, atol=1e-4)


def test_half_precision_bases_and_uniform_ranks():
    model = adapted(veneer.LoHaConfig(r=2, target_modules=["a", "b"], rank_pattern={"a": 1}), torch.bfloat16)
    done = veneer.convert(model, uniform=True)
    assert done.config.rank_pattern == {} and done.config.r == 4
    assert {tuple(t.shape) for k, t in done.tensors.items() if "lora_A" in k} == {(4, 12), (4, 16)}
    assert veneer.convert(model).config.rank_pattern == {"^a": 1}
    rotated = adapted(veneer.HRAConfig(r=2, target_modules=["a"]), torch.bfloat16)
    assert veneer.convert(rotated).error == 0


def test_the_report_says_what_was_lost_and_who_refuses_it():
    model = adapted(veneer.OFTConfig(oft_block_size=4, target_modules=["a", "b"], modules_to_save=["conv"], bias="oft_only"))
    done = veneer.convert(model, rank=2)
    text = str(done)
    assert "OFT as LoRA" in text and "%" in text and "vLLM refuses" in text and f"{100 * done.error:.2g} %" in text
    plain = done.to_dict()
    assert plain["layers"]["a"]["rank"] == 2 and 0 < plain["error"] < 1 and done.to_json()
    squares = sum(c.norm**2 for c in done.layers.values())
    assert done.error == pytest.approx((sum((c.error * c.norm) ** 2 for c in done.layers.values()) / squares) ** 0.5)


def test_what_lora_cannot_say_is_refused():
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    model = veneer.get_peft_model(grouped, veneer.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    with pytest.raises(veneer.StateError, match="2 groups"):
        veneer.convert(model)
    fresh = veneer.get_peft_model(nn.Sequential(nn.Linear(4, 4)), veneer.LoHaConfig(r=2, target_modules=["0"]))
    with pytest.raises(veneer.StateError, match="changes nothing"):
        veneer.convert(fresh)
    with pytest.raises(veneer.StateError, match='Did you mean "default"'):
        veneer.convert(fresh, "defualt")
    for wrong in ({"rank": 0}, {"rank": 2, "tolerance": 0.1}, {"tolerance": 1.5}):
        with pytest.raises(veneer.ConfigError):
            veneer.convert(fresh, **wrong)
    with pytest.raises(veneer.ConfigError, match="attached already"):
        veneer.convert(fresh, new_name="default")
    merged = adapted(veneer.LoHaConfig(r=2, target_modules=["a"]))
    merged.merge_adapter()
    with pytest.raises(veneer.StateError, match="unmerge_adapter"):
        veneer.convert(merged)


def test_factors_of_several_adapters_make_one_lora():
    model = adapted(veneer.LoHaConfig(r=2, target_modules=["a", "b"]))
    model.add_adapter("other", veneer.LoraConfig(r=2, target_modules=["a"], init_lora_weights=False))
    one, two = (factors(model.get_base_model(), n) for n in ("default", "other"))
    both = {p: (f.S + two[p].S if p in two else f.S).low_rank() for p, f in one.items()}
    config, tensors = lora_of(model.get_base_model(), both, model.peft_config["default"])
    assert config.rank_pattern == {"^b": 4} and config.r == 6
    a = tensors["base_model.model.a.lora_B.weight"] @ tensors["base_model.model.a.lora_A.weight"]
    torch.testing.assert_close(a, one["a"].S.dense() + two["a"].S.dense())
