"""What shards cost: cost models, and the plan with their predictions filled in."""
