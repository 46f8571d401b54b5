"""How good a model is: perplexity with its protocol, divergence from dense, lm-eval, generations."""
