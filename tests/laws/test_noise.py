"""What is disturbed while training: the input of the change, its rows, the whole of it, blocks of a rotation; and never in evaluation or in a merge."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
import torch._dynamo.testing
from table import BY_ID, with_options
from test_laws import close

from veneer.engine.masks import mask_of

INPUT = {"lora": "lora_dropout", "dora": "lora_dropout", "adalora": "lora_dropout", "vera": "vera_dropout"}
KINDS = ["linear", "transposed-linear", "conv1d", "conv2d", "conv2d-groups", "conv3d"]
ROWS = ["loha-linear", "loha-conv2d", "loha-tucker", "loha-embedding", "lokr-linear", "lokr-conv1d", "lokr-tucker", "loha-attention"]
ALL = (
    [(f"{m}-{k}", {o: 0.5}) for m, o in INPUT.items() for k in KINDS]
    + [(r, {"rank_dropout": 0.4}) for r in ROWS]
    + [(r, {"module_dropout": 0.4}) for r in ROWS]
    + [(r, {"module_dropout": 0.6}) for r in ("oft-linear", "oft-conv2d", "oft-embedding", "oft-attention")]
    + [(r, {"boft_dropout": 0.6}) for r in ("boft-linear", "boft-conv2d", "boft-three", "boft-embedding")]
)
IDS = [f"{r}-{next(iter(o))}" for r, o in ALL]


def base_of(model, x):
    with model.disable_adapter():
        return model(x)


@pytest.mark.parametrize(("row", "options"), ALL, ids=IDS)
def test_evaluation_and_merging_are_undisturbed(row, options):
    quiet, loud = BY_ID[row], with_options(row, **options)
    x, plain, model = quiet.x(), quiet.make().eval(), loud.make()
    y = plain(x)
    assert torch.equal(model.eval()(x), y)
    model.train()
    assert not all(torch.equal(model(x), y) for _ in range(12))
    model.merge_adapter()
    plain.merge_adapter()
    assert torch.equal(model.eval()(x), plain(x))


@pytest.mark.parametrize(("row", "options"), ALL, ids=IDS)
def test_a_seed_repeats_it_and_every_parameter_has_a_gradient(row, options):
    case = with_options(row, **options)
    model, x = case.make().train(), case.x()
    runs = []
    for seed in (1, *range(1, 13)):
        torch.manual_seed(seed)
        runs.append(model(x))
    assert torch.equal(runs[0], runs[1]) and not all(torch.equal(runs[0], r) for r in runs[2:])
    sum(r.square().sum() for r in runs).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


COMPILED = [a for a in ALL if a[0].split("-", 1)[1] in ("linear", "conv2d", "embedding")]


@pytest.mark.parametrize(("row", "options"), COMPILED, ids=[f"{r}-{next(iter(o))}" for r, o in COMPILED])
def test_it_compiles_whole(row, options):
    case = with_options(row, **options)
    model, x = case.make().train(), case.x()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for _ in range(2):
        assert compiled(x).isfinite().all()
    assert counter.frame_count == 1


@pytest.mark.parametrize(("method", "kind"), [(m, k) for m in INPUT for k in KINDS])
def test_dropout_reaches_only_the_input_of_the_change(method, kind):
    case = with_options(f"{method}-{kind}", **{INPUT[method]: 0.5})
    model, x = case.make().train(), case.x()
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    dropped = x * mask_of(x.clone(), 0.5, None)[1].keep(x.dtype).view(x.shape) / 0.5
    change = case.output(model, dropped) - base_of(model, dropped).double()
    close(y, (base_of(model, x).double() + change).float())


def test_an_embedding_has_no_input_to_drop():
    case = with_options("lora-embedding", lora_dropout=0.5)
    model, x = case.make(), case.x()
    assert torch.equal(model.train()(x), model.eval()(x))


def test_a_bare_weight_has_no_input_to_drop():
    from veneer import TargetError

    for row in ("lora-attention", "lora-experts", "lora-parameter"):
        with pytest.raises(TargetError, match="read as a weight, so there is no input to drop"):
            with_options(row, lora_dropout=0.5).make()


@pytest.mark.parametrize(("row", "rescaled"), [("loha-linear", True), ("lokr-linear", False)])
def test_rows_are_left_out(row, rescaled):
    case = with_options(row, rank_dropout=0.4)
    model, x = case.make().train(), case.x(64)
    base = base_of(model, x)
    change = case.output(model, x) - base.double()
    for seed in range(20):
        torch.manual_seed(seed)
        now = model(x).double() - base.double()
        kept = now.abs().sum(0) > 0
        scale = kept.double() / kept.double().mean() if rescaled and kept.any() else kept.double()
        close(now, change * scale)


def test_rows_that_are_all_left_out_give_no_change_and_no_nan():
    case = with_options("loha-linear", rank_dropout=0.99)
    model, x = case.make().train(), case.x()
    seen = [model(x) for _ in range(20)]
    assert all(y.isfinite().all() for y in seen) and any(torch.allclose(y, base_of(model, x)) for y in seen)


@pytest.mark.parametrize("row", ["loha-linear", "lokr-conv2d"])
def test_the_whole_change_is_there_or_not(row):
    case = with_options(row, module_dropout=0.3)
    model, x = case.make().train(), case.x()
    base, full, there = base_of(model, x), model.eval()(x), 0
    model.train()
    for seed in range(200):
        torch.manual_seed(seed)
        y = model(x)
        assert torch.allclose(y, base, atol=1e-6) != torch.allclose(y, full, atol=1e-5)
        there += torch.allclose(y, full, atol=1e-5)
    assert 120 <= there <= 160  # 140 expected, 6.5 the standard deviation


@pytest.mark.parametrize(
    ("row", "option", "key"), [("oft-linear", "module_dropout", "oft_R.weight"), ("boft-linear", "boft_dropout", "boft_R")]
)
def test_a_share_of_the_blocks_becomes_the_identity(row, option, key):
    case = with_options(row, **{option: 0.7})
    model, x = case.make().train(), case.x()
    tensors = case.tensors(model)
    n = tensors[key].shape[-3 if key == "boft_R" else 0]
    expected = []
    for chosen in combinations(range(n), int(0.7 * n)):
        for factor in range(len(tensors[key]) if key == "boft_R" else 1):
            t = dict(tensors)
            t[key] = t[key].clone()
            (t[key][factor] if key == "boft_R" else t[key])[list(chosen)] = 0
            expected.append(case.output(model, x, t).float())
    seen = set()
    for seed in range(60):
        torch.manual_seed(seed)
        y = model(x)
        (hit,) = [i for i, e in enumerate(expected) if torch.allclose(y, e, atol=1e-5)]
        seen.add(hit)
    assert len(seen) == len(expected) if len(expected) < 8 else len(seen) > 8


def test_a_shared_block_is_not_dropped():
    case = with_options("oft-shared", module_dropout=0.5)
    model, x = case.make(), case.x()
    assert torch.equal(model.train()(x), model.eval()(x))


def test_dropout_is_unbiased():
    case = with_options("lora-linear", lora_dropout=0.3)
    model, x = case.make(), case.x(1)
    expected = model.eval()(x).detach()
    model.train()
    with torch.no_grad():
        mean = model(x.expand(60_000, -1)).mean(0)
    torch.testing.assert_close(mean, expected[0], rtol=0.03, atol=0.03)
