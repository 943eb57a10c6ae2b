"""Around every training loop: checkpoints, status, previews."""
