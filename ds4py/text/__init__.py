"""Text to tokens to events, as pure functions: chat encoding, tokenizers, the streaming parser.

Knows nothing of models or arrays. Heavy libraries are imported where they are used.
"""
