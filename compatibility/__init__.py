"""What symopt was run with, and the table of it: ``python -m compatibility``."""
