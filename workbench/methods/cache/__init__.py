"""What a smaller cache keeps, holds and loses: scorers, budgets, ranks, bits, retaining heads, the results."""
