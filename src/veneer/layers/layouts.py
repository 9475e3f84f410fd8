"""Where the parts of fused projections lie: by architecture, or as the user says.

A fused weight stacks several projections of one input. Which rows are whose is written nowhere but in the forward of the module around it, so layouts are known by that
module's class, and `check_parts` holds them against what the module really does. A class that is not in the table is not guessed at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import TargetError
from ..operators import Rows
from .base import LayerKind
from .kinds import places
from .parts import PartKind
from .swap import own_class, own_modules


@dataclass(frozen=True)
class Layout:
    """The parts of one fused weight.

    Args:
        parts: name → rows.
        linear: the part that the module's output is linear in: the values of an attention, the half of a gated network that the other gates.
    """

    parts: Mapping[str, Rows]
    linear: str = ""


@dataclass(frozen=True)
class Fused:
    """One fused weight of a model.

    Args:
        path: what its parts' names begin with.
        module: path of the module that holds it.
        kind: how the whole acts.
    """

    path: str
    module: str
    kind: LayerKind
    layout: Layout

    def part(self, name: str) -> PartKind:
        """The kind of one part."""
        return PartKind(self.kind, self.layout.parts[name], name)


def sized(widths: Mapping[str, int], groups: int = 1, linear: str = "v") -> Layout:
    """Parts of these widths side by side, in each of several groups."""
    period, start, parts = sum(widths.values()), 0, {}
    for name, width in widths.items():
        parts[name] = Rows(groups, period, start, width)
        start += width
    return Layout(parts, linear)


def equal(names: str, total: int, groups: int = 1, linear: str = "v") -> Layout:
    """Parts of one width; `names` has blanks between them."""
    each = names.split()
    return sized(dict.fromkeys(each, total // (groups * len(each))), groups, linear)


def _heads(parent: Any) -> int:
    own = getattr(parent, "num_heads", None) or getattr(parent, "num_attention_heads", None)
    return int(own or parent.config.num_attention_heads)


def _thirds(parent: Any, total: int) -> Layout:
    return equal("q k v", total)


def _per_head(parent: Any, total: int) -> Layout:
    return equal("q k v", total, groups=_heads(parent))


def _grouped_queries(parent: Any, total: int) -> Layout:
    kv = parent.num_key_value_heads * parent.head_dim
    return sized({"q": total - 2 * kv, "k": kv, "v": kv})


def _gpt2(parent: Any, total: int) -> Layout:
    return equal("k v", total) if getattr(parent, "is_cross_attention", False) else equal("q k v", total)


def _bigcode(parent: Any, total: int) -> Layout:
    if parent.is_cross_attention:
        return equal("k v", total)
    if not parent.multi_query:
        return _per_head(parent, total)
    return sized({"q": total - 2 * parent.kv_dim, "k": parent.kv_dim, "v": parent.kv_dim})


def _falcon(parent: Any, total: int) -> Layout:
    d = parent.head_dim
    if parent.new_decoder_architecture:
        return sized({"q": parent.num_heads // parent.num_kv_heads * d, "k": d, "v": d}, groups=parent.num_kv_heads)
    return sized({"q": total - 2 * d, "k": d, "v": d}) if parent.multi_query else _per_head(parent, total)


def _codegen(parent: Any, total: int) -> Layout:
    return equal("q v k", total, groups=4)  # the four cores of the machine it was trained on


def _gate_up(parent: Any, total: int) -> Layout:
    return equal("gate up", total, linear="up")


def _up_gate(parent: Any, total: int) -> Layout:
    return equal("up gate", total, linear="up")


def _input_gate(parent: Any, total: int) -> Layout:
    return equal("input gate", total, linear="gate")


_TABLE: list[tuple[str, str, str, Callable[[Any, int], Layout]]] = [
    # name of the layer, package and classes of the module around it, layout
    ("qkv", "transformers.models.", """SamVisionAttention SamVisionSdpaAttention SamHQVisionAttention SamHQVisionSdpaAttention Sam2MultiScaleAttention
        HieraMaskUnitAttention VitDetAttention BlipAttention Blip2Attention InstructBlipAttention InstructBlipVideoAttention SegGptAttention GotOcr2VisionAttention
        TimesformerSelfAttention MgpstrAttention Florence2VisionWindowAttention
        VisionAttention Qwen2_5_VLVisionAttention Qwen3VLVisionAttention Glm4vVisionAttention""", _thirds),
    ("qkv", "timm.", "Attention WindowAttention", _thirds),
    ("qkv", "dinov2.layers.attention", "Attention MemEffAttention", _thirds),
    ("qkv", "segment_anything.modeling.", "Attention", _thirds),
    ("Wqkv", "transformers.models.", "MptAttention ModernBertAttention", _thirds),
    ("Wqkv", "transformers.models.", "DbrxAttention", _grouped_queries),
    ("qkv_proj", "transformers.models.", "Phi3Attention Phi4MultimodalAttention", _grouped_queries),
    ("qkv_proj", "transformers.models.", "CodeGenAttention", _codegen),
    ("c_attn", "transformers.models.", "GPT2Attention ImageGPTAttention DecisionTransformerGPT2Attention", _gpt2),
    ("c_attn", "transformers.models.openai.", "Attention", _gpt2),
    ("c_attn", "transformers.models.", "GPTBigCodeAttention", _bigcode),
    ("query_key_value", "transformers.models.", "BloomAttention GPTNeoXAttention GPTNeoXJapaneseAttention PersimmonAttention", _per_head),
    ("query_key_value", "transformers.models.", "FalconAttention FalconFlashAttention2", _falcon),
    ("in_proj", "transformers.models.deberta.", "DisentangledSelfAttention", _per_head),
    ("gate_up_proj", "transformers.models.", "Phi3MLP GlmMLP Glm4MLP Phi4MultimodalMLP Glm4vTextMLP DiaMLP", _gate_up),
    ("gate_up_proj", "transformers.models.", "Phi4MultimodalAudioMLP", _up_gate),
    ("Wi", "transformers.models.", "ModernBertMLP", _input_gate),
]  # fmt: skip
_LEAVES = {leaf for leaf, *_ in _TABLE}


def fused_weights(model: nn.Module, custom: Mapping[str, Any] | None = None) -> Iterator[Fused]:
    """The fused weights of a model whose layout is known, and those that `custom` names.

    Args:
        custom: name, suffix or whole path of a fused layer → its parts (see `PeftConfig.fused_layouts`).

    Raises:
        TargetError: a layout that does not fit the weight, or a name in `custom` that matches no layer.
    """
    modules = dict(own_modules(model, every_name=True))
    missing = set(custom or ())
    for path, module in modules.items():
        parent, _, leaf = path.rpartition(".")
        said = next((k for k in custom or () if path == k or path.endswith("." + k)), None)
        if said is None and leaf not in _LEAVES and not isinstance(module, nn.MultiheadAttention):
            continue
        kind, name = _stacked(module)
        if kind is None:
            continue
        total, whole = kind.form(module).out, f"{path}.{name}".strip(".") if name else path
        missing.discard(said or "")
        layout = _as_said((custom or {})[said], total, whole) if said is not None else equal("q k v", total) if name else None
        layout = layout or _known(modules[parent], leaf, total)
        if layout is not None:
            _check(layout, total, whole)
            yield Fused(whole, path, kind, layout)
    if missing:
        raise TargetError(f"fused_layouts: no layer that can be adapted is called {sorted(missing)[0]!r}")


def _stacked(module: nn.Module) -> tuple[LayerKind | None, str]:
    """The kind of a module's weight that can be a stack of projections, and its name where it is not the module's own."""
    if isinstance(module, nn.MultiheadAttention):
        return (places(module)[0].kind, "in_proj_weight") if module.in_proj_weight is not None else (None, "")
    found = places(module)
    return (found[0].kind if len(found) == 1 and not found[0].kind.form(module).kernel else None), ""


def _known(parent: nn.Module, leaf: str, total: int) -> Layout | None:
    cls = own_class(parent)
    for known, package, classes, build in _TABLE:
        if leaf == known and cls.__module__.startswith(package) and cls.__name__ in classes.split():
            return build(parent, total)
    return None


def _as_said(said: Mapping[str, Any], total: int, path: str) -> Layout:
    groups, parts = said["groups"], said["parts"]
    if not isinstance(parts[0], str):
        return sized(dict(parts), groups, linear="")
    if total % (groups * len(parts)):
        each = f" in each of {groups} groups" if groups > 1 else ""
        raise TargetError(f"fused_layouts: {path} has {total} rows, which are no {len(parts)} equal parts{each}; give the rows of each")
    return equal(" ".join(parts), total, groups, linear="")


def _check(layout: Layout, total: int, path: str) -> None:
    any_ = next(iter(layout.parts.values()))
    widths = sum(r.width for r in layout.parts.values())
    if any_.total != total or widths != any_.period or any(r.width < 1 for r in layout.parts.values()):
        wanted = " + ".join(f"{n} {r.count}" for n, r in layout.parts.items())
        raise TargetError(f"{path} has {total} rows, its parts would have {wanted}; say where they lie with fused_layouts")
