"""What a training run says while it runs: a bar with the time left on a terminal, one line per epoch elsewhere, every event into the run's file."""

from __future__ import annotations

import sys
import time
from typing import Any

from transformers import TrainerCallback

from .runs import Run


class Progress(TrainerCallback):
    """Tells a person on stderr, and `events.jsonl`, how training goes."""

    def __init__(self, run: Run, *, quiet: bool = False) -> None:
        self.run, self.quiet = run, quiet
        self.bar: Any = None
        self.task: Any = None
        self.loss: float | None = None
        self.start = time.perf_counter()
        self.first = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start, self.first = time.perf_counter(), state.global_step
        if not state.is_world_process_zero:
            return
        self.run.event("train", steps=state.max_steps, epochs=args.num_train_epochs, device=str(args.device))
        if not self.quiet and sys.stderr.isatty():
            self._open_bar(state)

    def _open_bar(self, state: Any) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps,"),
            TimeRemainingColumn(),
            TextColumn("left"),
        )
        self.bar = RichProgress(*columns, console=Console(stderr=True))
        self.task = self.bar.add_task("training", total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        values = dict(logs or {})
        self.loss = values.get("loss", self.loss)
        if "loss" in values and state.is_world_process_zero:
            self.run.event("log", step=state.global_step, **values)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not metrics or "eval_accuracy" not in metrics or state.global_step == 0 or not state.is_world_process_zero:
            return
        self.run.event("evaluate", step=state.global_step, **metrics)
        if self.quiet:
            return
        spent = time.perf_counter() - self.start
        left = spent * (state.max_steps - state.global_step) / max(1, state.global_step - self.first)
        loss = "" if self.loss is None else f"  loss {self.loss:.4f}"
        line = f"epoch {metrics['epoch']:4.1f}{loss}  validation loss {metrics['eval_loss']:.4f}, accuracy {metrics['eval_accuracy']:.1%}"
        line += f"  ({spent:.0f} s, about {left:.0f} s left)"
        if self.bar is not None:
            self.bar.console.print(line, highlight=False)
        else:
            print(line, file=sys.stderr, flush=True)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self.run.event("saved", step=state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()
        if state.is_world_process_zero:
            self.run.event("trained", step=state.global_step, best=state.best_metric, best_checkpoint=state.best_model_checkpoint)

    def close(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
