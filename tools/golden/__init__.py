"""Golden sets: small random models with the logits that independent implementations give them."""
