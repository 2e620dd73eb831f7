"""Parts of `tools/train_tiny.py`: config, data, model, optimiser, training loop, export."""
