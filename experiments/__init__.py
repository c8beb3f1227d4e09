"""One number: from the description of a cell to its record; and many of them at once."""
