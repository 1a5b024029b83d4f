"""How :func:`symopt.fold` works: ``enforce`` (a plain copy that obeys), ``analysis`` (graph), ``surgery``.

``enforce`` uses ``recomputed`` (hooks) and ``budgets``, ``analysis`` uses ``rules`` (operations) on ``units`` (data
model), ``compare`` has the examples, ``statistics`` the running means of BatchNorm.
"""
