"""Kernels as data: a manifest, a safetensors blob, and the signatures without which nothing of it runs.

Free of torch: ``manifest`` what it is, ``record`` what the library knows of it, ``sign`` DSSE envelopes, ``trust`` whose
signature counts. Only ``pack``, which moves tensors, needs it.
"""
