"""How masks are learnt: the session, its plan, sites and budgets."""
