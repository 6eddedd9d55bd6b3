"""A linear classifier on frozen features."""

import torch
from torch import Tensor

PENALTIES = tuple(10.0**power for power in range(-4, 5))


def linear_probe_accuracy(
    train_features: Tensor,
    train_labels: Tensor,
    test_features: Tensor,
    test_labels: Tensor,
    *,
    penalties: tuple[float, ...] = PENALTIES,
) -> float:
    """Accuracy of a ridge regression on +-1 targets, one a class, the largest of which is the answer.

    Closed form, so that two calls give the same number. The features are standardised by the training part; the
    penalty is the one with the smallest squared error of leaving one row out, which the hat matrix gives for all rows
    at once (Hastie, Tibshirani and Friedman, 2009, section 7.10.1). It is scikit-learn's `RidgeClassifierCV` on
    standardised features; CLIP's own linear probes are logistic regressions, whose numbers are a little higher.

    Args:
        train_features: (N, H). test_features: (M, H). Any floating type; the computation is in fp64, takes
            N x H + H x H numbers beside them, and runs whole on every process that calls.
        train_labels: (N,) integers. test_labels: (M,) integers.
        penalties: to choose from, on features of unit variance; each > 0.

    Returns:
        The share of the test rows that are classified right, in [0, 1].

    Raises:
        ValueError: fewer than two training rows or classes.
    """
    classes, targets = train_labels.unique(return_inverse=True)
    if len(train_features) < 2 or len(classes) < 2:
        raise ValueError(
            f"A linear probe needs two classes to learn; {len(train_features)} rows of {len(classes)} are given."
        )
    mean, deviation = train_features.double().mean(dim=0), train_features.double().std(dim=0, correction=0)
    deviation = deviation.where(deviation > 0, 1.0)
    train, test = ((features.double() - mean) / deviation for features in (train_features, test_features))
    targets = torch.nn.functional.one_hot(targets, len(classes)).double() * 2 - 1
    offset = targets.mean(dim=0)
    weights = _ridge(train, targets - offset, penalties)
    found = classes[(test @ weights + offset).argmax(dim=1)]
    return (found == test_labels.to(found.device)).double().mean().item()


def _ridge(features: Tensor, targets: Tensor, penalties: tuple[float, ...]) -> Tensor:
    """(H, K) weights for centred features (N, H) and targets (N, K), with the best of the penalties."""
    eigenvalues, basis = torch.linalg.eigh(features.T @ features)
    eigenvalues = eigenvalues.clamp(min=0)
    rotated = features @ basis
    moments = rotated.T @ targets
    best, smallest = None, torch.inf
    for penalty in penalties:
        shrunk = moments / (eigenvalues + penalty)[:, None]
        # The intercept has a leverage of 1 / N in every row.
        leverage = (rotated.square() / (eigenvalues + penalty)).sum(dim=1) + 1 / len(features)
        error = ((targets - rotated @ shrunk) / (1 - leverage).clamp(min=1e-12)[:, None]).square().mean().item()
        if error < smallest:
            best, smallest = shrunk, error
    return basis @ (best if best is not None else shrunk)
