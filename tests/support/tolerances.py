"""Every tolerance of the suite, with its reason; a kind that is not listed raises."""

from __future__ import annotations

__all__ = ["tolerance"]

FORMULAS = {
    # One fp64 step against explicit factors: a handful of roundings of relative size 1e-16, amplified where
    # sqrt(c^2 + 4 w^2) cancels against 2 w.
    "factor step": 1e-12,
    # compose(split(w)) and identities of one expression in fp64: a few ulp.
    "identity": 1e-13,
    # A projection in fp64 by means and products of a few dozen terms against pinv.
    "projection": 1e-12,
    # Mechanically identical computations.
    "exact": 0.0,
    # A sum or product of a few fp32 numbers.
    "fp32": 1e-6,
    # Means of some hundreds of fp32 numbers in another order, or powers of a beta that fp32 has rounded.
    "fp32 mean": 1e-5,
    # Factors at another imbalance: their product, to which they cancel from up to 1e5 times its size, ...
    "rebalanced product": 1e-9,
    # ... and the differences of their squares, which cancel once more.
    "rebalanced differences": 1e-7,
    # Outputs of a folded fp64 network of up to six layers, whose matrix products are now of other sizes.
    "folded": 1e-10,
    # scipy.integrate.quad at its default absolute and relative error of 1.5e-8.
    "quadrature": 1.5e-8,
}

WHERE_TRAINING_ENDS = {
    # Objective gap relative to an independent convex solver run to 1e-12 or better.
    "convex gap": 1e-6,
    # The same on columns scaled over two decades.
    "scaled convex gap": 1e-4,
    # Adam at a constant lr of 1e-2 trembles around the optimum of 2 000 factor pairs instead of reaching it.
    "trembling gap": 1e-4,
    # Stationary points of scalar problems: the step's fixed point exactly, reached at a linear rate.
    "stationary": 1e-9,
    # Thresholds on the strength are located from both sides at +-1 %.
    "threshold": 0.01,
    # A critical strength measured after some thousand steps near the plane.
    "critical strength": 1e-4,
    # The scale of a weight on its plane, against 400 random ones.
    "typical scale": 0.1,
    # First-order laws (collapse time, signal-to-noise) hold up to O(lr) and finite c.
    "law": 0.05,
    # scikit-learn's share of zeros to a tenth of a percentage point.
    "share of zeros": 1e-3,
}

# A fused step in fp32 against fp64, in ulps of the terms that are added up (kernel_oracle.py says which).
KERNELS = {
    # Moments and imbalance take up to six roundings of half an ulp, or a sum of up to 512 positive numbers in as few
    # lanes as the compiler makes of it (largest seen: 1.9 ulp; 3.3 without optimization).
    "native state": 4.0,
    # Weights and factors add those of the bias corrections, a root, a division, the time scale and the retraction,
    # about twelve in all (largest seen: 3.1 ulp).
    "native weight": 4.0,
    # In the free gauge a given decay of the imbalance first splits each weight anew, by two more roots (4.1 ulp).
    "native rebalanced": 6.0,
    # In fp64 the reference rounds as often as the kernel does, and sums in another order (2.7 and 4.0 ulp).
    "native state, fp64": 4.0,
    "native weight, fp64": 6.0,
    # The Triton step, as the native one but with all sums in fp32 (up to 4096 terms in a tree) and with a root and
    # quotients that may be off by 1 and 2 ulp on a GPU.
    "triton state": 6.0,
    "triton weight": 8.0,
    # Against the same formulas in plain torch, fp32: "at most twice plain torch's error", flash-attention's rule.
    "triton over torch": 2.0,
}

BACKENDS = {
    # Some twenty fp64 steps on two backends, whose gradients feed every rounding back.
    "backends": 1e-11,
    # The native law of the imbalance takes a weight that snaps for as large as it was before: up to SNAP of a typical
    # one.
    "backends, snapped": 1e-7,
    # The same in fp32, where a rounding is 5e8 times as large.
    "backends, fp32": 1e-4,
}


def tolerance(kind: str) -> float:
    """The tolerance of a kind of comparison."""
    return (FORMULAS | WHERE_TRAINING_ENDS | KERNELS | BACKENDS)[kind]
