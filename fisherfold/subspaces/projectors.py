"""Projectors of a layer's input that cost the loss least: FASC's objectives and their minimisers.

A projector P of rank k replaces x by P x. To first order the loss changes by gᵀ(I − P)x at every token, g = ∂L/∂x, so

    f(M) = E[(gᵀ M x)²],   M = I − P                                                                       empirical
    f(M) = (tr M S_xg)² + tr(M S_xx Mᵀ S_gg) + tr(M S_xg M S_xg)          gaussian: Isserlis' theorem for jointly normal x, g

In a basis of the input, L R = I with columns l_i and rows r_i, P keeps some components: P = Σ_kept l_i r_i. Dropping the set D
costs f = Σ_{i,j in D} K_ij with the coupling K_ij = E[z_i z_j], z_i = (gᵀ l_i)(r_i x): one matrix gives the loss of every choice.
So every minimiser is a basis whose first k components are kept. It is orthonormal (R = Lᵀ) or oblique (R = L⁻¹).

The middle term alone has nested minimisers among oblique projectors: balanced truncation (FASC is then the kfac metric applied to the
identity map). The whole objectives have not: they are minimised at one rank, and the
components on both sides of it are put in the order in which dropping the next one costs least.

Source: FASC's objective as METHODS section 4 states it. Shapes: m inputs, x [N, m], g [N, m], L [m, r], R [r, m].
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import torch
from scipy.optimize import minimize

from fisherfold.linalg.weighted_svd import MetricRoot
from fisherfold.statistics.input_gradients import Moments

Tokens = Iterator[tuple[torch.Tensor, torch.Tensor]]
"""x and g [N', m] of some tokens at a time."""

TINY = 1e-12  # relative size of a scale that rounding alone can produce
NEGLIGIBLE = 1e-12  # share of the loss of dropping everything that is not worth a descent


@dataclass(frozen=True)
class Basis:
    """left [m, r] and right [r, m] with right @ left = I; the first k give the projector left[:, :k] @ right[:k]."""

    left: torch.Tensor
    right: torch.Tensor

    def projector(self, rank: int) -> torch.Tensor:
        """P [m, m]."""
        return self.left[:, :rank] @ self.right[:rank]

    def pick(self, components: Sequence[int] | slice | torch.Tensor) -> "Basis":
        """These components alone, in this order."""
        return Basis(self.left[:, components], self.right[components])

    def within(self, outer: "Basis") -> "Basis":
        """This basis of the coordinates of `outer`, in the coordinates that `outer` is given in."""
        return Basis(outer.left @ self.left, self.right @ outer.right)

    @staticmethod
    def join(first: "Basis", second: "Basis") -> "Basis":
        """The components of both."""
        return Basis(torch.cat([first.left, second.left], 1), torch.cat([first.right, second.right]))


class Objective(Protocol):
    """f(M), in some coordinates of the input."""

    def inside(self, basis: Basis) -> "Objective":
        """The same in the coordinates R x of a basis (of some components: for errors inside their span)."""

    def loss_and_gradient(self, M: torch.Tensor) -> tuple[float, torch.Tensor]:
        """f(M) and ∂f/∂M [m, m]."""

    def coupling(self) -> torch.Tensor:
        """K [m, m] of the coordinates."""

    def variances(self) -> tuple[torch.Tensor, torch.Tensor]:
        """E[x_i²] and E[g_i²], each [m]."""


@dataclass(frozen=True)
class Gaussian:
    """The objective of jointly normal x and g, from their second moments."""

    moments: Moments

    def inside(self, basis: Basis) -> "Gaussian":
        """The same objective for errors inside a subspace."""
        L, R = basis.left, basis.right
        xx, xg, gg = self.moments.xx, self.moments.xg, self.moments.gg
        return Gaussian(Moments(R @ xx @ R.T, R @ xg @ L, L.T @ gg @ L))

    def loss_and_gradient(self, M: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The objective at M = I − P, and its gradient in M."""
        xx, xg, gg = self.moments.xx, self.moments.xg, self.moments.gg
        mean = (M * xg.T).sum()
        weighted, crossed = gg @ M @ xx, (xg @ M @ xg).T
        loss = mean**2 + (M * weighted).sum() + (M * crossed).sum()
        return loss.item(), 2 * (mean * xg.T + weighted + crossed)

    def coupling(self) -> torch.Tensor:
        """S_xg, [m, m]."""
        xx, xg, gg = self.moments.xx, self.moments.xg, self.moments.gg
        return torch.outer(xg.diagonal(), xg.diagonal()) + xx * gg + xg * xg.T

    def variances(self) -> tuple[torch.Tensor, torch.Tensor]:
        """S_xx and S_gg, [m, m] each."""
        return self.moments.xx.diagonal(), self.moments.gg.diagonal()


@dataclass(frozen=True)
class Empirical:
    """The objective itself over sampled tokens, which `tokens()` reads once more for every evaluation."""

    tokens: Callable[[], Tokens]

    def inside(self, basis: Basis) -> "Empirical":
        """The same objective for errors inside a subspace."""
        return Empirical(lambda: ((x @ basis.right.T, g @ basis.left) for x, g in self.tokens()))

    def loss_and_gradient(self, M: torch.Tensor) -> tuple[float, torch.Tensor]:
        """The objective at M = I − P over the sampled tokens, and its gradient in M."""
        loss, gradient, count = 0.0, torch.zeros_like(M), 0
        for x, g in self.tokens():
            z = ((x @ M.T) * g).sum(1)
            loss += z.square().sum().item()
            gradient += (z[:, None] * g).T @ x
            count += len(x)
        return loss / count, 2 * gradient / count

    def coupling(self) -> torch.Tensor:
        """S_xg, [m, m], of the sampled tokens."""
        return _mean(self.tokens(), lambda x, g: (x * g).T @ (x * g))

    def variances(self) -> tuple[torch.Tensor, torch.Tensor]:
        """S_xx and S_gg, [m, m] each, of the sampled tokens."""
        squares = _mean(self.tokens(), lambda x, g: torch.stack([x.square().sum(0), g.square().sum(0)]))
        return squares[0], squares[1]


def _mean(tokens: Tokens, sums: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The mean over all tokens of what `sums` adds up over some of them."""
    total: torch.Tensor | float = 0.0
    count = 0
    for x, g in tokens:
        total, count = total + sums(x, g), count + len(x)
    return cast(torch.Tensor, total / count)


def variance_basis(moments: Moments) -> Basis:
    """The principal components of x: eigenvectors of S_xx, largest first."""
    vectors = _eigenvectors(moments.input_root).flip(1)
    return Basis(vectors, vectors.T)


def balanced_basis(moments: Moments) -> Basis:
    """Nested minimisers of tr(M S_xx Mᵀ S_gg) among oblique projectors: balanced truncation, the weighted SVD of the identity.

    With S_xx = R Rᵀ and eigenvectors V of Rᵀ S_gg R, largest first: L = R V, so E[(Vᵀ R⁻¹ x)(…)ᵀ] = I and Lᵀ S_gg L is diagonal.
    """
    forward, backward = _root_and_inverse(moments)
    return _sorted_basis(forward, backward, forward.T @ moments.gg @ forward)


def printed_basis(moments: Moments, orthonormal: bool) -> Basis:
    """S_xg S_gg S_xgᵀ v = λ S_xx v, largest λ first, as FASC prints it (S_xx with its damping in it).

    The orthonormal projector of rank k is that on the span of v_1 … v_k; the oblique one reads Vᵀ x and restores x by least
    squares, L = S_xx V.

    Raises:
        NumericalError: S_xx is not positive semi-definite.
    """
    forward, backward = _root_and_inverse(moments)
    half = backward @ moments.xg
    basis = _sorted_basis(forward, backward, half @ moments.gg @ half.T)
    if not orthonormal:
        return basis
    Q = torch.linalg.qr(basis.right.T).Q
    return Basis(Q, Q.T)


def _root_and_inverse(moments: Moments) -> tuple[torch.Tensor, torch.Tensor]:
    """R and R⁻¹ [m, m]; directions in which x is zero are given a variance that rounding could."""
    root = moments.input_root
    vectors, scales = _eigenvectors(root), cast(torch.Tensor, root.scales)
    scales = scales.clamp(min=TINY * max(scales.max().item(), TINY))
    return vectors * scales, (vectors / scales).T


def _eigenvectors(root: MetricRoot) -> torch.Tensor:
    """Of a root that is neither diagonal nor the identity, as E[x xᵀ] never is."""
    return cast(torch.Tensor, root.vectors)


def _sorted_basis(forward: torch.Tensor, backward: torch.Tensor, weighted: torch.Tensor) -> Basis:
    """R V and Vᵀ R⁻¹ for the eigenvectors V of a symmetric matrix, largest first."""
    vectors = torch.linalg.eigh((weighted + weighted.T) / 2).eigenvectors.flip(1)
    return Basis(forward @ vectors, vectors.T @ backward)


def orthonormal_bases(moments: Moments) -> list[Basis]:
    """Orthonormal bases to start from: of x, of both, and those of the balanced basis made orthonormal."""
    balanced = balanced_basis(moments)
    product = moments.xx @ moments.gg
    found = [torch.linalg.eigh(product + product.T).eigenvectors.flip(1)]
    found += [torch.linalg.qr(side).Q for side in (balanced.left, balanced.right.T)]
    return [variance_basis(moments), *(Basis(vectors, vectors.T) for vectors in found)]


def greedy_order(coupling: torch.Tensor) -> tuple[list[int], list[float]]:
    """The order in which to keep components, and the loss of keeping 0, 1, … of them.

    Found from the end: of those still kept, the one that adds least to the loss is dropped next.
    """
    K = coupling.cpu().numpy()
    added = K.diagonal().copy()  # to the loss, by dropping a component now
    dropped, losses = [], [0.0]
    kept = np.ones(len(K), bool)
    for _ in range(len(K)):
        worst = int(np.where(kept, added, np.inf).argmin())
        kept[worst] = False
        dropped.append(worst)
        losses.append(losses[-1] + added[worst])
        added += 2 * K[worst]
    return dropped[::-1], [max(0.0, loss) for loss in losses[::-1]]


def nested(objective: Objective, basis: Basis, rank: int, rotate: Callable[[Basis], Basis] | None = None) -> Basis:
    """The basis with its first `rank` components, and the others, in greedy order.

    `rotate` gives axes for each side first, a basis of that side's coordinates.
    """
    sides = [basis.pick(slice(0, rank)), basis.pick(slice(rank, None))]
    ordered = []
    for side in sides:
        if len(side.right) and rotate:
            side = rotate(side).within(side)
        if len(side.right):
            side = side.pick(greedy_order(objective.inside(side).coupling())[0])
        ordered.append(side)
    return Basis.join(*ordered)


def losses(objective: Objective, basis: Basis) -> torch.Tensor:
    """f of keeping the first 0, 1, …, r components [r + 1], of a basis of all m (r = m) or of those that matter."""
    K = objective.inside(basis).coupling()
    own = K.diagonal()
    added = own + 2 * K.triu(1).sum(1)  # what component i adds when all later ones are dropped already
    return torch.cat([added.flip(0).cumsum(0).flip(0), added.new_zeros(1)]).clamp(min=0)


def best_start(objective: Objective, bases: Iterable[Basis], rank: int) -> Basis:
    """The basis, as it is or in greedy order, whose projector of this rank costs least."""
    found = [option for basis in bases for option in _orders(objective, basis, rank)]
    return min(found, key=lambda option: option[0])[1]


def _orders(objective: Objective, basis: Basis, rank: int) -> list[tuple[float, Basis]]:
    K = objective.inside(basis).coupling()
    order, cost = greedy_order(K)
    return [(K[rank:, rank:].sum().item(), basis), (cost[rank], basis.pick(order))]


def descend(objective: Objective, basis: Basis, rank: int, steps: int, orthonormal: bool) -> Basis:
    """A basis whose projector of this rank costs no more than that of `basis`, after at most `steps` L-BFGS steps.

    In the coordinates of the given basis projectors near that of the first k components are

        P = [I; X] (I + Y X)⁻¹ [I, Y],   X [m − k, k],  Y [k, m − k],  Y = Xᵀ if orthonormal (the basis must be, too),

    and steps are scaled by the curvature that tr(M S_xx Mᵀ S_gg) has in X and Y. Deterministic; never worse than its start.
    """
    size = len(basis.right)
    if steps == 0 or rank in (0, size):
        return basis
    inside = objective.inside(basis)
    K = inside.coupling()
    if K[rank:, rank:].sum() <= NEGLIGIBLE * K.sum():
        return basis
    scales = _step_scales(inside, rank, orthonormal)
    shapes = [(size - rank, rank), (rank, size - rank)][: len(scales)]

    def unpack(values: np.ndarray) -> list[torch.Tensor]:
        parts = torch.from_numpy(values).to(basis.left).split([scale.numel() for scale in scales])
        return [part.view(shape) * scale for part, shape, scale in zip(parts, shapes, scales)]

    def evaluate(values: np.ndarray) -> tuple[float, np.ndarray]:
        parts = [part.requires_grad_() for part in unpack(values)]
        P = _projector(parts[0], parts[-1].T if orthonormal else parts[-1])
        loss, gradient = inside.loss_and_gradient(torch.eye(size).to(P) - P.detach())
        P.backward(-gradient)
        slopes = [(cast(torch.Tensor, part.grad) * scale).flatten() for part, scale in zip(parts, scales)]
        return loss / unit, torch.cat(slopes).cpu().double().numpy() / unit

    unit = 1.0
    unit = evaluate(np.zeros(sum(scale.numel() for scale in scales)))[0] or 1.0
    start = np.zeros(sum(scale.numel() for scale in scales))
    found = minimize(evaluate, start, jac=True, method="L-BFGS-B", options={"maxiter": steps, "maxcor": 10})
    if not found.fun < 1.0:
        return basis
    parts = unpack(found.x)
    return _moved(parts[0], parts[-1].T if orthonormal else parts[-1], orthonormal).within(basis)


def _step_scales(inside: Objective, rank: int, orthonormal: bool) -> list[torch.Tensor]:
    """The root of the inverse curvature of every entry of X, and of Y if it is free."""
    x, g = inside.variances()
    to_dropped, to_kept = torch.outer(g[rank:], x[:rank]), torch.outer(g[:rank], x[rank:])
    curvatures = [to_dropped + to_kept.T] if orthonormal else [to_dropped, to_kept]
    return [(each + 1e-3 * each.mean() + torch.finfo(each.dtype).tiny).rsqrt() for each in curvatures]


def _sides(X: torch.Tensor, Y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    identity = torch.eye(X.shape[1]).to(X)
    return torch.cat([identity, X]), torch.cat([identity, Y], 1)


def _projector(X: torch.Tensor, Y: torch.Tensor) -> torch.Tensor:
    L, R = _sides(X, Y)
    return L @ torch.linalg.solve(torch.eye(X.shape[1]).to(X) + Y @ X, R)


def _moved(X: torch.Tensor, Y: torch.Tensor, orthonormal: bool) -> Basis:
    """A complete basis whose first k components give the projector of X and Y."""
    L, _ = _sides(X, Y)
    if orthonormal:
        Q = torch.linalg.qr(L, mode="complete").Q
        return Basis(Q, Q.T)
    rest = torch.eye(X.shape[0]).to(X)
    left = torch.cat([L, torch.cat([-Y, rest])], 1)  # R (-Y; I) = 0
    return Basis(left, torch.linalg.inv(left))
