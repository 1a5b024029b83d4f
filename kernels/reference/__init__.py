"""The constrained step, readable: a *direction* times a *retraction*.

A direction turns a gradient into an ``update`` and a ``gain``; a retraction moves the weight by ``delta = lr * update``
while its factors shrink by ``rho = 1 - decay`` with ``decay = lr * strength * gain``::

    direction    grad, moments          ->  update, gain, moments
    retraction   w, delta, decay, c     ->  w'

so m directions and n retractions make m * n optimizers out of m + n functions.  Everything here is a pure function of
tensors and numbers; ``decay`` is passed instead of ``rho`` because ``1 - rho`` would lose the last bits of a small one.

The retractions are the fixed gauge (one imbalance ``c`` per tensor) of gradient descent on factors, for the rescaling
symmetry of L. Ziyin, *Symmetry Induces Structure and Constraint of Learning*, ICML 2024 (arXiv 2309.16932), Section 4.
"""
