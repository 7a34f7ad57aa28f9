"""How the target runs a tree: the probe, masks, caches, attention, graphs, compiled passes."""
