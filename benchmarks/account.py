"""Where a step's time beyond the floor goes: counted floating-point operations and bytes, their price, and what they took.

Every operation of a step is counted as the dispatcher sees it, and the floor's are taken away. A product's price is its time at the speed of a large product, or of the memory
where that is slower; everything else is a pass over its arguments and results, at the speed of the memory. What both took in the step itself is a profiler's word. What is
left of the measured time is calls: Python, the dispatcher, threads that are woken.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import measuring
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

PRODUCTS = {"mm", "bmm", "addmm", "addmm_", "baddbmm", "baddbmm_"}

WRITES_ONLY = {"fill_", "zero_", "copy_"}
"""In-place operations that do not read what they write into."""

FREE = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided", "_unsafe_view", "set_", "_reshape_alias", "lift_fresh"}
"""Operations that touch no number."""


@dataclass(frozen=True)
class Call:
    """One operation by its name, and what it does."""

    name: str
    flops: int
    bytes: int


class Counting(TorchDispatchMode):
    """Counts the operations inside the block."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[Call] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name not in FREE:
            given = args[1:] if name in WRITES_ONLY else args
            read = sum(size(t) for t in tree_flatten(given)[0] if isinstance(t, Tensor))
            written = sum(size(t) for t in tree_flatten(out)[0] if isinstance(t, Tensor))
            if name == "addmm" and args[0].dim() == 2:
                written *= 3  # the matrix is copied first; the product then reads and writes it
            self.calls[Call(name, product(name, args), read + written)] += 1
        return out


def product(name: str, args: tuple[Any, ...]) -> int:
    """FLOPs of a matrix product; 0 of everything else."""
    if name not in PRODUCTS:
        return 0
    a, b = args[-2:]
    return 2 * prod(a.shape[:-2]) * a.shape[-2] * a.shape[-1] * b.shape[-1]


def size(t: Tensor) -> int:
    """Bytes that are met in a pass over a tensor: of an expanded one, what there is."""
    return min(t.numel() * t.itemsize, t.untyped_storage().nbytes())


class Machine:
    """What one device does.

    Args:
        flops: FLOP/s of a large product.
        bandwidth: bytes/s of a pass that reads and writes.
    """

    def __init__(self, device: str, dtype: torch.dtype) -> None:
        self.device, self.cuda = device, device.startswith("cuda")
        x, W = (torch.randn(2048, n, device=device).to(dtype) for n in (1024, 2048))
        y = torch.empty_like(W)
        self.flops = 2 * 1024 * 2048 * 2048 / self._seconds(lambda: torch.mm(x.mT, W))
        self.bandwidth = 2 * size(W) / self._seconds(lambda: torch.mul(W, 2.0, out=y))

    def _seconds(self, f: Callable[[], object]) -> float:
        return statistics.median([measuring.clock(f, self.cuda)[0] for _ in range(12)][2:])

    def price(self, call: Call) -> float:
        """Seconds at the speed of a large product or of the memory, whichever is slower."""
        return max(call.flops / self.flops, call.bytes / self.bandwidth)


def counted(step: Callable[[], object]) -> Counter[Call]:
    """The operations of one call."""
    with Counting() as seen:
        step()
    return seen.calls


def profiled(step: Callable[[], object], cuda: bool) -> dict[str, float]:
    """Seconds by the operation's name."""
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])], acc_events=True) as watched:
        step()
    spent = {e.key: e.self_device_time_total if cuda else e.self_cpu_time_total for e in watched.key_averages()}
    return {k.removeprefix("aten::"): v / 1e6 for k, v in spent.items() if k.startswith("aten::")}


def account(
    ours: Callable[[], object], floor: Callable[[], object], machine: Machine, floor_seconds: float, time: float, repeats: int = 5
) -> dict[str, float]:
    """What a step does beyond the floor; prices and times in times the floor's time.

    Args:
        time: the measured step, in times the floor.
    """
    calls, others = counted(ours), counted(floor)
    changed = [(c, calls[c] - others[c]) for c in calls.keys() | others.keys()]

    def more(of: Callable[[Call], float], products: bool) -> float:
        return sum(of(c) * n for c, n in changed if n and (c.name in PRODUCTS) is products)

    passes = {c.name for c in calls.keys() | others.keys()} - PRODUCTS | {"copy_"}  # which a product may call itself
    took: dict[bool, list[float]] = {True: [], False: []}
    for _ in range(repeats):
        one, other = profiled(floor, machine.cuda), profiled(ours, machine.cuda)
        for products, names in ((True, PRODUCTS), (False, passes)):
            took[products].append(sum(other.get(n, 0.0) - one.get(n, 0.0) for n in names))
    found: dict[str, float] = {"calls": more(lambda c: 1, True) + more(lambda c: 1, False)}
    found["products_gflop"], found["passes_gb"] = more(lambda c: c.flops, True) / 1e9, more(lambda c: c.bytes, False) / 1e9
    for name, products in (("products", True), ("passes", False)):
        found[f"{name}_price"] = more(machine.price, products) / floor_seconds
        found[f"{name}_took"] = statistics.median(took[products]) / floor_seconds
    found["left"] = time - 1 - found["products_took"] - found["passes_took"]
    return {k: round(v, 3) for k, v in found.items()}


def line(name: str, found: dict[str, float]) -> str:
    products = f"{found['products_gflop']:8.1f}{found['products_price']:+8.3f}{found['products_took']:+8.3f}"
    passes = f"{found['passes_gb']:9.2f}{found['passes_price']:+8.3f}{found['passes_took']:+8.3f}"
    return f"{name:24}{products}{passes}{found['calls']:9.0f}{found['left']:+8.3f}"


HEADER = f"{'':24}{'products':^24} {'passes':^24} {'calls':^16}\n{'':24}{'GFLOP':>8}{'price':>8}{'took':>8}{'GB':>9}{'price':>8}{'took':>8}{'more':>9}{'left':>8}"
