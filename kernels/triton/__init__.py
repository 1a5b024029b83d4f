"""The fused step on GPUs.

``launch`` is the interface.  ``backend`` says what it can step; ``table``, ``table_planes`` and ``table_units`` point
at parameters and their state; ``launch_plan`` decides which of them share launches.  None of these imports Triton.

The kernels: ``elementwise_step`` (with the retractions of ``elementwise``), ``group`` and ``group_units`` (with
``group_tiles``), ``orbit`` (with ``orbit_places``) and ``coordinates``; they share ``memory``, ``constants``,
``directions`` and ``imbalance``.  ``selection`` finds thresholds of budgets, ``product`` is explicit mode's.
"""
