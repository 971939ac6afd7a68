"""The compilation forge: blueprint x interface to signed kernel, in the background. Torch only in its child."""
