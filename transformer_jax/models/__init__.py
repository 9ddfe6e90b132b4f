"""Model families: pytrees of weights whose call is a pure function."""
