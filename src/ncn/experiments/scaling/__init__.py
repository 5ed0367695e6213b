"""A ladder of sizes and budgets, and the law through it."""
