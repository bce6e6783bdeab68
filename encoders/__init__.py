"""Networks around the transformer: text encoders with their tokenizers, autoencoders, and weights on disk."""
