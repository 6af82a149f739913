"""One module a section of the page: its data, its chart, its tables and its text."""
