"""What the compiler of TPUs says, with no TPU here."""
