"""The models and the methods that are measured."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model, LlamaConfig, LlamaModel, ViTConfig, ViTModel

import veneer

METHODS: dict[str, tuple[str, dict]] = {
    "LoRA r16": ("LoraConfig", {"r": 16}),
    "LoRA r16, dropout 0.1": ("LoraConfig", {"r": 16, "lora_dropout": 0.1}),
    "DoRA r16": ("LoraConfig", {"r": 16, "use_dora": True}),
    "LoHa r16": ("LoHaConfig", {"r": 16}),
    "LoHa r4": ("LoHaConfig", {"r": 4}),
    "LoKr r16": ("LoKrConfig", {"r": 16}),
    "AdaLoRA 12": ("AdaLoraConfig", {"init_r": 12, "total_step": 1000}),
    "OFT 32": ("OFTConfig", {"oft_block_size": 32}),
    "BOFT 4, 2 factors": ("BOFTConfig", {"boft_block_size": 4, "boft_n_butterfly_factor": 2}),
}


class Measured:
    """One architecture at the width of a known model.

    Args:
        build: a model of so many blocks, with random weights.
        inputs: keyword arguments of a forward for so many samples.
        embeddings: the module behind which gradients are carried in the frozen model.
        targets: every linear layer of a block.
    """

    def __init__(
        self, build: Callable[[int], nn.Module], inputs: Callable[[int], dict[str, Tensor]], embeddings: str, targets: list[str]
    ) -> None:
        self.build, self.inputs, self.embeddings, self.targets = build, inputs, embeddings, targets


def _pictures(n: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(n, 3, 224, 224)}


def _dinov2(layers: int) -> nn.Module:
    return Dinov2Model(Dinov2Config(hidden_size=1024, num_hidden_layers=layers, num_attention_heads=16, image_size=224))


def _llama(layers: int) -> nn.Module:
    return LlamaModel(
        LlamaConfig(
            vocab_size=64, hidden_size=2048, intermediate_size=5632, num_hidden_layers=layers, num_attention_heads=32, num_key_value_heads=8
        )
    )


MODELS = {
    "vit-base": Measured(
        lambda n: ViTModel(ViTConfig(num_hidden_layers=n), add_pooling_layer=False),
        _pictures,
        "embeddings",
        ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
    ),
    "dinov2-large": Measured(
        _dinov2, _pictures, "embeddings", ["query", "key", "value", "dense", "q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
    ),
    "llama-2048": Measured(
        _llama,
        lambda n: {"input_ids": torch.randint(0, 64, (n, 2048))},
        "embed_tokens",
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    ),
}


def model(name: str, layers: int, device: str, dtype: torch.dtype) -> nn.Module:
    """The same weights at every call, in training mode."""
    torch.manual_seed(0)
    return MODELS[name].build(layers).to(device, dtype).train()


def floor(name: str, frozen: nn.Module, *, compiled: bool = False) -> nn.Module:
    """The reference: nothing adapted, and a backward that carries the gradient through every block.

    Args:
        compiled: by adding a trained number to the embeddings, because torch.compile cannot return what `requires_grad_` was called on.
    """
    frozen.requires_grad_(False)
    embeddings = frozen.get_submodule(MODELS[name].embeddings)
    if compiled:
        embeddings.carrier = nn.Parameter(torch.zeros(1, device=next(frozen.parameters()).device))
        embeddings.register_forward_hook(lambda m, i, out: out + m.carrier)
    else:
        embeddings.register_forward_hook(lambda m, i, out: out.requires_grad_())
    return frozen


def targets(name: str, of: nn.Module) -> list[str]:
    """The adapted layers' names that the model has."""
    present = {p.rpartition(".")[2] for p, m in of.named_modules() if isinstance(m, nn.Linear)}
    return [t for t in MODELS[name].targets if t in present]


def ours(name: str, base: nn.Module, config: str, options: dict, *, wide: bool = True) -> nn.Module:
    """The model with Veneer's adapter on every linear layer, in float32 also where the base is not, unless it is not to be `wide`."""
    adapter = getattr(veneer, config)(target_modules=targets(name, base), **options)
    return veneer.get_peft_model(base, adapter, autocast_adapter_dtype=wide)


def theirs(name: str, base: nn.Module, config: str, options: dict, *, wide: bool = True) -> nn.Module | None:
    """The model with HF PEFT's adapter likewise, or None where HF PEFT is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import peft
        except ImportError:
            return None
        adapter = getattr(peft, config)(target_modules=targets(name, base), **options)
        return peft.get_peft_model(base, adapter, autocast_adapter_dtype=wide)


def shaken(adapted: nn.Module) -> nn.Module:
    """The model with small random numbers in its adapters, so that nothing is zero by chance of its start."""
    with torch.no_grad():
        for p in adapted.parameters():
            if p.requires_grad:
                p.add_(0.01 * torch.randn_like(p))
    return adapted
