"""Language modelling: text to packed tokens, training with transformers' Trainer, evaluation, generation."""
