"""Measures lookups and collectives on the hardware at hand: what the cost model is fitted to."""
