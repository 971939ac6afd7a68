"""The evaluation engine: measures real artifacts and alone may call them fit. Torch only in its child."""
