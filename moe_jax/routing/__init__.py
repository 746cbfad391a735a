"""The maths of routing: logits, scores, selection, budgets, balancing, losses, dispatch plans."""
