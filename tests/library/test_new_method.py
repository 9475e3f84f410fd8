"""A method that Veneer does not know, written here as one file would be: everything else works on it at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

from veneer import PeftConfig, PeftModel, get_peft_model, inits, strategy
from veneer import config as registry
from veneer import operators as op
from veneer.methods.base import Facts, Form, Method, Parameter


@dataclass(kw_only=True)
class MovedConfig(PeftConfig):
    """W' = diag(1 + d) W + u vᵀ."""

    PEFT_TYPE: ClassVar[str] = "MOVED"

    @classmethod
    def facts(cls) -> Facts:
        return Facts("Moved", "W' = diag(1 + d)·W + u vᵀ", "0000.00000", "eq. 1", 2026, "2 out + in", learning_rate=1e-3)

    def method(self, path: str) -> Method:
        return Moved()


@dataclass(frozen=True)
class Moved(Method):
    """The method of this test."""

    def parameters(self, form: Form) -> list[Parameter]:
        return [
            Parameter("d", "moved_d", (form.out,), inits.zeros),
            Parameter("u", "moved_u", (form.out, 1), inits.zeros),
            Parameter("v", "moved_v", (1, form.in_), inits.kaiming),
        ]

    def equation(self, W: Any, p: Any) -> Any:
        grown = op.Diagonal(1 + p.d)
        return op.compose(grown, W + op.LowRank(p.u / (1 + p.d).unsqueeze(-1), p.v))


@pytest.fixture(autouse=True)
def known():
    registry.config_classes()
    registry.register(MovedConfig)
    yield
    registry._REGISTRY.pop("MOVED")


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.lin, self.emb, self.mha = (
            nn.Conv2d(3, 8, 3),
            nn.Linear(8, 5),
            nn.Embedding(7, 8),
            nn.MultiheadAttention(8, 2, batch_first=True),
        )

    def forward(self, image, ids):
        seen = self.conv(image).flatten(2).mT + self.emb(ids).unsqueeze(1)
        return self.lin(self.mha(seen, seen, seen, need_weights=False)[0])


def base():
    torch.manual_seed(0)
    return Model()


def test_it_trains_saves_loads_and_merges_on_every_kind(tmp_path):
    x = torch.randn(2, 3, 5, 5), torch.tensor([1, 4])
    model = get_peft_model(base(), MovedConfig(target_modules=["conv", "lin", "emb", "mha"]))
    assert model.get_nb_trainable_parameters()[0] == (16 + 27) + (10 + 8) + (16 + 7) + (48 + 8) + (16 + 8)
    with model.disable_adapter():
        torch.testing.assert_close(model(*x), base()(*x))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(*x).square().sum().backward()
        optimizer.step()
    y = model.eval()(*x)
    with strategy("merged"):
        torch.testing.assert_close(model(*x), y)
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).peft_type == "MOVED"
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(again(*x), y)
    torch.testing.assert_close(again.merge_and_unload()(*x), y)


def test_the_command_line_lists_it(capsys):
    from veneer.cli import main

    with pytest.raises(SystemExit):
        main(["train", "--method", "moved", "--help"])
    text = capsys.readouterr().out
    assert "moved" in text and "options of moved" in text
