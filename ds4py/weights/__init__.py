"""Checkpoint -> model."""
