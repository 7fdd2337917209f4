"""Search under hard budgets: the integer program over damages, refined in context, judged in pairs,
measured on fresh seeds."""
