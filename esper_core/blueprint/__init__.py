"""Blueprints: typed graphs of named operations that describe a kernel, and what can be known or made from them.

Free of torch: ``interface`` what a slot offers, ``expression`` symbolic widths, ``activation`` facts about activations,
``ops`` the registry, ``ir`` the graph, ``analyse`` its cost, ``widening`` whether it folds, ``catalogue`` the built-in
designs. Only two import torch: ``build`` makes the ``nn.Module``, ``fold`` the tensors for the host's own weights.
"""
