"""The table of instances: method × kind of layer × options. A new method, kind, storage or option is a new row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import dense as d
import torch
from places import KINDS, Kind, Weight, adapted_weights, linear
from torch import Tensor, nn
from torch.func import functional_call

from veneer import (
    AdaLoraConfig,
    BOFTConfig,
    FourierFTConfig,
    HRAConfig,
    IA3Config,
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    OFTConfig,
    PeftConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from veneer.files import PREFIX, entries

PATH = "layer"


class Model(nn.Module):
    """A model with one adapted layer and one that nothing touches."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.other = layer, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@dataclass(frozen=True)
class Instance:
    """One row: a configuration, a layer, and the weights it must act as, from the file's tensors alone."""

    id: str
    config: Callable[..., PeftConfig]
    options: dict[str, Any]
    dense: d.Dense
    count: int
    kind: Kind = field(default_factory=linear)
    fresh: str = "bits"
    """What a fresh adapter gives: the base's output bit for bit ("bits"), close to it ("close"), or another ("no")."""
    scales_bias: bool = False

    def base(self, dtype: torch.dtype = torch.float32) -> Model:
        generator = torch.Generator().manual_seed(7)
        model = Model(self.kind.make())
        with torch.no_grad():
            for p in model.layer.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 2)
        return model.to(dtype)

    def make(self, dtype: torch.dtype = torch.float32, *, random: bool = True, **options: Any) -> PeftModel:
        torch.manual_seed(5)
        model = get_peft_model(self.base(dtype), self.config(**self.kind.target | self.options | options))
        if random:
            randomise(model)
        return model

    def x(self, *lead: int, dtype: torch.dtype = torch.float32) -> Tensor:
        with torch.random.fork_rng():
            torch.manual_seed(3)
            x = self.kind.feed(lead or (4, 5))
        return x.to(dtype) if x.is_floating_point() else x

    def tensors(self, model: PeftModel) -> dict[str, Tensor]:
        """The adapter's numbers by their names in the file, in float64."""
        own = entries(model.get_base_model(), "default")
        return {k.removeprefix(f"{PREFIX}{PATH}."): t.detach().double() for k, t in own.items() if k.startswith(PREFIX)}

    def output(
        self, model: PeftModel, x: Tensor, values: dict[str, Tensor] | None = None, biases: dict[str, Tensor] | None = None
    ) -> Tensor:
        """What the layer must give: the plain layer in float64 with the formula's weights in it."""
        plain = self.kind.make().double()
        own = {n: p.detach().double() for n, p in model.get_base_model().layer.named_parameters() if "veneer" not in n}
        own |= biases or {}
        t = self.tensors(model) if values is None else values
        found = adapted_weights(self.kind, self.dense, own, t, one_expert)
        for w in self.kind.weights if self.scales_bias else []:
            if w.bias is not None:
                b, mine = found.get(w.bias, own[w.bias]), t[f"{w.prefix}ia3_l"].flatten()
                found[w.bias] = b * mine if w.rows is None else b.index_copy(0, torch.tensor(w.rows), b[list(w.rows)] * mine)
        if "lora_B.bias" in t:
            found["bias"] = own["bias"] + 2.0 * t["lora_B.bias"]
        return functional_call(plain, own | found, (x.double() if x.is_floating_point() else x,))


def one_expert(key: str, t: Tensor, e: int, experts: int) -> Tensor:
    """The tensor of one expert as a file's reader finds it."""
    if key == "lora_A.weight":
        return t.unflatten(0, (experts, -1))[e]
    if key == "lora_B.weight":
        return t.unflatten(1, (-1, experts))[:, :, e]
    return t[e]


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Give every trainable parameter random values of a size that a trained adapter has."""
    generator = torch.Generator().manual_seed(11)
    for name, p in model.named_parameters():
        if p.requires_grad:
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            near_one = name.endswith(("magnitude_vector", "boft_s", ".l"))
            p.copy_(p * (1 + 0.3 * noise) if near_one else 0.4 * noise)


def total(per_weight: Callable[[d.Where], int]) -> Callable[[Kind], int]:
    """The count of all of a kind's weights and experts."""
    return lambda kind: sum(per_weight(w.where) * (w.experts or 1) for w in kind.weights)


def features(w: Weight) -> int:
    return w.where.out if w.where.lookup else w.where.in_


def divisible(kind: Kind, n: int) -> bool:
    return all(features(w) % n == 0 for w in kind.weights)


def lokr_count(r: int) -> Callable[[d.Where], int]:
    def count(w: d.Where) -> int:
        (a, b), (c, e) = d.square(w.out), d.square(w.channels)
        return a * c + (b * e * w.k if r >= max(b, e) / 2 else r * (b + e * w.k))

    return count


def every_method(kind_id: str, kind: Kind | None = None) -> list[Instance]:
    """One row for each method on one kind of layer: that of the table, or another that is called so."""
    kind = KINDS[kind_id] if kind is None else kind

    def row(method: str, config: Any, options: dict[str, Any], dense: d.Dense, count: Callable[[d.Where], int], **more: Any) -> Instance:
        return Instance(f"{method}-{kind_id}", config, options, dense, total(count)(kind), kind, **more)

    def turned(w: d.Where) -> int:
        return w.out if w.lookup else w.in_

    b = 4 if divisible(kind, 4) else 2
    m = 2 if divisible(kind, 4) else 1
    widest = max(w.where.in_ for w in kind.weights), max(w.where.out for w in kind.weights)
    return [
        row("lora", LoraConfig, {"r": 2, "lora_alpha": 3}, d.lora(1.5), lambda w: 2 * (w.in_ + w.out)),
        row("dora", LoraConfig, {"r": 2, "use_dora": True}, d.dora(4.0), lambda w: 2 * (w.in_ + w.out) + w.out),
        row("adalora", AdaLoraConfig, {"init_r": 3, "target_r": 2, "total_step": 20}, d.adalora(8, 3), lambda w: 3 * (w.in_ + w.out + 1)),
        row("loha", LoHaConfig, {"r": 2, "alpha": 3}, d.loha(1.5), lambda w: 4 * (w.in_ + w.out)),
        row("lokr", LoKrConfig, {"r": 1, "alpha": 2}, d.lokr(2.0), lokr_count(1)),
        row("oft", OFTConfig, {"oft_block_size": b, "use_cayley_neumann": False}, d.oft(b), lambda w: turned(w) * (b - 1) // 2),
        row("boft", BOFTConfig, {"boft_block_size": 2, "boft_n_butterfly_factor": m}, d.boft(m), lambda w: m * turned(w) * 2 + w.out),
        row("ia3", IA3Config, {}, d.ia3(), lambda w: w.out, scales_bias=True),
        row("vera", VeraConfig, {"r": 3, "projection_prng_key": 4}, d.vera(4, 3, *widest), lambda w: 3 + w.out),
        row("hra", HRAConfig, {"r": 4}, d.hra(), lambda w: 4 * turned(w), fresh="close"),
        row("fourierft", FourierFTConfig, {"n_frequency": 9, "scaling": 20.0}, d.fourierft(20.0, 777), lambda w: 9, fresh="no"),
    ]


IN, OUT = 12, 8
BOTH = IN + OUT
OPTIONS = [
    Instance("lora-no-bias", LoraConfig, {"r": 3}, d.lora(8 / 3), 3 * BOTH, linear(bias=False)),
    Instance("lora-rank-stabilised", LoraConfig, {"r": 4, "use_rslora": True}, d.lora(4.0), 4 * BOTH),
    Instance("lora-gaussian", LoraConfig, {"r": 2, "init_lora_weights": "gaussian"}, d.lora(4.0), 2 * BOTH),
    Instance("lora-orthogonal", LoraConfig, {"r": 4, "init_lora_weights": "orthogonal"}, d.lora(2.0), 4 * BOTH, fresh="close"),
    Instance("lora-random", LoraConfig, {"r": 4, "init_lora_weights": False}, d.lora(2.0), 4 * BOTH, fresh="no"),
    Instance("lora-pissa", LoraConfig, {"r": 4, "init_lora_weights": "pissa"}, d.from_weight(2.0, 4, "pissa"), 4 * BOTH, fresh="close"),
    Instance("lora-olora", LoraConfig, {"r": 2, "init_lora_weights": "olora"}, d.from_weight(4.0, 2, "olora"), 2 * BOTH, fresh="close"),
    Instance("lora-rank-pattern", LoraConfig, {"rank_pattern": {PATH: 2}, "alpha_pattern": {PATH: 3}}, d.lora(1.5), 2 * BOTH),
    Instance("lora-trained-bias", LoraConfig, {"r": 2, "bias": "lora_only"}, d.lora(4.0), 2 * BOTH + OUT),
    Instance("lora-own-bias", LoraConfig, {"r": 4, "lora_bias": True}, d.lora(2.0), 4 * BOTH + OUT),
    Instance("dora-no-bias", LoraConfig, {"r": 4, "use_dora": True, "use_rslora": True}, d.dora(4.0), 4 * BOTH + OUT, linear(bias=False)),
    Instance("lora-wide", LoraConfig, {"r": 20}, d.lora(0.4), 20 * BOTH),
    Instance("lora-one-output", LoraConfig, {"r": 1}, d.lora(8.0), IN + 1, linear(IN, 1)),
    Instance("loha-wide", LoHaConfig, {"r": 1}, d.loha(8.0), 2 * 63, linear(32, 31)),  # cheap enough for Khatri-Rao factors
    Instance("loha-random", LoHaConfig, {"r": 2, "init_weights": False}, d.loha(4.0), 4 * BOTH, fresh="no"),
    Instance("loha-tucker", LoHaConfig, {"r": 2, "use_effective_conv2d": True}, d.loha(4.0), 2 * (2 * 12 + 4 * 6), KINDS["conv2d"]),
    Instance("loha-tucker-1d", LoHaConfig, {"r": 2, "use_effective_conv2d": True}, d.loha(4.0), 2 * (2 * 12 + 4 * 3), KINDS["conv1d"]),
    Instance("loha-tucker-1x1", LoHaConfig, {"r": 2, "use_effective_conv2d": True}, d.loha(4.0), 4 * 12, KINDS["conv2d-1x1"]),
    Instance("lokr-both", LoKrConfig, {"r": 1, "decompose_both": True}, d.lokr(8.0), 8 + 8, linear(16, 16)),
    Instance("lokr-full", LoKrConfig, {"r": 8}, d.lokr(1.0), 2 * 3 + 4 * 4),
    Instance("lokr-factor", LoKrConfig, {"r": 1, "decompose_factor": 4}, d.lokr(8.0), 4 * 4 + 2 + 3),
    Instance("lokr-lycoris", LoKrConfig, {"r": 1, "init_weights": "lycoris"}, d.lokr(8.0), 2 * 3 + 8),
    Instance("lokr-random", LoKrConfig, {"r": 1, "init_weights": False}, d.lokr(8.0), 2 * 3 + 8, fresh="no"),
    Instance("lokr-tucker", LoKrConfig, {"r": 1, "use_effective_conv2d": True}, d.lokr(8.0), 2 * 2 + 6 + 4 + 2, KINDS["conv2d"]),
    Instance("lokr-full-conv", LoKrConfig, {"r": 8}, d.lokr(1.0), 2 * 2 + 4 * 2 * 6, KINDS["conv2d"]),
    Instance("lokr-full-1d", LoKrConfig, {"r": 8}, d.lokr(1.0), 2 * 2 + 4 * 2 * 3, KINDS["conv1d"]),
    Instance("oft-neumann", OFTConfig, {"oft_block_size": 4}, d.oft(4, 5), 18),
    Instance("oft-neumann-3", OFTConfig, {"oft_block_size": 4, "num_cayley_neumann_terms": 3}, d.oft(4, 3), 18),
    Instance("oft-neumann-2", OFTConfig, {"oft_block_size": 4, "num_cayley_neumann_terms": 2}, d.oft(4, 2), 18),
    Instance("oft-neumann-7", OFTConfig, {"oft_block_size": 3, "num_cayley_neumann_terms": 7}, d.oft(3, 7), 12),
    Instance("oft-blocks", OFTConfig, {"r": 2, "oft_block_size": 0, "use_cayley_neumann": False}, d.oft(6), 30),
    Instance("oft-shared", OFTConfig, {"oft_block_size": 4, "block_share": True}, d.oft(4, 5, share=True), 6),
    Instance(
        "oft-constrained", OFTConfig, {"oft_block_size": 4, "coft": True, "eps": 0.3, "use_cayley_neumann": False}, d.oft(4, eps=0.3), 18
    ),
    Instance("oft-random", OFTConfig, {"oft_block_size": 4, "init_weights": False}, d.oft(4, 5), 18, fresh="no"),
    Instance("oft-nearest", OFTConfig, {"oft_block_size": 5, "use_cayley_neumann": False}, d.oft(4), 18),
    Instance("oft-no-bias", OFTConfig, {"oft_block_size": 4}, d.oft(4, 5), 18, linear(bias=False)),
    Instance("boft-one", BOFTConfig, {"boft_block_size": 4}, d.boft(1), 48 + OUT),
    Instance("boft-three", BOFTConfig, {"boft_block_size": 4, "boft_n_butterfly_factor": 3}, d.boft(3), 3 * 64 + OUT, linear(16, OUT)),
    Instance("boft-four", BOFTConfig, {"boft_block_size": 4, "boft_n_butterfly_factor": 4}, d.boft(4), 4 * 128 + 5, linear(32, 5)),
    Instance("boft-number", BOFTConfig, {"boft_block_size": 0, "boft_block_num": 6, "boft_n_butterfly_factor": 2}, d.boft(2), 2 * 24 + OUT),
    Instance("boft-random", BOFTConfig, {"boft_block_size": 4, "init_weights": False}, d.boft(1), 48 + OUT, fresh="no"),
    Instance("boft-no-bias", BOFTConfig, {"boft_block_size": 4}, d.boft(1), 48 + OUT, linear(bias=False)),
    Instance("ia3-input", IA3Config, {"feedforward_modules": [PATH]}, d.ia3(on_input=True), IN),
    Instance("ia3-input-conv", IA3Config, {"feedforward_modules": [PATH]}, d.ia3(on_input=True), 4, KINDS["conv2d"]),
    Instance("ia3-input-embedding", IA3Config, {"feedforward_modules": [PATH]}, d.ia3(on_input=True), 10, KINDS["embedding"]),
    Instance("hra-orthonormal", HRAConfig, {"r": 3, "apply_GS": True}, d.hra(orthonormal=True), 36, fresh="no"),
    Instance("hra-odd", HRAConfig, {"r": 3}, d.hra(), 36, fresh="no"),
    Instance("vera-drawn-again", VeraConfig, {"r": 3, "save_projection": False}, d.vera(0, 3, IN, OUT), 3 + OUT),
    Instance(
        "fourierft-zero",
        FourierFTConfig,
        {"n_frequency_pattern": {PATH: 5}, "init_weights": True, "scaling": 9.0},
        d.fourierft(9.0, 777),
        5,
    ),
]

INSTANCES = [row for kind in KINDS for row in every_method(kind)] + OPTIONS
BY_ID = {i.id: i for i in INSTANCES}


def with_options(row: str, **options: Any) -> Instance:
    """A row with other options."""
    return replace(BY_ID[row], options=BY_ID[row].options | options)
