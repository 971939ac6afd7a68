"""The compilation forge: turns blueprint x interface into signed kernels, in the background. Torch only in its child."""
