"""A trained model in use: generation and class likelihoods."""
