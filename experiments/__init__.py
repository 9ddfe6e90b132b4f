"""Programs that define flags and call the library. They contain no logic of their own."""
