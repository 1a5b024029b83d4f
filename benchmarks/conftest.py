"""pytest benchmarks: the programs for docs/ are not part of it, and importing them would need what they need."""

collect_ignore = ["__main__.py", "explicit_mode.py", "gauges.py", "imbalance.py", "loops.py"]
