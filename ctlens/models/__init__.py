"""The model boundary: loading, weights, hooks, generation, scoring. TransformerLens is imported in `loading` alone."""
