"""Growing inside other people's trainers: one callback for Lightning, one for the Hugging Face Trainer.

Neither package is imported unless its module here is: ``esper_core.trainers.lightning``, ``esper_core.trainers.huggingface``.
"""
