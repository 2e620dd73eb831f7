"""Bytes on disk <-> arrays. Knows block layouts and file layouts, nothing of the model."""
