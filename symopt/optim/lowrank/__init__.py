"""The step of LowRank: factors as optimizer state."""
