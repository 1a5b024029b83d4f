"""Budgets: how many units may live, which, and when."""
