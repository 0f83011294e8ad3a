"""Checkpoints: complete or absent, checksummed, stored independently of the plan."""
