"""How good a model is, and what a run reports of itself."""
