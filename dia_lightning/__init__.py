"""Sample text from π(x) ∝ p_θ(x) exp(λ r(x)) with a frozen language model: diffusion-based inference-time alignment."""

__version__ = "0.1.0"
