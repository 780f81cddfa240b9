"""The diffusion model over p_θ's token embeddings."""
