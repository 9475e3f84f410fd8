"""What the benchmarks share: clocks, interleaved ratios, counted bytes, and how a result is written.

Times are medians of ratios to the reference run just before, so that a busy machine slows both; beside the wall clock the process's own CPU time is given, which other
programs touch less. Import this before torch: threads that spin at OpenMP's barriers measure the machine's other load.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from weakref import WeakKeyDictionary

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import transformers
from torch import Tensor, nn

import veneer

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Ratio:
    """How many times the reference something takes: median, quartiles, by the wall clock and by CPU time."""

    time: float
    low: float
    high: float
    cpu: float | None

    def __str__(self) -> str:
        return f"{self.time:.2f} [{self.low:.2f}–{self.high:.2f}]"


def clock(f: Callable[[], object], cuda: bool) -> tuple[float, float]:
    """(seconds, CPU seconds of this process) of one call; on a GPU its own events give the first."""
    if cuda:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        begin.record()
        f()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3, 0.0
    start, cpu = time.perf_counter(), time.process_time()
    f()
    return time.perf_counter() - start, time.process_time() - cpu


_trained: WeakKeyDictionary[nn.Module, list[nn.Parameter]] = WeakKeyDictionary()


def forget_gradients(model: nn.Module) -> None:
    """As an optimiser does, which holds the trained parameters in a list and does not search the model for them."""
    if model not in _trained:
        _trained[model] = [p for p in model.parameters() if p.requires_grad]
    for p in _trained[model]:
        p.grad = None


def interleaved(
    reference: Callable[[], object], others: Mapping[str, Callable[[], object]], repeats: int, cuda: bool = False
) -> tuple[float, dict[str, Ratio]]:
    """The reference's median seconds, and each other's ratio to the reference that ran right before it; the first two rounds are not counted.

    On a processor, memory that is freed stays with the process from here on (`keep_memory`).
    """
    if not cuda:
        keep_memory()
    walls: dict[str, list[float]] = {k: [] for k in others}
    cpus: dict[str, list[float]] = {k: [] for k in others}
    own = []
    for i in range(repeats + 2):
        for name, f in others.items():
            (r, r_cpu), (t, t_cpu) = clock(reference, cuda), clock(f, cuda)
            if i >= 2:
                own.append(r)
                walls[name].append(t / r)
                cpus[name].append(t_cpu / r_cpu if r_cpu else float("nan"))
    return statistics.median(own), {k: summary(walls[k], None if cuda else cpus[k]) for k in others}


def summary(ratios: list[float], cpu: list[float] | None = None) -> Ratio:
    """Median and quartiles."""
    low, _, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else [ratios[0]] * 3
    return Ratio(statistics.median(ratios), low, high, None if cpu is None else statistics.median(cpu))


def saved_bytes(model: nn.Module, loss: Callable[[], Tensor]) -> int:
    """The distinct storages that autograd's graph keeps for backward, the model's own parameters left out."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    out = loss()
    kept = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in saved_tensors(out)}
    out.backward()
    return sum(size for place, size in kept.items() if place not in own)


def saved_tensors(out: Tensor) -> list[Tensor]:
    """What the nodes of the graph behind a tensor hold. Hooks on saving would see the same, but be seen as well: layers that look into the graph leave it alone then."""
    found: list[Tensor] = []
    seen, left = set(), [out.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [n for n, _ in node.next_functions]
        held = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
        held += getattr(node, "saved_tensors", ())
        for value in held:
            found += [t for t in (value if isinstance(value, (tuple, list)) else [value]) if isinstance(t, Tensor)]
    return found


def keep_memory() -> None:
    """Let the C library keep what is freed (Linux with glibc): by default it returns large blocks to the system, whose pages are then zeroed and mapped anew.

    Which of two steps meets that is chance, and it costs up to 4 % of one.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_MMAP_THRESHOLD, 1 << 25)
        libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)


_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""glibc's numbers for `mallopt`."""


def give_back_memory() -> None:
    """Let the C library give the system what is free, so that what comes next gets new memory, as in a process that begins (Linux with glibc)."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def peak_bytes(step: Callable[[], object], cuda: bool) -> int | None:
    """How far memory grows in one call: the device's, or this process's resident memory (Linux; None elsewhere)."""
    gc.collect()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    libc = ctypes.CDLL(None)
    # What is freed goes back to the system, or what an earlier call left would be used again unseen.
    libc.mallopt(_MMAP_THRESHOLD, 1 << 16)
    give_back_memory()
    reset.write_text("5")
    before = _resident("VmRSS")
    step()
    return _resident("VmHWM") - before


def _resident(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def hardware(device: str) -> str:
    """The machine's name for a result file."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    names = (
        [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        if Path("/proc/cpuinfo").exists()
        else []
    )
    return f"{names[0] if names else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options of every benchmark."""
    p = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    p.add_argument("--repeats", type=int, default=9)
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--out", type=Path, help="write the results to this JSON file")
    return p


def finish(args: argparse.Namespace, rows: list[dict], missed: list[str]) -> int:
    """Write the result file, print what was missed; the process's exit status."""
    if args.out:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "veneer": veneer.__version__}
        options = {k: v for k, v in vars(args).items() if k != "out"}
        args.out.write_text(
            json.dumps(
                {"hardware": hardware(args.device), "versions": versions, "options": options, "rows": rows, "missed": missed}, indent=1
            )
            + "\n"
        )
    for line in missed:
        print("missed:", line)
    return 1 if missed else 0


def as_row(ratios: Mapping[str, Ratio]) -> dict[str, dict]:
    """Ratios for a result file, rounded to what they are worth."""
    return {k: {n: None if v is None else round(v, 3) for n, v in asdict(r).items()} for k, r in ratios.items()}
