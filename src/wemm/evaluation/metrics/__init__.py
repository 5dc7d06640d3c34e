"""How one answer is scored, and how sure a mean of scores is. Without torch."""
