"""AnchorEmbed: turn a decoder-only LLM into a text embedder."""
