"""Arrow 2: tokens from a policy, batched continuously."""
