"""Deciding and driving: what a controller sees and says, the heuristic policy, and the grower that moves a run's seeds."""
