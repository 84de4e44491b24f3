"""From captions to embeddings, by encoders outside the network."""
