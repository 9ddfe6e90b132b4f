"""Results of the compiler for TPUs, on a machine without TPUs."""
