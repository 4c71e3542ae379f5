"""Other frameworks' names on fedlens, for programs that were written against them; each is imported on its own."""
