"""Chooses an option for every table and a place for every shard, and proves how good that is."""
