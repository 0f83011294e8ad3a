"""From a plan to a sharded model."""
