"""Two models beside each other, in numbers: perplexity, KL divergence, and where they differ. Nothing of torch."""
