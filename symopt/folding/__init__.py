"""How :func:`symopt.fold` works: ``units`` (data model), ``rules`` (operations), ``analysis`` (graph), ``surgery``."""
