"""The token noise of `exact@loss/top:<k>` in a language model, by k, and the rule that chooses the default k."""
