"""Operators know their own gradients, and the one-node layer multiplies them together: every form against autograd over the dense formula, in float64."""

from __future__ import annotations

import weakref

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from veneer import operators as op
from veneer.engine.choice import Choice, Evaluation, Strategy, choose
from veneer.engine.masks import LENGTH, Mask, mask_of, scrambled, tables
from veneer.engine.node import linear_in_one_node

D = torch.float64


def t(*shape, seed=0):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(sum(shape) + seed))


LOW = op.LowRank(t(6, 2), t(2, 8))
DELTAS = {
    "low rank": LOW,
    "dense": op.Dense(t(6, 8)),
    "hadamard of low rank": op.Hadamard(op.LowRank(t(6, 3), t(3, 8)), op.LowRank(t(6, 3, seed=1), t(3, 8, seed=1))),
    "hadamard of dense": op.Hadamard(op.Dense(t(6, 8)), op.Dense(t(6, 8, seed=1))),
    "kronecker": op.Kronecker(op.Dense(t(2, 4)), op.Dense(t(3, 2))),
    "kronecker of low rank": op.Kronecker(op.Dense(t(2, 4)), op.LowRank(t(3, 1), t(1, 2))),
    "sum": LOW + op.Kronecker(op.Dense(t(2, 4)), op.Dense(t(3, 2))),
    "sum with hadamard": LOW + op.Hadamard(op.LowRank(t(6, 3), t(3, 8)), op.LowRank(t(6, 3, seed=1), t(3, 8, seed=1))),
    "sum of low rank": LOW + op.LowRank(t(6, 1), t(1, 8)),
    "scaled rows": op.Product(op.Diagonal(t(6)), LOW),
    "a stretch of rows": op.IntoRows(op.LowRank(t(2, 1), t(1, 8)), op.Rows(1, 6, 3, 2)),
    "rows of every group": op.IntoRows(op.Kronecker(op.Dense(t(2, 4)), op.Dense(t(2, 2))), op.Rows(2, 3, 1, 2)),
    "two parts": op.IntoRows(op.LowRank(t(2, 1), t(1, 8)), op.Rows(1, 6, 0, 2)) + op.IntoRows(op.Dense(t(2, 8)), op.Rows(1, 6, 4, 2)),
    "parts that overlap": op.IntoRows(op.Dense(t(4, 8)), op.Rows(2, 3, 0, 2)) + op.Hadamard(op.Dense(t(6, 8)), op.Dense(t(6, 8, seed=1))),
    "from some columns": op.FromRows(op.Dense(t(6, 4)), op.Rows(2, 4, 1, 2)),
    "rows of a dense map": op.Product(op.Diagonal(t(6)), op.Dense(t(6, 8))),
}
ROTATIONS = {
    "blocks": op.BlockDiagonal(t(2, 4, 4)),
    "an odd number of odd blocks": op.BlockDiagonal(t(1, 8, 8)),
    "butterfly": op.Butterfly(t(2, 4, 2, 2)),
    "butterfly, transposed": op.Butterfly(t(2, 4, 2, 2)).transpose(),
    "identity plus low rank": op.IdentityPlus(op.LowRank(t(8, 2), t(2, 8))),
    "diagonal": op.Diagonal(t(8)),
    "product": op.Product(op.Diagonal(t(8)), op.BlockDiagonal(t(2, 4, 4))),
}
EVERY = DELTAS | ROTATIONS


@pytest.fixture(params=EVERY.values(), ids=EVERY)
def S(request):
    return request.param


def leaves(S):
    return S.map(lambda v: v.detach().clone().requires_grad_())


def test_what_meets_the_tokens_is_the_same_map(S):
    torch.testing.assert_close(S.for_tokens().dense(), S.dense())
    assert [v.shape for v in S.with_tensors(S.tensors()).tensors()] == [v.shape for v in S.tensors()]


@pytest.mark.parametrize("wanted", [True, False], ids=["with dx", "without dx"])
def test_gradients_are_those_of_the_dense_matrix(S, wanted):
    S = leaves(S.for_tokens())
    out, in_ = S.shape
    x, dy, start = t(7, in_), t(7, out), t(7, in_, seed=2)
    X = x.clone().requires_grad_()
    expected = torch.autograd.grad(X @ S.dense().mT, [*S.tensors(), X], dy)
    with torch.no_grad():
        y = t(7, out, seed=3)
        before = y.clone()
        kept = S.accumulate(y, x)
        torch.testing.assert_close(y, before + x @ S.dense().mT)
        for given in (kept, ()):
            dx = start.clone() if wanted else None
            found = S.gradients(x, dy.expand_as(dy), dx, given)
            torch.testing.assert_close(list(found), list(expected[:-1]))
            if wanted:
                torch.testing.assert_close(dx, start + expected[-1])


def test_gradients_from_that_of_the_dense_matrix(S):
    S, G = leaves(S.for_tokens()), t(*S.shape)
    expected = torch.autograd.grad(S.dense(), S.tensors(), G)
    with torch.no_grad():
        torch.testing.assert_close(list(S.gradients_of_dense(G.clone())), list(expected))


def test_adding_to_a_matrix_makes_a_new_one_unless_it_is_given_away(S):
    S, M = S.for_tokens(), t(*S.shape)
    before, total = M.clone(), M + S.dense()
    with torch.no_grad():
        torch.testing.assert_close(S.added_to(M), total)
        torch.testing.assert_close(M, before)
        torch.testing.assert_close(S.added_to(M, own=True), total)


def test_an_operator_that_holds_its_parts_gives_the_matrix_before_and_its_gradients_after(S):
    S, M, G = leaves(S.for_tokens()), t(*S.shape), t(*S.shape, seed=1)
    expected = torch.autograd.grad(S.dense(), S.tensors(), G)
    before = [v.clone() for v in S.tensors()]
    with torch.no_grad():
        held = S.holding()
        for _ in range(2):
            torch.testing.assert_close(held.added_to(M), M + S.dense())
            torch.testing.assert_close(list(held.gradients_of_dense(G.clone())), list(expected))
    torch.testing.assert_close([v.detach() for v in S.tensors()], before)


@pytest.mark.parametrize("S", ROTATIONS.values(), ids=ROTATIONS)
def test_products_from_the_right_take_any_matrix_and_stacks_of_them(S):
    for M in (t(5, 8), t(8, 5).mT, t(3, 5, 8)):
        torch.testing.assert_close(S.right_of(M), M @ S.dense())


@pytest.mark.parametrize("S", ROTATIONS.values(), ids=ROTATIONS)
def test_overwriting_gives_the_product(S):
    x = t(7, 8)
    expected = x @ S.dense().mT
    torch.testing.assert_close(S.for_tokens().overwrite(x.clone()), expected)


def test_costs_of_every_form_grow_with_the_tokens(S):
    S = S.for_tokens()
    assert 0 < S.cost(10).bytes < S.cost(100).bytes and S.cost_of_adding().bytes > 0
    assert 0 < S.cost_of_dx(10).bytes < S.cost_of_dx(100).bytes


CHOICES = [
    Choice(False, False, False),
    Choice(False, False, True),
    Choice(True, False, False),
    Choice(False, True, False),
    Choice(True, True, True),
]


def reference(x, W, b, g, R, delta):
    M = W if R is None else W @ R.dense()
    M = M if delta is None else M + delta.dense()
    return F.linear(x, M if g is None else g.unsqueeze(-1) * M, b)


SLOTS = [(None, d) for d in DELTAS] + [(r, None) for r in ROTATIONS] + [("blocks", "low rank"), (None, None)]


@pytest.mark.parametrize("has_g", [False, True])
# A rotation's own gradient needs (g W)ᵀ dy, so there is nothing to choose in its backward.
@pytest.mark.parametrize(
    ("choice", "R", "delta"), [(c, R, delta) for c in CHOICES for R, delta in SLOTS if R is None or not c.merged_backward]
)
def test_the_node_is_the_dense_formula_and_so_are_its_gradients(choice, has_g, R, delta):
    W, x, b = t(6, 8), t(2, 5, 8).requires_grad_(), t(6).requires_grad_()
    g = (t(6) + 3).requires_grad_() if has_g else None
    R = None if R is None else leaves(ROTATIONS[R])
    delta = None if delta is None else leaves(DELTAS[delta])
    wanted = [v for v in (x, b, g) if v is not None] + [v for S in (R, delta) if S is not None for v in S.tensors()]
    theirs = reference(x, W, b, g, R, delta)
    scaled = delta if g is None or delta is None else op.Product(op.Diagonal(g.detach()), delta)
    ours = linear_in_one_node(
        x, W, b, g, None if R is None else R.for_tokens(), None if scaled is None else scaled.for_tokens(), choice, D, 0.0, "reader"
    )
    torch.testing.assert_close(ours, theirs)
    dy = t(2, 5, 6)
    torch.testing.assert_close(torch.autograd.grad(ours, wanted, dy), torch.autograd.grad(theirs, wanted, dy))


@pytest.mark.parametrize("name", ["low rank", "kronecker"])
def test_gradcheck(name):
    delta, x, W = leaves(DELTAS[name]), t(3, 8).requires_grad_(), t(6, 8)
    run = lambda x, *ts: linear_in_one_node(x, W, None, None, None, delta.with_tensors(ts), Choice(), D, 0.0, "reader")  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, *delta.tensors()))


@pytest.mark.parametrize("edit", [lambda y: y.add_(1.0), lambda y: y.relu_(), lambda y: y.mul_(2.0)], ids=["add", "relu", "mul"])
@pytest.mark.parametrize("retain", [False, True])
def test_row_factors_survive_an_edit_of_the_output(edit, retain):
    W, b, x, g, delta = t(6, 8), t(6), t(5, 8).requires_grad_(), (t(6) + 3).requires_grad_(), leaves(LOW)
    theirs = edit(reference(x, W, b, g, None, delta) * 1.0)
    scaled = op.Product(op.Diagonal(g.detach()), delta).for_tokens()
    ours = edit(linear_in_one_node(x, W, b, g, None, scaled, Choice(), D, 0.0, "reader"))
    wanted = [x, g, *delta.tensors()]
    expected = torch.autograd.grad(theirs.square().sum(), wanted)
    for again in range(1 + retain):
        torch.testing.assert_close(torch.autograd.grad(ours.square().sum(), wanted, retain_graph=retain and not again), expected)


def test_dropped_numbers_are_not_seen_by_the_change_alone():
    W, b, delta = t(6, 8), t(6), leaves(LOW)
    x = t(4, 8).requires_grad_()
    ours = linear_in_one_node(x, W, b, None, None, delta, Choice(), D, 0.3, "reader")
    keep = x._veneer_mask[0].draw().keep(D)
    theirs = F.linear(x, W, b) + (x * keep / 0.7) @ delta.dense().mT
    torch.testing.assert_close(ours, theirs)
    wanted = [x, *delta.tensors()]
    torch.testing.assert_close(torch.autograd.grad(ours.square().sum(), wanted), torch.autograd.grad(theirs.square().sum(), wanted))


def test_small_inputs_are_split_and_large_ones_merged_where_rounding_allows():
    def at(tokens, dtype=torch.float32, device="cpu", may_merge=True):
        return Evaluation(tokens, (768, 768), torch.device(device), dtype, trains=True, may_merge=may_merge)

    low = op.LowRank(torch.zeros(768, 16), torch.zeros(16, 768))
    for device in ("cpu", "cuda"):
        few, many = (choose(Strategy.AUTO, at(n, device=device), False, None, low) for n in (1, 100_000))
        assert few == Choice() and many == Choice(True, True)
    assert choose(Strategy.AUTO, at(100_000, may_merge=False), True, None, low) == Choice()
    assert choose(Strategy.SPLIT, at(100_000), False, None, low) == Choice() and choose(Strategy.MERGED, at(1), False, None, low) == Choice(
        True, True
    )
    blocks = op.BlockDiagonal(torch.zeros(24, 32, 32))
    assert choose(Strategy.AUTO, at(100_000), True, blocks, None) == Choice(True, False, True)


class Products(TorchDispatchMode):
    """Counts matrix products, and notes the shapes of everything that is made."""

    def __init__(self):
        super().__init__()
        self.count, self.made = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.count += name in ("mm", "addmm", "addmm_", "bmm", "baddbmm")
        if isinstance(out, torch.Tensor):
            self.made.append(tuple(out.shape))
        return out


@pytest.mark.parametrize(
    ("delta", "forward", "backward"),
    [
        # W x, A x, + B h;  Wᵀ dy, Bᵀ dy, dx + Aᵀ dh, dA, dB
        (op.LowRank(torch.randn(48, 2), torch.randn(2, 64)), 3, 5),
        # the vec trick: W x, T, S;  Wᵀ dy, U = Sᵀ dY, U T, dT, X Tᵀ, dS
        (op.Kronecker(op.Dense(torch.randn(6, 8)), op.Dense(torch.randn(8, 8))), 3, 6),
    ],
    ids=["low rank", "kronecker"],
)
def test_a_split_change_makes_so_many_products_and_no_dense_matrix(delta, forward, backward):
    W, x, delta = torch.randn(48, 64), torch.randn(10, 64, requires_grad=True), leaves(delta)
    with Products() as seen:
        y = linear_in_one_node(x, W, None, None, None, delta, Choice(), torch.float32, 0.0, "reader")
        assert seen.count == forward
        y.sum().backward()
    assert seen.count == forward + backward
    assert not {(48, 64), (64, 48)} & set(seen.made) - {tuple(W.mT.shape)}  # a view of W, to multiply by its transpose


def test_a_merged_change_makes_one_product_each_way_and_those_of_its_factors():
    W, x = torch.randn(48, 64), torch.randn(10, 64, requires_grad=True)
    delta = leaves(op.LowRank(torch.randn(48, 2), torch.randn(2, 64)))
    with Products() as seen:
        y = linear_in_one_node(x, W, None, None, None, delta, Choice(True, True), torch.float32, 0.0, "reader")
        assert seen.count == 2  # W + B A, W' x
        y.sum().backward()
    assert seen.count == 2 + 2 + 4  # W + B A, W'ᵀ dy;  A x, Bᵀ dy, dA, dB


def test_scrambled_numbers_are_those_of_splitmix64():
    def splitmix(i, seed):
        z = (i * 0x9E3779B97F4A7C15 + seed) % 2**64
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
        return z ^ (z >> 31)

    n = 1 << 17
    found = scrambled(12345, n, torch.device("cpu")).tolist()
    for i in (0, 1, 2, n // 2, n - 1):
        assert found[i] % 2**64 == splitmix(i, 12345)
    assert len(set(found)) == n


def test_every_byte_of_a_mask_is_uniform_and_masks_are_independent_of_each_other_and_of_their_own_shifts():
    first, second = tables(torch.device("cpu"))
    for table in (first, second):
        assert table[:LENGTH].equal(table[LENGTH:])
        assert table[:LENGTH].bincount(minlength=256).eq(LENGTH // 256).all()  # so a sum from a random place on is uniform, exactly
    torch.manual_seed(0)
    p, n = 0.25, 1 << 19  # twice the length of the tables
    masks = [1 - Mask(n // 256, 256, p, torch.device("cpu")).draw().keep(torch.float64).flatten() for _ in range(6)]
    spread = (p * (1 - p)) ** 0.5
    for i, mask in enumerate(masks):
        others = [mask.roll(shift) for shift in (1, 7, 256, 768, LENGTH)] + masks[:i]
        for other in others:
            correlation = ((mask - p) * (other - p)).mean().item() / spread**2
            assert abs(correlation) < 5 / n**0.5


@pytest.mark.parametrize("p", [0.001, 0.1, 0.5, 0.999])
def test_a_mask_drops_the_share_that_was_asked_for(p):
    torch.manual_seed(0)
    rows = torch.stack([Mask(1000, 96, p, torch.device("cpu")).draw().keep(torch.float32) for _ in range(10)])
    wanted = 1 - p
    assert abs(rows.mean().item() - wanted) < 5 * (p * wanted / rows.numel()) ** 0.5 + 1e-3
    columns = rows.mean((0, 1))
    assert (columns - wanted).abs().max() < 6 * (p * wanted / 10_000) ** 0.5 + 1e-3


def test_a_mask_is_held_for_the_next_reader_of_its_input_and_no_longer():
    x, other = torch.randn(8, 16), torch.randn(8, 16)
    _, first = mask_of(x, 0.5, "query")
    assert mask_of(x, 0.5, "key")[1] is first
    held = weakref.ref(first)
    del first
    assert held() is not None
    seen = mask_of(x, 0.5, "value")[1].keep(torch.float32).clone()
    mask_of(other, 0.5, "query")
    assert held() is None  # though x lives, as an input does that is kept for backward
    assert torch.equal(mask_of(x, 0.5, "output")[1].keep(torch.float32), seen)  # drawn again, the same numbers
    last = weakref.ref(mask_of(x, 0.5, "gate")[1])
    assert last() is not None
    del x
    assert last() is None


def test_an_edited_input_gets_a_mask_of_its_own():
    x = torch.randn(8, 16)
    before = mask_of(x, 0.5, "query")[1].of(x, slice(None))
    x.mul_(2)
    after = mask_of(x, 0.5, "key")[1].of(x, slice(None))
    assert set((after / x).unique().tolist()) <= {0.0, 1.0} and not torch.equal(before, after)


def test_dropout_runs_in_inference_mode():
    W, delta = torch.randn(6, 8), op.LowRank(torch.randn(6, 2), torch.randn(2, 8))
    with torch.inference_mode():
        x = torch.randn(4, 8)
        found = [linear_in_one_node(x, W, None, None, None, delta, Choice(), torch.float32, 0.5, reader) for reader in "ab"]
    assert not torch.equal(*found) and all(y.isfinite().all() and not torch.equal(y, x @ W.mT) for y in found)
