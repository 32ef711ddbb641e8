"""Sparsity types, budgets and what they count."""
