"""Cost of one step, its memory and whole training steps: the cases, the peers, and the checks before any timing."""
