"""Kernels as data: a manifest, a safetensors blob, and the signatures without which nothing of it runs.

``manifest`` what it is · ``sign`` DSSE envelopes · ``trust`` whose signature counts: free of torch. ``pack`` moves tensors.
"""
