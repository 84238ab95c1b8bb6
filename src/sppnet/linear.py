"""The convex pieces that are fitted on frozen features: linear SVMs with hard-negative mining, box regression.

Features are long and examples few, so both are solved in their dual form: an SVM through the matrix of inner
products of its examples, a ridge regression through scikit-learn's kernel route. Nothing here knows images.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from sppnet.boxes import FloatArray

FloatVector = npt.NDArray[np.float32]


@dataclass(frozen=True)
class MiningSettings:
    """Settings of the linear SVMs and their hard-negative mining (paper section 4.1, released code).

    Attributes
    ----------
    C : float
        Weight of the hinge loss against ``|w|^2 / 2``.
    positive_weight : float
        Weight of a positive's loss relative to a negative's.
    hard : float
        A negative that scores above this joins the training set.
    easy : float
        A negative that scores below this after a training leaves it.
    retrain : int
        A class is trained anew when this many negatives have joined it.
    """

    C: float = 1e-3
    positive_weight: float = 2.0
    hard: float = -1.0001
    easy: float = -1.2
    retrain: int = 2000


@dataclass
class _Pool:
    """The windows that are in some class's training set, with their inner products.

    Attributes
    ----------
    features : (n, D) float16 tensor
    gram : (n, n) float32 tensor of inner products
    signs : (n, K) int8
        1 for a positive of the class, -1 for a negative, 0 for neither.
    """

    features: Tensor
    gram: Tensor
    signs: npt.NDArray[np.int8]
    waiting: list[tuple[Tensor, npt.NDArray[np.int8]]] = field(default_factory=list)

    @classmethod
    def of(cls, features: Tensor, signs: npt.NDArray[np.int8]) -> _Pool:
        pool = cls(features[:0].half(), torch.zeros(0, 0), signs[:0])
        pool.waiting.append((features.half(), signs))
        pool.join()
        return pool

    def join(self) -> None:
        """Take in the waiting windows and drop those that no class needs any more."""
        used = self.signs.any(axis=1)
        kept = torch.from_numpy(np.flatnonzero(used))
        features, gram = self.features[kept], self.gram[kept][:, kept]
        new = torch.cat([f for f, _ in self.waiting]) if self.waiting else features[:0]
        self.features = torch.cat([features, new])
        cross = _products(new, self.features)
        n, m = len(features), len(self.features)
        self.gram = torch.empty(m, m)
        self.gram[:n, :n], self.gram[n:], self.gram[:n, n:] = gram, cross, cross[:, :n].T
        self.signs = np.concatenate([self.signs[used], *(s for _, s in self.waiting)])
        self.waiting = []


def _products(a: Tensor, b: Tensor, block: int = 1024) -> Tensor:
    """Return the (A, B) float32 inner products of half-precision rows, a block of rows at a time."""
    out = torch.empty(len(a), len(b))
    wide = a.float()
    for start in range(0, len(b), block):
        torch.mm(wide, b[start : start + block].float().T, out=out[:, start : start + block])
    return out


def fit_hinge(
    gram: FloatArray, signs: npt.NDArray[np.int8], C: float, positive_weight: float
) -> tuple[FloatVector, float]:
    """Fit one linear SVM from inner products.

    Minimises ``|w|^2 / 2 + C (positive_weight * sum hinge(positives) + sum hinge(negatives))`` with LIBSVM.
    The bias is free; the released code's liblinear punishes it by ``(b / 10)^2 / 2``.

    Parameters
    ----------
    gram : (n, n) float array
    signs : (n,) int8 of 1 and -1
    C, positive_weight : float

    Returns
    -------
    (n,) float32, float
        Coefficients ``a`` and bias ``b``: the score of x is ``sum a_i <x_i, x> + b``.

    Raises
    ------
    ValueError
        If one of the two signs is missing.
    """
    from sklearn.svm import SVC

    if not (signs > 0).any() or not (signs < 0).any():
        raise ValueError(
            f"an SVM needs examples of both signs, found {(signs > 0).sum()} positive of {len(signs)}"
        )
    svm = SVC(C=C, kernel="precomputed", class_weight={1: positive_weight}, cache_size=1000)
    svm.fit(gram, signs)
    coefficients = np.zeros(len(signs), dtype=np.float32)
    coefficients[svm.support_] = svm.dual_coef_[0]
    return coefficients, float(svm.intercept_[0])


@dataclass(frozen=True)
class LinearSVMs:
    """One-vs-rest linear scorers: ``scores = features @ weights.T + biases``.

    Attributes
    ----------
    weights : (K, D) float32
    biases : (K,) float32
    """

    weights: FloatVector
    biases: FloatVector

    def __call__(self, features: Tensor) -> FloatVector:
        """Return the (R, K) scores of (R, D) float32 features."""
        result: FloatVector = (
            features @ torch.from_numpy(self.weights).T + torch.from_numpy(self.biases)
        ).numpy()
        return result


def mine_hard_negatives(
    positives: Tensor,
    labels: npt.NDArray[np.int64],
    start: Tensor,
    start_negative: npt.NDArray[np.bool_],
    candidates: Iterable[tuple[Tensor, npt.NDArray[np.bool_]]],
    settings: MiningSettings = MiningSettings(),  # noqa: B008
) -> LinearSVMs:
    """Fit one SVM per class, going once through all negatives and keeping the hard ones (section 4.1).

    Parameters
    ----------
    positives : (P, D) tensor
        Features of the ground-truth windows of all classes.
    labels : (P,) int64
        Class index of each positive.
    start : (S, D) tensor
        Features that the first SVMs are trained with.
    start_negative : (S, K) bool
        For which classes each of them is a negative.
    candidates : iterable of ((R, D) float32 tensor, (R, K) bool)
        Windows image by image, and for which classes each is a negative. Consumed once.
    settings : MiningSettings

    Returns
    -------
    LinearSVMs

    Raises
    ------
    ValueError
        If a class has no positives or no negatives.
    """
    count = start_negative.shape[1]
    signs = np.concatenate([np.eye(count, dtype=np.int8)[labels], -start_negative.astype(np.int8)])
    pool = _Pool.of(torch.cat([positives.half(), start.half()]), signs)
    svms = LinearSVMs(np.zeros((count, positives.shape[1]), np.float32), np.zeros(count, np.float32))
    svms = _train(pool, svms, range(count), settings)
    fresh = np.zeros(count, dtype=np.int64)
    for features, negative in candidates:
        hard = negative & (svms(features) > settings.hard)
        chosen = np.flatnonzero(hard.any(axis=1))
        if len(chosen) == 0:
            continue
        pool.waiting.append((features[torch.from_numpy(chosen)].half(), -hard[chosen].astype(np.int8)))
        fresh += hard.sum(axis=0)
        due = np.flatnonzero(fresh > settings.retrain)
        if len(due):
            svms = _train(pool, svms, due, settings)
            fresh[due] = 0
    return _train(pool, svms, range(count), settings)


def _train(pool: _Pool, svms: LinearSVMs, classes: Iterable[int], settings: MiningSettings) -> LinearSVMs:
    """Retrain `classes` on the pool and let their easy negatives go."""
    pool.join()
    weights, biases = svms.weights.copy(), svms.biases.copy()
    for k in classes:
        members = np.flatnonzero(pool.signs[:, k])
        rows = torch.from_numpy(members)
        gram = pool.gram[rows][:, rows].numpy()
        coefficients, biases[k] = fit_hinge(
            gram, pool.signs[members, k], settings.C, settings.positive_weight
        )
        support = np.flatnonzero(coefficients)
        scores = gram[:, support] @ coefficients[support] + biases[k]
        weights[k] = _combine(coefficients[support], pool.features, members[support])
        easy = (pool.signs[members, k] < 0) & (scores < settings.easy)
        pool.signs[members[easy], k] = 0
    return LinearSVMs(weights, biases)


def _combine(
    coefficients: FloatVector, features: Tensor, rows: npt.NDArray[np.int64], block: int = 1024
) -> FloatVector:
    """Return the (D,) float32 sum of the given half-precision rows, weighted."""
    total = torch.zeros(features.shape[1])
    for start in range(0, len(rows), block):
        part = slice(start, start + block)
        total += torch.from_numpy(coefficients[part]) @ features[torch.from_numpy(rows[part])].float()
    result: FloatVector = total.numpy()
    return result


def fit_ridge(features: FloatArray, targets: FloatArray, penalty: float) -> tuple[FloatVector, FloatVector]:
    """Fit the box regression of one class: ridge on centred, whitened targets (section 4.1, released code).

    The targets are turned by ``T = V diag((D + 0.001)^-1/2) V'`` of their covariance, so that one penalty
    fits all four; the constant feature is punished like the others, as in the released code.

    Parameters
    ----------
    features : (n, D) float array
    targets : (n, 4) float array
    penalty : float
        lambda of the ridge.

    Returns
    -------
    (4, D) float32, (4,) float32
        Weights and offsets that predict unwhitened targets.
    """
    from sklearn.linear_model import Ridge

    mean = targets.mean(axis=0)
    centred = targets - mean
    values, vectors = np.linalg.eigh(centred.T @ centred / len(centred))
    root = np.sqrt(values + 1e-3)
    whiten, unwhiten = (vectors * (1 / root)) @ vectors.T, (vectors * root) @ vectors.T
    extended = np.concatenate([features, np.ones((len(features), 1), features.dtype)], axis=1)
    ridge = Ridge(alpha=penalty, fit_intercept=False, solver="cholesky")
    ridge.fit(extended, (centred @ whiten).astype(features.dtype))
    weights = unwhiten.T @ np.atleast_2d(ridge.coef_)
    return weights[:, :-1].astype(np.float32), (weights[:, -1] + mean).astype(np.float32)
