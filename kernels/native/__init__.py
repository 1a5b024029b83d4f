"""The fused step on CPUs."""
