"""Constraints to a plane known beforehand."""
