"""What is measured on one GPU."""
