"""How :func:`symopt.fold` decides what may go: ``units`` (data model), ``rules`` (operations), ``analysis`` (graph)."""
