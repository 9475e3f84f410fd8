"""Every operator against its dense matrix."""

from __future__ import annotations

import pytest
import torch

from veneer import operators as op
from veneer.form import Form

A, B, M = torch.randn(2, 5, dtype=torch.float64), torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
OPERATORS = {
    "low rank": op.LowRank(B, A),
    "dense": op.Dense(M),
    "diagonal": op.Diagonal(torch.randn(5, dtype=torch.float64)),
    "sum": op.LowRank(B, A) + op.Dense(M),
    "scaled": 0.5 * (op.LowRank(B, A) + 3.0 * op.Dense(M)),
}


@pytest.fixture(params=OPERATORS.values(), ids=OPERATORS)
def S(request) -> op.Operator:
    return request.param


def test_apply_is_multiplication_by_the_dense_matrix(S):
    x = torch.randn(3, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(S.apply(x), x @ S.dense().mT)
    y = torch.randn(3, 2, S.shape[0], dtype=torch.float64)
    torch.testing.assert_close(S.add_to(y.clone(), x), y + S.apply(x))


def test_shape_transpose_scale_and_products(S):
    assert S.dense().shape == S.shape
    torch.testing.assert_close(S.transpose().dense(), S.dense().mT)
    torch.testing.assert_close((2.5 * S).dense(), 2.5 * S.dense())
    left, right = torch.randn(S.shape[1], 3, dtype=torch.float64), torch.randn(3, S.shape[0], dtype=torch.float64)
    torch.testing.assert_close(S.left_of(left), S.dense() @ left)
    torch.testing.assert_close(S.right_of(right), right @ S.dense())


def test_row_statistics(S):
    W = torch.randn(S.shape, dtype=torch.float64)
    torch.testing.assert_close(S.row_dot(W), (S.dense() * W).sum(-1))
    torch.testing.assert_close(S.row_dot(op.Dense(W)), (S.dense() * W).sum(-1))
    torch.testing.assert_close(S.squared_row_norms(), S.dense().square().sum(-1))


def test_stacked_operators_act_one_per_sample(S):
    other = S.map(lambda t: t + 1)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    both = op.stack([S, other])
    torch.testing.assert_close(both.apply(x), torch.stack([S.apply(x[0]), other.apply(x[1])]))
    y = torch.randn(2, 7, S.shape[0], dtype=torch.float64)
    torch.testing.assert_close(both.add_to(y.clone(), x), torch.stack([S.add_to(y[0].clone(), x[0]), other.add_to(y[1].clone(), x[1])]))
    swapped = both.map(lambda t: t[torch.tensor([1, 0])])
    torch.testing.assert_close(swapped.apply(x), torch.stack([other.apply(x[0]), S.apply(x[1])]))


def test_costs_count_multiplications(S):
    assert S.cost(10).flops > 0 and S.cost(20).flops == 2 * S.cost(10).flops and S.cost(10, 2).bytes * 2 == S.cost(10, 4).bytes


def test_the_normal_form_refuses_what_it_cannot_say():
    class W:
        form = Form(4, 5)

        def dense(self):
            return M

    start = op.Adapted(W())
    scaled = op.compose(op.Diagonal(torch.ones(4)), start + op.LowRank(B, A))
    with pytest.raises(TypeError, match="before it multiplies from the left"):
        scaled + op.LowRank(B, A)
    twice = op.compose(op.Diagonal(2 * torch.ones(4)), scaled)
    torch.testing.assert_close(twice.dense(), 2 * scaled.dense())
    with pytest.raises(TypeError, match="from the right before anything else"):
        op.compose(start + op.LowRank(B, A), op.Diagonal(torch.ones(5)))
    with pytest.raises(TypeError, match="one equation and one operator"):
        op.compose(start, start)
    rotated = op.compose(start, op.Diagonal(torch.arange(5.0, dtype=torch.float64))) + op.Dense(M)
    torch.testing.assert_close(rotated.dense(), M @ torch.diag(torch.arange(5.0, dtype=torch.float64)) + M)


@pytest.mark.parametrize("make", [lambda u: op.skew(u, 4), *(lambda u, n=n: op.cayley_neumann(u, 4, n) for n in range(1, 7)), lambda u: op.cayley(op.skew(u, 4))],
                         ids=["skew", *(f"series of {n}" for n in range(1, 7)), "cayley"])  # fmt: skip
def test_rotations_have_the_gradients_of_finite_differences(make):
    upper = (0.3 * torch.randn(2, 6, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(make, upper) and torch.autograd.gradgradcheck(make, upper)
