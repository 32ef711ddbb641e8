"""How masks are learned: the session, its plan, gated layers and budgets."""
