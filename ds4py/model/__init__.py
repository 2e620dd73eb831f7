"""The forward pass, one module per named part. Lazy: nothing here evaluates or does I/O."""
