"""Engine and Session: the only door to a model. Evaluation happens here."""
