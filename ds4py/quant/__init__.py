"""Making models smaller: encoders, recipes, conversion."""
