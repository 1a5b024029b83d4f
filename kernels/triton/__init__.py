"""The fused step on GPUs."""
