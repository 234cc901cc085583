"""How a model is trained: recipe, loop, checkpoints, forecast, diagnosis."""
