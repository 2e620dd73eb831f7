"""Quality measurements: generated tasks and their scoring with an engine."""
