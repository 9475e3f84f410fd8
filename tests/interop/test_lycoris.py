"""Files of LyCORIS and kohya's scripts: read as the change that they mean, and written back."""

from __future__ import annotations

import logging

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import veneer
from veneer.foreign import read_foreign


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(16, 24)
        self.proj = nn.Linear(24, 24)
        self.conv = nn.Conv2d(8, 16, 3, padding=1)
        self.mix_in = nn.Conv2d(8, 8, 1)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x, image):
        y = sum(b.proj(b.to_q(x)).sum(-1) for b in self.down_blocks)
        return y + sum(b.conv(b.mix_in(image)).mean((1, 2, 3)) for b in self.down_blocks)


def net():
    torch.manual_seed(3)
    return Net().eval()


X = (torch.randn(2, 16), torch.randn(2, 8, 5, 5))
LAYERS = {"to_q": (24, 16), "proj": (24, 24), "conv": (16, 8, 3, 3)}


def tucker(t, a, b):
    return torch.einsum("ij...,ip,jq->pq...", t, a, b)


def locon(shape, g):
    out, in_, *k = shape
    B, A = torch.randn(out, 4, *(1 for _ in k), generator=g), torch.randn(4, in_, *k, generator=g)
    return {
        "lora_up.weight": B,
        "lora_down.weight": A,
        "alpha": torch.tensor(2.0),
    }, lambda W: 0.5 * torch.einsum("or,ri...->oi...", B.flatten(1), A)


def locon_core(shape, g):
    out, in_, *k = shape
    if not k:
        return locon(shape, g)
    B, A, t = torch.randn(out, 4, 1, 1, generator=g), torch.randn(4, in_, 1, 1, generator=g), torch.randn(4, 4, *k, generator=g)
    parts = {"lora_up.weight": B, "lora_mid.weight": t, "lora_down.weight": A, "alpha": torch.tensor(1.0)}
    return parts, lambda W: 0.25 * tucker(t, B.flatten(1).mT, A.flatten(1))


def dora(shape, g):
    parts, change = locon(shape, g)
    m = torch.rand(shape[0], *(1 for _ in shape[1:]), generator=g) + 0.5

    def changed(W):
        V = W + change(W)
        return V * m / V.flatten(1).norm(dim=1).view(m.shape) - W

    return parts | {"dora_scale": m}, changed


def dora_of_inputs(shape, g):
    parts, change = locon(shape, g)
    m = torch.rand(1, shape[1], *(1 for _ in shape[2:]), generator=g) + 0.5

    def changed(W):
        V = W + change(W)
        return V * m / V.transpose(0, 1).flatten(1).norm(dim=1).view(m.shape) - W

    return parts | {"dora_scale": m}, changed


def loha(shape, g):
    out, in_, *k = shape
    a, b = ([torch.randn(*s, generator=g) for _ in range(2)] for s in [(out, 3), (3, int(torch.tensor([in_, *k]).prod()))])
    parts = {f"hada_w{i + 1}_{n}": t[i] for n, t in [("a", a), ("b", b)] for i in range(2)}
    return parts | {"alpha": torch.tensor(1.5)}, lambda W: 0.5 * ((a[0] @ b[0]) * (a[1] @ b[1])).reshape(shape)


def loha_core(shape, g):
    out, in_, *k = shape
    if not k:
        return loha(shape, g)
    a, b, t = ([torch.randn(*s, generator=g) for _ in range(2)] for s in [(3, out), (3, in_), (3, 3, *k)])
    parts = {f"hada_{n}": u[i] for i in range(2) for n, u in [(f"w{i + 1}_a", a), (f"w{i + 1}_b", b), (f"t{i + 1}", t)]}
    return parts, lambda W: tucker(t[0], a[0], b[0]) * tucker(t[1], a[1], b[1])


def kron(w1, w2):
    w1 = w1.reshape(*w1.shape, *(1 for _ in w2.shape[2:]))
    return torch.kron(w1, w2)


def lokr(rank, core=False, factor=4):
    def make(shape, g):
        out, in_, *k = shape
        (a, b), (c, d) = (factor, out // factor), (factor, in_ // factor)
        w1 = torch.randn(a, c, generator=g)
        if rank is None:
            w2 = torch.randn(b, d, *k, generator=g)
            # α is 100 here, and must not count.
            return {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(100.0)}, lambda W: kron(w1, w2)
        if core and k:
            t, p, q = torch.randn(rank, rank, *k, generator=g), torch.randn(rank, b, generator=g), torch.randn(rank, d, generator=g)
            parts = {"lokr_w1": w1, "lokr_t2": t, "lokr_w2_a": p, "lokr_w2_b": q, "alpha": torch.tensor(3.0)}
            return parts, lambda W: 3 / rank * kron(w1, tucker(t, p, q))
        p, q = torch.randn(b, rank, generator=g), torch.randn(rank, int(torch.tensor([d, *k]).prod()), generator=g)
        parts = {"lokr_w1": w1, "lokr_w2_a": p, "lokr_w2_b": q, "alpha": torch.tensor(3.0)}
        return parts, lambda W: 3 / rank * kron(w1, (p @ q).reshape(b, d, *k))

    return make


def rotation(U, bound=0.0):
    Q = U - U.mT
    if bound and Q.norm() > bound:
        Q = Q * bound / Q.norm()
    eye = torch.eye(Q.shape[-1])
    return (eye + Q) @ (eye - Q).inverse()


def oft(shape, g, alpha=0.0, rescale=False):
    U = 0.2 * torch.randn(shape[0] // 4, 4, 4, generator=g)
    s = torch.rand(shape[0], *(1 for _ in shape[1:]), generator=g) + 0.5
    R = torch.block_diag(*rotation(U, alpha * shape[0]))
    scaled = s if rescale else 1
    parts = {"oft_blocks": U, "alpha": torch.tensor(alpha)} | ({"rescale": s} if rescale else {})
    return parts, lambda W: scaled * torch.einsum("nm,n...->m...", R, W) - W


READ = {"LoCon": locon, "LoCon in Tucker form": locon_core, "DoRA": dora, "LoHa": loha, "LoHa in Tucker form": loha_core,
        "LoKr": lokr(1), "LoKr in Tucker form": lokr(1, core=True), "LoKr of full factors": lokr(None)}  # fmt: skip
NOT_OURS = {"DoRA of the input": dora_of_inputs, "OFT": oft, "OFT within a bound": lambda s, g: oft(s, g, alpha=0.01),
            "OFT rescaled": lambda s, g: oft(s, g, rescale=True)}  # fmt: skip


def file_of(make, path, prefix="lora_unet", layers=LAYERS, count=2):
    """A file with one algorithm on some layers of both blocks, and each layer's change."""
    g = torch.Generator().manual_seed(5)
    tensors, changes = {}, {}
    for i in range(count):
        for name, shape in layers.items():
            parts, change = make(shape, g)
            tensors |= {f"{prefix}_down_blocks_{i}_{name}.{k}": t for k, t in parts.items()}
            changes[f"down_blocks.{i}.{name}"] = change
    save_file(tensors, path)
    return tensors, changes


def check_changes(model, name, changes, tolerance=1e-5):
    base = model.get_base_model()
    for path, change in changes.items():
        W = base.get_submodule(path).weight.detach()
        wanted = change(W)
        got = base.get_submodule(path).get_delta_weight(name)
        assert float((got - wanted).norm()) <= tolerance * float(wanted.norm()) + 1e-6, path


@pytest.mark.parametrize("make", READ.values(), ids=READ)
def test_a_file_means_its_change_and_is_written_back(make, tmp_path):
    tensors, changes = file_of(make, tmp_path / "in.safetensors")
    model = veneer.PeftModel.from_pretrained(net(), tmp_path / "in.safetensors")
    assert len(model.get_layer_status()) == len(changes)
    check_changes(model, "default", changes)
    assert veneer.save_lycoris(model, tmp_path / "out.safetensors", prefix="lora_unet") == {}
    back = load_file(tmp_path / "out.safetensors")
    if not any("mid" in k for k in tensors):
        assert set(back) >= set(tensors)
        for key, t in tensors.items():
            if not key.endswith(".alpha"):
                assert torch.equal(back[key], t.float()), key
    again = veneer.PeftModel.from_pretrained(net(), tmp_path / "out.safetensors")
    check_changes(again, "default", changes)
    model.save_pretrained(tmp_path / "dir")
    with torch.no_grad():
        assert torch.equal(veneer.PeftModel.from_pretrained(net(), tmp_path / "dir").eval()(*X), model.eval()(*X))


@pytest.mark.parametrize("make", NOT_OURS.values(), ids=NOT_OURS)
def test_what_no_method_here_is_becomes_the_nearest_lora(make, tmp_path):
    _, changes = file_of(make, tmp_path / "in.safetensors")
    base = net()
    with pytest.raises(veneer.StateError, match="give a rank or a tolerance"):
        veneer.PeftModel.from_pretrained(base, tmp_path / "in.safetensors")
    assert not hasattr(base, "peft_config")
    model = veneer.get_peft_model(net(), veneer.LoraConfig(r=1, target_modules=["to_q"]))
    read = veneer.load_lycoris(model, tmp_path / "in.safetensors", "foreign", tolerance=1e-6)
    assert all(f.error <= 1e-6 for f in read.factors.values())
    check_changes(model, "foreign", changes)
    nearest = read_foreign(net(), tmp_path / "in.safetensors", rank=2)
    for path, f in nearest.factors.items():
        s = torch.linalg.svdvals(changes[path](net().get_submodule(path).weight.detach()).flatten(1))
        assert f.S.rank == 2 and f.error == pytest.approx(float(s[2:].norm() / s.norm()), rel=1e-3)


def test_rotations_of_older_files_are_r_itself(tmp_path):
    R = rotation(0.3 * torch.randn(6, 4, 4))
    save_file({"lycoris_down_blocks_0_to_q.oft_diag": R}, tmp_path / "old.safetensors")
    W = net().down_blocks[0].to_q.weight.detach()
    f = read_foreign(net(), tmp_path / "old.safetensors", tolerance=1e-6).factors["down_blocks.0.to_q"]
    torch.testing.assert_close(W + f.S.dense(), torch.block_diag(*R).mT @ W, rtol=1e-4, atol=1e-5)


def test_several_low_rank_algorithms_in_one_file_are_exactly_one_lora(tmp_path):
    one, first = file_of(locon, tmp_path / "a.safetensors", layers={"to_q": (24, 16)})
    two, second = file_of(lokr(1), tmp_path / "b.safetensors", layers={"proj": (24, 24)})
    three, third = file_of(loha, tmp_path / "c.safetensors", layers={"conv": (16, 8, 3, 3)})
    save_file(one | two | three, tmp_path / "all.safetensors")
    read = read_foreign(net(), tmp_path / "all.safetensors")
    assert read.title == "LoRA and LoKr and LoHa" or set(read.title.split(" and ")) == {"LoRA", "LoHa", "LoKr"}
    assert all(f.error == 0 for f in read.factors.values())
    model = veneer.PeftModel.from_pretrained(net(), tmp_path / "all.safetensors")
    check_changes(model, "default", first | second | third)


OURS = {
    "AdaLoRA": (veneer.AdaLoraConfig(init_r=3, target_r=2, total_step=9, target_modules=["to_q", "conv"]), {}),
    "VeRA": (veneer.VeraConfig(r=3, target_modules=["to_q"]), {}),
    "rsLoRA": (veneer.LoraConfig(r=3, use_rslora=True, lora_alpha=5, target_modules=["to_q", "conv"]), {}),
    "LoRA from a decomposition": (veneer.LoraConfig(r=3, init_lora_weights="pissa", target_modules=["to_q"]), {}),
    "full LoKr": (veneer.LoKrConfig(r=50, alpha=20, target_modules=["to_q", "conv"]), {}),
    "OFT": (veneer.OFTConfig(oft_block_size=4, target_modules=["to_q"]), {"tolerance": 1e-6}),
}


@pytest.mark.parametrize(("config", "how"), OURS.values(), ids=OURS)
def test_every_method_is_written(config, how, tmp_path):
    model = veneer.get_peft_model(net(), config).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
        y = model(*X)
    veneer.save_lycoris(model, tmp_path / "file.safetensors", **how)
    with torch.no_grad():
        torch.testing.assert_close(
            veneer.PeftModel.from_pretrained(net(), tmp_path / "file.safetensors").eval()(*X), y, rtol=1e-3, atol=1e-4
        )


def test_errors_name_what_does_not_fit_and_change_nothing(tmp_path):
    base = net()
    before = [type(m) for m in base.modules()]

    def refused(tensors, match, error=veneer.AdapterFileError, **how):
        save_file({k: t.clone() for k, t in tensors.items()}, tmp_path / "bad.safetensors")
        with pytest.raises(error, match=match):
            read_foreign(base, tmp_path / "bad.safetensors", **how)
        assert [type(m) for m in base.modules()] == before

    tensors, _ = file_of(locon, tmp_path / "ok.safetensors")
    refused(
        {k.replace("to_q", "to_qq"): t for k, t in tensors.items()}, 'to_qq.*mean no layer of this Net. Did you mean "down_blocks_0_to_q"'
    )
    refused(
        tensors | {k.replace("unet", "te"): t for k, t in tensors.items()},
        r"several models: lora_te \(6 modules\), lora_unet \(6 modules\); say by prefix=",
    )
    assert read_foreign(base, tmp_path / "bad.safetensors", prefix="lora_te").config.r == 4
    refused(tensors, "nothing called lora_te1_", prefix="lora_te1")
    refused({"base_model.model.a.lora_A.weight": torch.ones(2, 2)}, "give the folder")
    refused({"lora_unet_down_blocks_0_to_q.hada_w9": torch.ones(2, 2)}, "none of LyCORIS's")
    refused({k: t for k, t in tensors.items() if "lora_down" not in k}, "do not fit|are no algorithm", rank=2)
    refused({k: t * float("nan") for k, t in tensors.items()}, "NaN or infinite")
    wide = {k: torch.randn(9, 4) if k.endswith("to_q.lora_up.weight") else t for k, t in tensors.items()}
    refused(wide, "of a model of another size")
    with pytest.raises(veneer.AdapterFileError, match="is damaged"):
        (tmp_path / "torn.safetensors").write_bytes((tmp_path / "ok.safetensors").read_bytes()[:100])
        read_foreign(base, tmp_path / "torn.safetensors")

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a_b = nn.Linear(2, 2)
            self.a = nn.ModuleDict({"b": nn.Linear(2, 2)})

    save_file({"lycoris_a_b.diff": torch.ones(2, 2)}, tmp_path / "twice.safetensors")
    with pytest.raises(veneer.AdapterFileError, match="a_b or a.b"):
        read_foreign(Twice(), tmp_path / "twice.safetensors")


def test_what_such_files_cannot_hold_is_not_written(tmp_path):
    for config, match in [
        (veneer.LoraConfig(r=2, target_modules=["to_q"], modules_to_save=["proj"]), "also saves"),
        (veneer.IA3Config(target_modules=["to_q"]), "give a rank"),
        (veneer.LoraConfig(r=2, lora_bias=True, init_lora_weights=False, target_modules=["to_q"]), "changes its bias"),
    ]:
        model = veneer.get_peft_model(net(), config)
        with torch.no_grad():
            for p in model.parameters():
                if p.requires_grad:
                    p.add_(1)
        with pytest.raises(veneer.StateError, match=match):
            veneer.save_lycoris(model, tmp_path / "no.safetensors")
    with pytest.raises(veneer.ConfigError, match="ends with .safetensors"):
        veneer.save_lycoris(model, tmp_path / "folder")
    assert not list(tmp_path.iterdir())


SAME, LORA, NEAREST = "the same method", "exactly a LoRA", "the nearest LoRA"
LIVE = {
    "LoCon": ("LoConModule", {}, SAME),
    "LoCon in Tucker form": ("LoConModule", {"use_tucker": True}, SAME),
    "DoRA": ("LoConModule", {"weight_decompose": True, "wd_on_out": True}, SAME),
    "DoRA of the input": ("LoConModule", {"weight_decompose": True, "wd_on_out": False}, NEAREST),
    "rank-stabilised": ("LoConModule", {"rs_lora": True}, SAME),
    "LoHa": ("LohaModule", {}, SAME),
    "LoHa in Tucker form": ("LohaModule", {"use_tucker": True}, SAME),
    "LoHa with lengths": ("LohaModule", {"weight_decompose": True}, NEAREST),
    "LoKr": ("LokrModule", {"lora_dim": 1}, SAME),
    "LoKr of both factored": ("LokrModule", {"lora_dim": 1, "decompose_both": True, "factor": 4}, SAME),
    "LoKr of full factors": ("LokrModule", {"lora_dim": 100}, SAME),
    "LoKr in Tucker form": ("LokrModule", {"lora_dim": 1, "use_tucker": True}, SAME),
    "LoKr turned": ("LokrModule", {"lora_dim": 1, "unbalanced_factorization": True}, LORA),
    "OFT": ("DiagOFTModule", {"rescaled": True}, NEAREST),
    "OFT within a bound": ("DiagOFTModule", {"constraint": 0.01}, NEAREST),
    "BOFT": ("ButterflyOFTModule", {}, NEAREST),
    "BOFT rescaled": ("ButterflyOFTModule", {"rescaled": True, "constraint": 0.01}, NEAREST),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", [(32, 32), (32, 8, 3, 3)], ids=["linear", "convolution"])
@pytest.mark.parametrize(("cls", "options", "becomes"), LIVE.values(), ids=LIVE)
def test_the_change_is_what_lycoris_computes(cls, options, becomes, shape, tmp_path):
    modules = pytest.importorskip("lycoris.modules", reason="LyCORIS is not installed")
    logging.disable(logging.WARNING)
    out, in_, *k = shape
    layer = nn.Conv2d(in_, out, k, padding=1) if k else nn.Linear(in_, out)
    theirs = getattr(modules, cls)("lycoris_layer", layer, 1.0, **{"lora_dim": 4, "alpha": 2} | options)
    # What it does, not what it merges: its own merge multiplies LoHa and LoKr by α / r twice.
    x = torch.randn(3, in_, 5, 5) if k else torch.randn(3, in_)
    with torch.no_grad():
        for p in theirs.parameters():
            p.add_(0.3 * torch.randn_like(p))
        base, wanted = layer(x), theirs.eval()(x)
    tensors = {f"lycoris_layer.{name}": t.detach().contiguous() for name, t in theirs.state_dict().items()}
    save_file(tensors, tmp_path / "theirs.safetensors")
    model = nn.Module()
    model.layer = layer
    if becomes == NEAREST:
        with pytest.raises(veneer.StateError, match="give a rank or a tolerance"):
            read_foreign(model, tmp_path / "theirs.safetensors")
    read = read_foreign(model, tmp_path / "theirs.safetensors", tolerance=1e-7 if becomes == NEAREST else None)
    assert (read.factors == {}) == (becomes == SAME)
    held = veneer.PeftModel(model, read.config, _fresh=False)
    held._take_in("default", read.config, read.tensors, tmp_path, False)
    with torch.no_grad():
        assert float((layer(x) - wanted).norm() / (wanted - base).norm()) < 1e-4
    if becomes == SAME and not any("mid" in key for key in tensors):
        assert veneer.save_lycoris(held, tmp_path / "ours.safetensors") == {}
        ours = load_file(tmp_path / "ours.safetensors")
        assert set(ours) == set(tensors)
        for key, t in tensors.items():
            assert torch.equal(ours[key], t.to(ours[key].dtype)) or (cls, key[-5:]) == ("LokrModule", "alpha")


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
    return LlamaForCausalLM(config).eval()


ALGORITHMS = {
    "LoRA": ("lora", {}),
    "DoRA": ("lora", {"dora_wd": True, "wd_on_out": True}),
    "LoHa": ("loha", {}),
    "LoKr": ("lokr", {"factor": 4}),
    "LoKr of full factors": ("lokr", {"full_matrix": True}),
    "OFT": ("diag-oft", {}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("algorithm", "options"), ALGORITHMS.values(), ids=ALGORITHMS)
def test_whole_files_go_to_lycoris_and_back(algorithm, options, tmp_path):
    lycoris = pytest.importorskip("lycoris", reason="LyCORIS is not installed")
    logging.disable(logging.WARNING)
    ids = torch.arange(1, 9)[None]
    lycoris.LycorisNetwork.apply_preset({"target_module": ["LlamaAttention", "LlamaMLP"]})
    theirs = llama()
    network = lycoris.create_lycoris(theirs, 1.0, linear_dim=2, linear_alpha=1, algo=algorithm, **options)
    network.apply_to()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
        y = theirs(ids).logits
    network.save_weights(str(tmp_path / "theirs.safetensors"), torch.float32, {})
    model = veneer.get_peft_model(llama(), veneer.LoraConfig(r=1, target_modules=["q_proj"])).eval()
    veneer.load_lycoris(model, tmp_path / "theirs.safetensors", "foreign", tolerance=1e-6 if algorithm == "diag-oft" else None)
    model.set_adapter("foreign")
    veneer.save_lycoris(model, tmp_path / "ours.safetensors")
    again = llama()
    lycoris.create_lycoris_from_weights(1.0, str(tmp_path / "ours.safetensors"), again)[0].apply_to()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, y, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again(ids).logits, y, rtol=1e-4, atol=1e-5)
