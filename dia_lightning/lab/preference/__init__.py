"""Human preference: blinded pairs of texts, and what people chose."""
