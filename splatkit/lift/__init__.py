"""Posed photos to a scene in one forward pass (MVSplat, Chen et al. 2024): the network, its weights, and `splatkit lift`."""
