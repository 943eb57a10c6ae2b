"""What leaves for the Hugging Face Hub: what may travel, what it says of itself, and how it gets there."""
