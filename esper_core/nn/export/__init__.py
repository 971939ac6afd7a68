"""A grown network as files that outlive Esper: weights with a code-free description, ``torch.export``, ONNX.

``bundle.export`` is the face; ``load`` is shipped beside the weights and imports nothing of Esper.
"""
